"""How busy prefill has been of late: the share of wall time that went into prompts."""

from __future__ import annotations

import math

WINDOW_S = 2.5


class LoadMeter:
    """A running mean that forgets within WINDOW_S. It saturates: 1 says that prefill is full, not by how much."""

    def __init__(self) -> None:
        self.load = 0.0
        self._at: float | None = None
        self._worked_s = 0.0

    def tick(self, now: float, worked_s: float, busy: bool) -> None:
        """Once a loop, at `now` (seconds, monotonic).

        worked_s  time that prefill has worked since it began, on a clock that stands while the executor has its core
        busy      the time since the last call went into prompts
        """
        if self._at is not None and now > self._at:
            share = min((worked_s - self._worked_s) / (now - self._at), 1.0) if busy else 0.0
            self.load += (share - self.load) * -math.expm1((self._at - now) / WINDOW_S)
        self._at, self._worked_s = now, worked_s
