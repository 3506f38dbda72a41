"""Which beginnings of prompts prefill instances keep for this decode instance, so that a shared one is known as such.

A prompt is named block by block (`block_names`), each block's name depending on those before it. Scheduler thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sglang_adrenaline.policy.sharing import Sharing

BLOCK_TOKENS = 64


class KeptPrefixes:
    """`where` is a link to a prefill instance: what one keeps, another does not."""

    def __init__(self) -> None:
        self._sharing: Sharing[tuple[int, int]] = Sharing()
        """Blocks by link and name."""
        self._by_request: dict[str, tuple[int, list[int]]] = {}

    def keep(self, rid: str, where: int, names: Sequence[int]) -> None:
        """The instance was asked to keep these blocks for the request."""
        self.drop(rid)
        self._by_request[rid] = (where, list(names))
        for name in names:
            self._sharing.keep((where, name))

    def drop(self, rid: str) -> None:
        """It keeps it no longer, or never did. Idempotent."""
        where, names = self._by_request.pop(rid, (0, []))
        for name in names:
            self._sharing.drop((where, name))

    def leading(self, where: int, names: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt of these blocks that are kept for others."""
        return self._sharing.leading((where, name) for name in names) * BLOCK_TOKENS

    def expected(self, where: int, names: Sequence[int]) -> tuple[int, int]:
        """Of a prompt of these blocks: (tokens at its beginning that are kept or usually shared, requests with as many
        that are expected to come, itself included)."""
        blocks, coming = self._sharing.expected((where, name) for name in names)
        return blocks * BLOCK_TOKENS, coming

    def shared_tokens(self, rids: Iterable[str]) -> int:
        """What is saved by reading the blocks of these requests, of one link, once each instead of once a request."""
        named = [self._by_request[rid][1] for rid in rids if rid in self._by_request]
        return (sum(map(len, named)) - len(set().union(*named))) * BLOCK_TOKENS


def block_names(tokens: Sequence[int]) -> list[int]:
    """Of the whole blocks of these token ids."""
    names, name = [], 0
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        name = hash((name, tuple(tokens[end - BLOCK_TOKENS : end])))
        names.append(name)
    return names
