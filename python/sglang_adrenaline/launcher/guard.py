"""Cleans up after a launcher that died without doing so itself. Runs as a small process of its own.

Reads one fact a line from standard input: `group ID` (a process group of the launcher), `ended ID` (it is empty: the
number may become another's), `file PATH` (shared memory of its servers), `folder PATH` (temporary, with the key). The
line `done` ends it quietly. End of input without `done` means that the launcher is gone, also by kill -9: the groups
are killed and the rest is removed.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections import defaultdict

from sglang_adrenaline.launcher import groups

KILL_TIMEOUT_S = 10.0


class Guard:
    """The launcher's side. The pipe's write end is only in the launcher: it is not inherited by children."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C in the terminal must not end the guard before the launcher is done.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sglang_adrenaline.launcher.guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._told: set[str] = set()

    def tell(self, kind: str, value: str | int) -> None:
        """`kind` is group, file or folder."""
        line = f"{kind} {value}\n"
        if line not in self._told:
            self._told.add(line)
            self._write(line)

    def forget_group(self, group: int) -> None:
        """The group is empty."""
        self._told.discard(f"group {group}\n")
        self._write(f"ended {group}\n")

    def dismiss(self, timeout_s: float = 5.0) -> None:
        """All is cleaned up: end the guard."""
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
    facts: dict[str, list[str]] = defaultdict(list)
    for line in sys.stdin:
        kind, _, value = line.rstrip("\n").partition(" ")
        if kind == "done":
            return
        if kind == "ended":
            facts["group"].remove(value)
        else:
            facts[kind].append(value)
    remaining = [int(group) for group in facts["group"]]
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while remaining and time.monotonic() < deadline:
        for group in remaining:
            groups.kill(group)
        time.sleep(0.05)
        remaining = [group for group in remaining if not groups.is_empty(group)]
    groups.remove_shared_memory(facts["file"])
    for folder in facts["folder"]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
