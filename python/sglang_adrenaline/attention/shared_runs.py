"""Which lanes of an executor share runs of KV slots, so that attention can read those once.

Requests whose prompts begin alike have the same slots in prefill's radix tree. Lanes are kept in the lexical order of
their slots, with the length of what each has in common with the one before it; of any subset of lanes the shared runs
then follow from these lengths alone. No device, no threads.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.integer]

MIN_SHARED = 64
"""Tokens. A shorter run costs more in partial results than reading it once saves."""


class Run(NamedTuple):
    """Slots begin..end-1 of each of these lanes, which are equal."""

    lanes: tuple[int, ...]
    begin: int
    end: int


@dataclass
class SharedRuns:
    """Slots of lanes. `min_shared`: tokens from which on a shared run is told as one."""

    min_shared: int = MIN_SHARED
    _slots: dict[int, Slots] = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)
    """Lanes in the order of their slots."""
    _common: list[int] = field(default_factory=list)
    """By place in the order: how many slots the lane has in common with the one before it."""

    def add(self, lane: int, slots: Slots) -> None:
        """Let the lane have these slots [n], n >= 1, instead of what it may have had. They must not change."""
        self.discard(lane)
        place = bisect.bisect_left(self._order, _Key(slots), key=lambda other: _Key(self._slots[other]))
        before = _common(self._slots[self._order[place - 1]], slots) if place else 0
        self._order.insert(place, lane)
        self._common.insert(place, before)
        if place + 1 < len(self._order):
            self._common[place + 1] = _common(slots, self._slots[self._order[place + 1]])
        self._slots[lane] = slots

    def discard(self, lane: int) -> None:
        if self._slots.pop(lane, None) is None:
            return
        place = self._order.index(lane)
        del self._order[place]
        common = self._common.pop(place)
        if place < len(self._order):
            self._common[place] = min(self._common[place], common)

    def runs(self, lanes: Collection[int]) -> list[Run]:
        """What these lanes attend to, each slot of each lane in one run. Unknown lanes are left out."""
        return self._divide(*self._chosen(lanes))

    def distinct_tokens(self, lanes: Collection[int]) -> int:
        """How many slots these lanes attend to, those that several begin with once."""
        chosen, common = self._chosen(lanes)
        return sum(len(self._slots[lane]) for lane in chosen) - sum(common)

    def _chosen(self, lanes: Collection[int]) -> tuple[list[int], list[int]]:
        """Those of these lanes that are known, in order, with what each has in common with the one before."""
        wanted = set(lanes)
        chosen: list[int] = []
        common: list[int] = []
        least = 0
        for lane, with_previous in zip(self._order, self._common, strict=True):
            least = min(least, with_previous)
            if lane in wanted:
                chosen.append(lane)
                common.append(least)
                least = _NO_LIMIT
        return chosen, common

    def _divide(self, lanes: list[int], common: list[int]) -> list[Run]:
        """Of lanes in order, with what each has in common with the one before."""
        runs: list[Run] = []
        todo = [(0, len(lanes), 0)]
        while todo:
            first, last, begin = todo.pop()  # lanes first..last-1 share all slots before `begin`, which are done
            if last - first <= 1:
                for lane in lanes[first:last]:
                    if begin < (end := len(self._slots[lane])):
                        runs.append(Run((lane,), begin, end))
                continue
            end = min(common[first + 1 : last])
            if end - begin >= self.min_shared:
                runs.append(Run(tuple(lanes[first:last]), begin, end))
                begin = end
            cuts = [at for at in range(first + 1, last) if common[at] - begin < self.min_shared]
            todo += [(a, b, begin) for a, b in zip([first, *cuts], [*cuts, last], strict=True)]
        return runs


_NO_LIMIT = 1 << 62


class _Key:
    """Slots in lexical order."""

    __slots__ = ("slots",)

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    def __lt__(self, other: _Key) -> bool:
        a, b = self.slots, other.slots
        common = _common(a, b)
        if common == min(len(a), len(b)):
            return len(a) < len(b)
        return bool(a[common] < b[common])


def _common(a: Slots, b: Slots) -> int:
    """How many slots both begin with."""
    if a[0] != b[0]:
        return 0
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax())
    return first if differ[first] else length
