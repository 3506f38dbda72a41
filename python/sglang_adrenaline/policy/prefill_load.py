"""`PrefillView.prefill_load`: how much work comes to a prefill instance, in seconds of the device alone a second. Pure.

It does not end at 1. What comes is counted when it comes, not when it is computed, and what has waited for long counts
on top, so that an instance that cannot keep up says by how much. `bounded_by_prefill` tells before it shows.
"""

from __future__ import annotations

import math

WINDOW_S = 10.0
PATIENCE_S = 2.0
"""A queue as long as this is a passing burst, not too much load."""
BACKLOG_S = 10.0
"""Requests that wait for less are a passing burst."""
BOUND = 0.9


def bounded_by_prefill(waiting: int, prefill_s: float, decode_s: float) -> bool:
    """Whether requests will wait for prompts to be computed rather than for others to be decoded.

    waiting: requests whose prompts are not computed. prefill_s, decode_s: what one request costs the prefill instances
    together, and decode with its memory full, when both do nothing else.
    """
    return waiting * max(prefill_s, decode_s) >= BACKLOG_S and prefill_s >= BOUND * decode_s


class ArrivedWork:
    """Of one prefill instance. Times in seconds, of any clock that does not go back."""

    __slots__ = ("_at", "_recent_s")

    def __init__(self) -> None:
        self._recent_s = 0.0
        self._at = 0.0

    def add(self, now: float, work_s: float) -> None:
        """So much came at `now`; negative: it went away uncomputed."""
        self._recent_s = max(self._recent(now) + work_s, 0.0)
        self._at = now

    def load(self, now: float, wait_s: float, speed: float = 1.0) -> float:
        """wait_s: how long a prompt that came now would wait; speed: of prefill now, as share of the device alone."""
        overdue_s = max(wait_s - PATIENCE_S, 0.0) * speed
        return (self._recent(now) + overdue_s) / WINDOW_S

    def _recent(self, now: float) -> float:
        return self._recent_s * math.exp(min(self._at - now, 0.0) / WINDOW_S)
