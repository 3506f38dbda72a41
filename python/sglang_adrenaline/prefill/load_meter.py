"""How busy prefill has been of late: the share of wall time in which its scheduler loop had a batch on the device."""

from __future__ import annotations

import math

WINDOW_S = 5.0


class LoadMeter:
    """A running mean that forgets within WINDOW_S. It saturates: 1 says that prefill is full, not by how much."""

    def __init__(self) -> None:
        self.load = 0.0
        self._at: float | None = None

    def tick(self, now: float, busy: bool) -> None:
        """Once a loop, at `now` (seconds, monotonic); `busy`: the time since the last call went into prompts."""
        if self._at is not None and now > self._at:
            self.load += (busy - self.load) * -math.expm1((self._at - now) / WINDOW_S)
        self._at = now
