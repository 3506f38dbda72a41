"""Which beginnings of prompts requests of a decode instance keep remote, and how many usually keep the same at a time.

A prompt is a sequence of names of its blocks, each of which depends on those before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Block = TypeVar("Block", bound=Hashable)

REMEMBERED = 1 << 16
"""So many blocks that nobody keeps are remembered."""
WEIGHT = 1 / 8
"""Of the newest request that keeps a block, in how many usually do."""
SHARED_FROM = 1.5
"""A block that usually fewer keep at a time counts as one request's own."""


class Sharing(Generic[Block]):
    """Requests that share a prompt's beginning often end together and are followed by others that share it. In between
    nobody keeps it, and the first one to come would be taken for the only one: so how many kept a block at a time is
    remembered when the last of them has ended."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self.keepers: dict[Block, int] = {}
        """How many requests keep a block; none with 0."""
        self._usual: dict[Block, float] = {}
        """How many usually do at a time, of those that more than one keeps or did."""
        self._past: OrderedDict[Block, float] = OrderedDict()
        """The same of blocks that nobody keeps any more, those that were dropped first in front."""
        self._remembered = remembered

    def keep(self, block: Block) -> bool:
        """One more request keeps the block. True if it is the only one."""
        keepers = self.keepers.get(block, 0) + 1
        self.keepers[block] = keepers
        usual = self._usual.get(block, 1.0) if keepers > 1 else self._past.pop(block, 1.0)
        if keepers > 1 or usual > 1.0:
            self._usual[block] = max(usual + WEIGHT * (keepers - usual), keepers)
        return keepers == 1

    def drop(self, block: Block) -> bool:
        """One request less keeps it. True if it was the only one. Raises KeyError if nobody does."""
        self.keepers[block] -= 1
        if self.keepers[block]:
            return False
        del self.keepers[block]
        usual = self._usual.pop(block, 1.0)
        if usual >= SHARED_FROM:
            self._past[block] = usual
            if len(self._past) > self._remembered:
                self._past.popitem(last=False)
        return True

    def leading(self, blocks: Iterable[Block]) -> int:
        """How many blocks at the beginning of a prompt are kept."""
        count = 0
        for block in blocks:
            if block not in self.keepers:
                break
            count += 1
        return count

    def expected(self, blocks: Iterable[Block]) -> tuple[int, int]:
        """Of a prompt that is to come: (blocks at its beginning that are kept or usually shared, requests with as many
        that are expected to come, itself included)."""
        count, coming = 0, 1
        for block in blocks:
            keepers = self.keepers.get(block, 0)
            usual = self._usual.get(block, 0.0) if keepers else self._past.get(block, 0.0)
            if not keepers and not usual:
                break
            count += 1
            coming = max(round(usual) - keepers, 1)
        return count, coming
