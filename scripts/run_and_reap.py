"""Runs a command and, when it has ended, whatever became of it, kills every process that descends from it.

`run_and_reap.py COMMAND...`; exits as the command did. As a subreaper it becomes the parent of orphans, so that no
descendant gets out of sight by starting a session of its own or changing its title. Linux; standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
TIMEOUT_S = 20.0


def descendants(root: int) -> set[int]:
    """Living and dead, not yet reaped, processes below `root`."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    while added := {pid for pid, parent in parents.items() if parent in found | {root}} - found:
        found |= added
    return found


def reap_all() -> None:
    """Kill and reap until no descendant is left, or the time-out."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants(os.getpid())
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    print(f"run_and_reap.py: processes {sorted(descendants(os.getpid()))} could not be ended", file=sys.stderr)


def main() -> int:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        print("run_and_reap.py: warning: the kernel refuses PR_SET_CHILD_SUBREAPER", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        return subprocess.call(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    finally:
        reap_all()


if __name__ == "__main__":
    sys.exit(main())
