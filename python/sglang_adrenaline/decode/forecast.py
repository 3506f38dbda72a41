"""Admission by forecast: what the answers under way will take of decode's pool at most, from all rows of the moment.

Takes the place of SGLang's constant reserve (`memory.py`); the reckoning is `policy/forecast.py`'s. Scheduler thread.
All ranks forecast alike, from what is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_adrenaline import compat, policy
from sglang_adrenaline.decode.memory import Growth, Promised


@dataclass
class _Rows:
    """int64 [n] each. held: tokens here, the answer's so far included."""

    held: np.ndarray
    produced: np.ndarray
    limits: np.ndarray

    def __add__(self, other: _Rows) -> _Rows:
        return _Rows(
            np.concatenate([self.held, other.held]),
            np.concatenate([self.produced, other.produced]),
            np.concatenate([self.limits, other.limits]),
        )


class MemoryForecast:
    """One a decode scheduler. `assumed`: what an answer is taken to grow by while few were seen (tokens)."""

    def __init__(self, pool_tokens: int, assumed: int) -> None:
        self._headroom = int(policy.HEADROOM * pool_tokens)
        self._assumed = assumed
        self._shares = policy.AnswerShares()
        self._prompts: dict[str, tuple[Any, int]] = {}
        """By rid: a request with a row, and how much of its prompt it has here for itself."""
        self._rows: _Rows | None = None
        """As they are in this scheduler loop; None until it is asked for."""

    def new_loop(self) -> None:
        """Answers have grown."""
        self._rows = None

    def placed(self, req: Any, own_tokens: int) -> None:
        """The request has its row, for the first time or again; own_tokens: of its prompt, in slots of its own."""
        self._prompts[compat.rid(req)] = (req, own_tokens)
        if self._rows is not None:
            self._rows += _rows([(req, own_tokens)])

    def gone(self, req: Any) -> None:
        """Its row is about to be freed."""
        self._prompts.pop(compat.rid(req), None)
        self._rows = None
        if compat.is_finished(req) and compat.output_len(req):
            self._shares = self._shares.add(compat.output_len(req), compat.answer_limit(req))

    def growth(self, limit: int, promised: Sequence[Promised] = ()) -> Growth:
        """See `memory.KeptFree`; with a little head-room for what cannot be known."""
        if self._rows is None:
            self._rows = _rows(self._prompts.values())
        rows = self._rows
        if promised:
            tokens, limits = np.array(promised, dtype=np.int64).T
            rows += _Rows(tokens, np.zeros_like(tokens), limits)
        left = self._shares.expected_left(rows.produced, rows.limits, self._assumed)
        own = int(self._shares.expected_left(np.zeros(1, np.int64), np.array([max(limit, 1)]), self._assumed)[0])
        return Growth(policy.peak_growth(rows.held, left, own) + self._headroom, own)


def _rows(prompts: Any) -> _Rows:
    produced = np.array([compat.output_len(req) for req, _ in prompts], dtype=np.int64)
    limits = np.array([compat.answer_limit(req) for req, _ in prompts], dtype=np.int64)
    return _Rows(np.array([tokens for _, tokens in prompts], dtype=np.int64) + produced, produced, limits)
