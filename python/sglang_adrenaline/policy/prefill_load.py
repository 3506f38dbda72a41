"""`PrefillView.prefill_load`: how much work comes to a prefill instance, in seconds of the device alone a second. Pure.

It does not end at 1. What comes is counted when it comes, not when it is computed, and what has waited for long counts
on top, so that an instance that cannot keep up says by how much. `bounded_by_prefill` tells before it shows.
"""

from __future__ import annotations

import math

BRISK_S = 4.0
LASTING_S = 10.0
"""What came in so many seconds tells what comes. The longer one is for requests that outlive a burst of prompts, and
for the executor's share of the device, which holds for all requests; the shorter one for those that are gone soon."""
LIVES = 2.0
"""Of a request, that what came should be looked back for: requests that began together come again as they end, and over
one life or less such waves would count as load and as none in turn."""
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


def load_over(life_s: float, brisk: float, lasting: float) -> float:
    """The load that counts for requests that live for `life_s`; brisk, lasting: over BRISK_S and LASTING_S."""
    part = min(max((LIVES * life_s - BRISK_S) / (LASTING_S - BRISK_S), 0.0), 1.0)
    return brisk + part * (lasting - brisk)


class ArrivedWork:
    """Of one prefill instance, over about `window_s`. Times in seconds, of any clock that does not go back."""

    __slots__ = ("_at", "_recent_s", "_window_s")

    def __init__(self, window_s: float) -> None:
        self._recent_s = 0.0
        self._at = 0.0
        self._window_s = window_s

    def add(self, now: float, work_s: float) -> None:
        """So much came at `now`, or since the last time: it counts in full; negative: it went away uncomputed."""
        self._recent_s = max(self._recent(now) + work_s, 0.0)
        self._at = now

    def load(self, now: float, wait_s: float, speed: float = 1.0) -> float:
        """wait_s: how long a prompt that came now would wait; speed: of prefill now, as share of the device alone."""
        overdue_s = max(wait_s - PATIENCE_S, 0.0) * speed
        return (self._recent(now) + overdue_s) / self._window_s

    def _recent(self, now: float) -> float:
        return self._recent_s * math.exp(min(self._at - now, 0.0) / self._window_s)
