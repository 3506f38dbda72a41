"""Admission by forecast: what the answers under way will take of decode's pool at most, from all rows of the moment.

Takes the place of SGLang's constant reserve (`memory.py`); the reckoning is `policy/forecast.py`'s. Scheduler thread.
All ranks forecast alike, from what is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_adrenaline import compat, policy
from sglang_adrenaline.decode.memory import Growth, Promised


@dataclass
class _Rows:
    """int64 [n] each. held: tokens here, the answer's so far included; left: of the answer, to go."""

    held: np.ndarray
    left: np.ndarray

    def __add__(self, other: _Rows) -> _Rows:
        return _Rows(np.concatenate([self.held, other.held]), np.concatenate([self.left, other.left]))


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

    @property
    def num_rows(self) -> int:
        return len(self._prompts)

    def new_loop(self) -> None:
        """Answers have grown."""
        self._rows = None

    def placed(self, req: Any, own_tokens: int) -> None:
        """The request has its row, for the first time or again; own_tokens: of its prompt, in slots of its own."""
        self._prompts[compat.rid(req)] = (req, own_tokens)
        if self._rows is not None:
            self._rows += self._gather([(req, own_tokens)])

    def gone(self, req: Any) -> None:
        """Its row is about to be freed."""
        self._prompts.pop(compat.rid(req), None)
        self._rows = None
        if compat.is_finished(req) and compat.output_len(req):
            self._shares = self._shares.add(compat.output_len(req), compat.answer_limit(req))

    def growth(self, limit: int, promised: Sequence[Promised] = ()) -> Growth:
        """See `memory.KeptFree`; with a little head-room for what cannot be known of others, if there are any."""
        if self._rows is None:
            self._rows = self._gather(self._prompts.values())
        rows = self._rows
        new = np.array([(0, limit), *promised], dtype=np.int64)
        left = self._left(np.zeros(len(new), np.int64), new[:, 1])
        if promised:
            rows += _Rows(new[1:, 0], left[1:])
        own = int(left[0])
        headroom = self._headroom if len(rows.held) else 0
        return Growth(policy.peak_growth(rows.held, rows.left, own) + headroom, own)

    def _gather(self, prompts: Iterable[tuple[Any, int]]) -> _Rows:
        rows = [(tokens, compat.output_len(req), compat.answer_limit(req)) for req, tokens in prompts]
        tokens, produced, limits = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        return _Rows(tokens + produced, self._left(produced, limits))

    def _left(self, produced: np.ndarray, limits: np.ndarray) -> np.ndarray:
        return self._shares.expected_left(produced, np.maximum(limits, 1), self._assumed)
