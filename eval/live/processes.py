"""What processes use."""

import os
from pathlib import Path


def cpu_s(pid: int) -> float:
    """CPU time, s, that a process has used, with what it started, if it leads a group: of all that are in it.

    Raises FileNotFoundError for a process that is gone.
    """
    ticks = _ticks(Path(f"/proc/{pid}/stat"))[1]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if stat.parent.name != str(pid):
            try:
                group, used = _ticks(stat)
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
            ticks += used if group == pid else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(stat: Path) -> tuple[int, int]:
    """Process group, and ticks of CPU time that were used, in user and kernel."""
    fields = stat.read_text().rpartition(")")[2].split()
    return int(fields[2]), int(fields[11]) + int(fields[12])
