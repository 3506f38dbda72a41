"""Kills the process groups of a launcher that died without stopping them. Runs as a small process of its own.

`python guard.py`: reads process group ids, one a line, from standard input. The line `done` ends it quietly. End of
input without `done` means that the launcher is gone (also by kill -9): every group is killed.
Uses the standard library only, and is started by path, so that it is up within milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys


class Guard:
    """The launcher's side. The pipe's write end is only in the launcher: close-on-exec keeps it from all children."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C in the terminal must not end the guard before the launcher is done.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, group: int) -> None:
        """Have `group` killed should this process die."""
        self._write(f"{group}\n")

    def dismiss(self, timeout_s: float = 5.0) -> None:
        """All groups are gone: end the guard."""
        self._write("done\n")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()


def main() -> None:
    groups: list[int] = []
    for line in sys.stdin:
        if line.strip() == "done":
            return
        groups.append(int(line))
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
