"""Ends process groups when the process that started them has ended, however it did.

`python -I serving/guard.py` reads the groups, a number on a line each, until its standard input is closed, which the
kernel does for a process that is killed. What is left of them then is told to end, and after a time made to.
"""

import os
import signal
import sys
import time

STOP_S = 8.0  # for a process to end by itself
LOOK_S = 0.05


def end(groups: list[int]) -> None:
    """End what is left of process groups."""
    for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        groups = [group for group in groups if _told(group, number)]
        until_s = time.monotonic() + patience_s
        while groups and time.monotonic() < until_s:
            time.sleep(LOOK_S)
            groups = [group for group in groups if _told(group, 0)]


def _told(group: int, number: int) -> bool:
    """Send a signal, 0 to only look. Returns whether there is anybody."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # a group of that number is somebody else's by now
        return False
    return True


if __name__ == "__main__":
    end([int(line) for line in sys.stdin])
