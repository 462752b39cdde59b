"""Run a command; when standard input closes, end it and everything it ever started.

The other end of standard input is held by whoever wants the command to run and closes with that process,
however it ends. Processes that were detached from the command become our children when their parents are
gone, and so are found::

    python -I supervisor.py flower-superlink --insecure ...

Needs nothing but the standard library and Linux.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36

#: Seconds between two looks at whether the command has ended by itself.
_LOOK_EVERY_S = 0.1


def main(command: list[str]) -> None:
    """Run `command` until it ends or standard input closes, and leave no process behind."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None and not select.select([sys.stdin], [], [], _LOOK_EVERY_S)[0]:
        continue
    # Killed processes leave their children to us: nobody can escape by forking once more.
    while children := _children(os.getpid()):
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        _bury()


def _children(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name, which may hold anything) state ppid ...
            status = entry.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(status[1]) == parent:
            found.append(int(entry.parent.name))
    return found


def _bury() -> None:
    """Take note of our dead children, which stay listed until then."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return
    time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1:])
