"""Which beginnings of prompts prefill instances keep for this decode instance, so that a shared one is known as such.

A prompt is named block by block, each block's name depending on those before it. Scheduler thread only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

BLOCK_TOKENS = 64


class KeptPrefixes:
    """`where` is a link to a prefill instance: what one keeps, another does not."""

    def __init__(self) -> None:
        self._kept: Counter[tuple[int, int]] = Counter()
        """How many requests keep a block, by link and name."""
        self._by_request: dict[str, tuple[int, list[int]]] = {}

    def keep(self, rid: str, where: int, prefix: Sequence[int]) -> None:
        """The instance was asked to keep `prefix` (token ids) for the request."""
        self.drop(rid)
        names = _names(prefix)
        self._by_request[rid] = (where, names)
        self._kept.update((where, name) for name in names)

    def drop(self, rid: str) -> None:
        """It keeps it no longer, or never did. Idempotent."""
        where, names = self._by_request.pop(rid, (0, []))
        for name in names:
            self._kept[where, name] -= 1
            if not self._kept[where, name]:
                del self._kept[where, name]

    def leading(self, where: int, prompt: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that are kept for others; whole blocks."""
        if not self._kept:
            return 0
        blocks = 0
        for name in _names(prompt):
            if (where, name) not in self._kept:
                break
            blocks += 1
        return blocks * BLOCK_TOKENS


def _names(tokens: Sequence[int]) -> list[int]:
    names, name = [], 0
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        name = hash((name, tuple(tokens[end - BLOCK_TOKENS : end])))
        names.append(name)
    return names
