"""Admitted requests of a simulated decode instance as arrays, for the forecast of the memory that they will take."""

from __future__ import annotations

import numpy as np

from sglang_adrenaline import policy
from sglang_adrenaline.simulate.trace import Req


class Admitted:
    """A place for each request; places are reused. Steps are those of the instance's batch."""

    def __init__(self) -> None:
        self.shares = policy.AnswerShares()
        self._places: dict[int, int] = {}
        self._free: list[int] = []
        self._size = 0
        self._columns = np.zeros((5, 64), dtype=np.int64)
        """prompt tokens here, limit of the answer, answer tokens at step `began`, began, 1 while it runs."""

    def add(self, request: Req, produced: int) -> None:
        """Admitted, but its KV is still on its way."""
        if self._free:
            place = self._free.pop()
        else:
            place, self._size = self._size, self._size + 1
            if place == self._columns.shape[1]:
                self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._places[id(request)] = place
        self._columns[:, place] = (request.prompt - request.split, request.limit, produced, 0, 0)

    def runs(self, request: Req, step: int) -> None:
        self._columns[3:, self._places[id(request)]] = (step, 1)

    def remove(self, request: Req) -> None:
        place = self._places.pop(id(request))
        self._columns[:, place] = 0
        self._free.append(place)

    def growth(self, step: int, newcomer: Req, reserve: int) -> tuple[int, int]:
        """(most tokens that they and a newcomer will hold beyond what they hold at `step`, the newcomer's own part)."""
        prompt, limit, produced, began, runs = self._columns[:, : self._size]
        produced = produced + runs * (step - began)
        left = self.shares.expected_left(produced, np.maximum(limit, 1), reserve)
        at_first = max(newcomer.produced, 1)
        own = self.shares.expected_left(np.array([at_first]), np.array([newcomer.limit]), reserve)
        left = np.where(limit > 0, left, 0)
        return policy.peak_growth(prompt + produced, left, int(own[0])), int(own[0])
