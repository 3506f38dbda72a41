"""The host thread of one end of an `ipc` channel: ends the waits of its kernels, and later frees its memory.

While the channel is open it looks every POLL_S whether the peer is gone or has given up, whether a kernel has failed,
and whether a step takes longer than it may; in each case it aborts the end, which kernels notice within microseconds.
After `close` it frees in order: the peer's mapping once no kernel of ours can touch it, then our memory once the peer
holds no mapping of it. What cannot be freed within RELEASE_S is left to the end of the process, with a line in the log:
freeing it under a kernel would take the whole process down.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

POLL_S = 0.05
RELEASE_S = 30.0


class Watched(Protocol):
    name: str

    def trouble(self) -> str | None:
        """Why the channel cannot go on, or None."""

    def abort(self, reason: str) -> None: ...

    def release_steps(self) -> list[Callable[[], bool]]:
        """What to do after `close`, in this order; each is called until it returns True."""


class Watchdog:
    def __init__(self, end: Watched) -> None:
        self._end = end
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"ipc-{end.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def release(self) -> None:
        """The end is closed: go over to freeing. Idempotent."""
        self._closing.set()

    def join(self, timeout_s: float) -> bool:
        """Whether everything was freed, or given up, within the time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        reason: str | None = None
        while not self._closing.wait(POLL_S):
            if reason is None and (reason := self._trouble()) is not None:
                self._end.abort(reason)
        deadline = time.monotonic() + RELEASE_S
        try:
            for step in self._end.release_steps():
                while not step():
                    if time.monotonic() > deadline:
                        logger.error("channel %s: memory could not be freed within %g s", self._end.name, RELEASE_S)
                        return
                    time.sleep(POLL_S / 10)
        except Exception as error:  # a CUDA error stays with the process; there is nothing left to free safely
            logger.error("channel %s: memory not freed: %s", self._end.name, error)

    def _trouble(self) -> str | None:
        try:
            return self._end.trouble()
        except Exception as error:
            logger.exception("channel %s", self._end.name)
            return f"watchdog failed: {error}"


class StepClock:
    """Tells how long the oldest unfinished step has been under way."""

    def __init__(self) -> None:
        self._done = -1
        self._since = 0.0

    def late_s(self, opened: int, done: int) -> float:
        """Seconds since a step has been open without another one getting done; 0 while none is open."""
        now = time.monotonic()
        if opened <= done or done != self._done:
            self._done, self._since = done, now
            return 0.0
        return now - self._since
