"""Keeps the servers of a deployment running: one that ends is started again, a bounded number of times.

Sleeps without polling while all run. A deployment goes on as long as each role has a server that is not given up.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sglang_adrenaline.launcher import stages
from sglang_adrenaline.launcher.processes import Child
from sglang_adrenaline.launcher.stages import Progress, StartFailed, Starting

STEADY_S = 600.0
"""A server that has served this long since its last restart has its tries anew."""
FIRST_DELAY_S, DELAY_FACTOR = 1.0, 4.0


@dataclass
class Kept:
    """One server, whichever process it is at the moment."""

    name: str
    role: str
    start: Callable[[], Starting]
    """Starts a process for it."""
    child: Child
    restarts: int = 0
    """In a row, without STEADY_S of service in between."""
    serves_since: float = field(default_factory=time.monotonic)
    restart_at: float | None = None
    """Set while it has no process."""
    starting: Starting | None = None
    """Set from a restart until the process serves."""
    deadline: float = 0.0
    """For `starting`."""
    given_up: bool = False


class Owner(Protocol):
    """Who has the processes; told of each change."""

    def ended(self, child: Child) -> None:
        """The process has ended, or is to be ended now with what it left behind."""

    def serves(self, child: Child) -> None:
        """A restarted one is up."""


class Stop(Protocol):
    fd: int

    def came(self) -> bool: ...


class Keeper:
    """Watches `kept` from `run` on, in the calling thread."""

    def __init__(
        self, kept: Sequence[Kept], owner: Owner, progress: Progress, *, max_restarts: int, start_timeout_s: float
    ) -> None:
        self._kept = kept
        self._owner = owner
        self._progress = progress
        self._max_restarts = max_restarts
        self._start_timeout_s = start_timeout_s

    def run(self, stop: Stop) -> None:
        """Until a stop is asked for. Raises StartFailed when the last server of a role is given up."""
        while not stop.came():
            for one in self._kept:
                if not one.given_up:
                    self._look_after(one)
            self._sleep(stop)

    def _look_after(self, one: Kept) -> None:
        now = time.monotonic()
        if one.restart_at is not None:
            if now >= one.restart_at:
                one.restart_at = None
                one.starting = one.start()
                one.child, one.deadline = one.starting.child, now + self._start_timeout_s
                self._progress(one.name, f"starting again, log: {one.child.log}")
        elif not one.child.is_alive():
            self._lost(one, one.child.error_line() or one.child.fate())
        elif one.starting is not None:
            stages.advance(one.starting)
            if not one.starting.stages:
                one.starting, one.serves_since = None, now
                self._owner.serves(one.child)
                self._progress(one.name, f"serves again after {time.monotonic() - one.child.started:.0f} s")
            elif now > one.deadline:
                self._lost(one, f"did not serve within {self._start_timeout_s:g} s")

    def _lost(self, one: Kept, why: str) -> None:
        self._owner.ended(one.child)
        now = time.monotonic()
        if one.starting is None and now - one.serves_since >= STEADY_S:
            one.restarts = 0
        one.starting = None
        if one.restarts < self._max_restarts:
            delay = FIRST_DELAY_S * DELAY_FACTOR**one.restarts
            one.restarts += 1
            one.restart_at = now + delay
            self._progress(one.name, f"{why}; restart {one.restarts} of {self._max_restarts} in {delay:g} s")
            return
        one.given_up = True
        left = sum(other.role == one.role and not other.given_up for other in self._kept)
        if not left:
            raise StartFailed(f"{one.name} {why}", one.child)
        tried = f"after {one.restarts} restarts " if one.restarts else ""
        self._progress(one.name, f"{why}; given up {tried}({one.role} servers left: {left})")

    def _sleep(self, stop: Stop) -> None:
        """Until a process ends, a stop is asked for, or something is due."""
        living = [one for one in self._kept if not one.given_up]
        now = time.monotonic()
        due = [max(0.0, one.restart_at - now) for one in living if one.restart_at is not None]
        due += [stages.POLL_S for one in living if one.starting is not None]
        with contextlib.ExitStack() as stack:
            poll = select.poll()
            poll.register(stop.fd, select.POLLIN)
            for one in living:
                if one.restart_at is None:
                    with contextlib.suppress(ProcessLookupError):
                        fd = os.pidfd_open(one.child.process.pid)
                        stack.callback(os.close, fd)
                        poll.register(fd, select.POLLIN)
            poll.poll(min(due) * 1000 if due else None)
