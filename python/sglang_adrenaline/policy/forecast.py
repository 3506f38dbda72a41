"""How much memory admitted requests will still take at most, before those that end give theirs back. Pure.

A request that holds h tokens here and has l answer tokens to go holds h + s after s <= l steps, and nothing after that.
For all requests together, s steps from now,

    growth(s) = s * (requests with l >= s) - sum of h over requests with l < s

is how much more (or less) is held than now. Its maximum is what has to stay free. A constant reserve for each request,
which stock SGLang keeps, is too much for a batch whose requests end one after the other, since each end makes room for
the growth of many, and too little for one whose requests all began together.

How long answers become is not known; how long they may become is. `AnswerShares` learns which share of that they use.
"""

from __future__ import annotations

import functools

import msgspec
import numpy as np

RECENT = 256
FEW = 32
"""Fewer answers say nothing yet."""
PRIOR = 1
"""Answers that used all they may, beside the recent ones: keeps the longest seen from being taken for a limit."""

HEADROOM = 0.02
"""Share of the pool that admission by forecast leaves free, for what it cannot know."""


class AnswerShares(msgspec.Struct, frozen=True, dict=True):
    """recent: of the last RECENT answers, length / what it might have been, in (0, 1]."""

    recent: tuple[float, ...] = ()

    def add(self, length: int, limit: int) -> AnswerShares:
        """An answer ended after `length` >= 1 tokens, of at most `limit`."""
        share = min(length / max(limit, 1), 1.0)
        return AnswerShares((*self.recent[-(RECENT - 1) :], share))

    def expected_left(self, produced: np.ndarray, limit: np.ndarray, assumed: int) -> np.ndarray:
        """Tokens to go of each request, int64 [n]; produced and limit: of its answer, int64 [n], limit >= 1.

        The mean over recent answers that were longer than this one is by now. `assumed`: so many, as long as few
        answers were seen. Never more than the limit allows.
        """
        most = np.maximum(limit - produced, 0)
        if len(self.recent) < FEW:
            return np.minimum(most, assumed)
        shares, beyond = self._sorted
        now = produced / limit
        first = np.searchsorted(shares, now, side="right")
        count = len(shares) - first
        mean = beyond[first] / np.maximum(count, 1) - now
        return np.minimum(most, np.ceil(np.maximum(mean, 0.0) * limit - 1e-6).astype(np.int64))

    @functools.cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares in rising order, and the sum of those from each on, of none at the end."""
        shares = np.sort(np.concatenate([self.recent, np.ones(PRIOR)]))
        return shares, np.concatenate([np.cumsum(shares[::-1])[::-1], [0.0]])


def peak_growth(held: np.ndarray, left: np.ndarray, newcomer_left: int) -> int:
    """Most tokens that requests, and one more that begins now, will hold beyond what all of them hold at first; >= 0.

    held, left: int64 [n], tokens held here and answer tokens to go. What the newcomer holds at first is the caller's
    to count.
    """
    if not len(held):
        return max(newcomer_left, 0)
    order = np.argsort(left, kind="stable")
    steps, frees = left[order], held[order]
    freed = np.cumsum(frees)
    alive = np.arange(len(steps), 0, -1)
    growth = steps * alive - (freed - frees) + np.minimum(steps, newcomer_left)
    alone = newcomer_left - int(freed[-1]) if newcomer_left > steps[-1] else 0
    return max(int(growth.max()), alone, 0)
