"""Child processes of the launcher: each leads a process group, writes to a log file, and never outlives us."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.launcher import groups

PARENT_ENV = "SGLANG_ADRENALINE_PARENT_PID"
ERROR_PREFIX = "sglang_adrenaline: error: "
_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """In a child: have the kernel kill this process when the launcher that started it dies. No-op without launcher."""
    parent = os.environ.pop(PARENT_ENV, None)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)


@dataclass
class Child:
    """A started process and its group. Owner: the supervisor, which ends it with `stop_all`."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def group(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)

    def fate(self) -> str:
        """How the process ended, in words."""
        code = self.process.poll()
        if code is None:
            return "still runs"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def error_line(self) -> str | None:
        """The text of the last line in which the child itself says what is wrong, if it did."""
        found = [line.partition(ERROR_PREFIX)[2].strip() for line in self.log_tail(200) if ERROR_PREFIX in line]
        return found[-1] if found else None

    def log_tail(self, num_lines: int) -> list[str]:
        """Last lines of the log, at most 64 KiB of it."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 65536))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]

    def log_contains(self, text: str) -> bool:
        return text.encode() in self.log.read_bytes()


def start_child(name: str, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> Child:
    """Start `python ARGV...` as the leader of a new process group with its output in `log`. Raises ConfigError."""
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env, PARENT_ENV: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
    except OSError as error:
        raise ConfigError(f"cannot start {name}: {error}") from None
    return Child(name, process, log)


def stop_all(children: Sequence[Child], grace_s: float, hurry: Callable[[], bool] = lambda: False) -> list[str]:
    """Ask all to stop, kill what is left after `grace_s` or once `hurry()`, and wait until every group is empty.

    Returns the names of children that could not be ended within 10 s more (stuck in the kernel).
    """
    for child in children:
        child.ask_to_stop()
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and not hurry() and any(child.is_alive() for child in children):
        time.sleep(0.05)
    deadline = time.monotonic() + 10.0
    remaining = list(children)
    while remaining and time.monotonic() < deadline:
        for child in remaining:
            groups.kill(child.group)
            child.process.poll()
        remaining = [child for child in remaining if child.is_alive() or not groups.is_empty(child.group)]
        if remaining:
            time.sleep(0.02)
    return [child.name for child in remaining]
