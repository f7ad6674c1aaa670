"""What other processes use."""

import os
from pathlib import Path


def cpu_s(pid: int) -> float:
    """CPU time that a process has used."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
