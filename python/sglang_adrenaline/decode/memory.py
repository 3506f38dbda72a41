"""What decode's pool has to keep free for the answers of admitted requests: the question, and stock SGLang's answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True)
class Growth:
    """tokens: what admitted requests and a newcomer may take beyond what all of them hold when it begins; own: what the
    newcomer's answer may."""

    tokens: int
    own: int


class Promised(NamedTuple):
    """A request that is to get a row: tokens that it will hold here first, and the limit of its answer."""

    tokens: int
    limit: int


class KeptFree(Protocol):
    def growth(self, limit: int, promised: Sequence[Promised] = ()) -> Growth:
        """Beside a newcomer whose answer has at most `limit` tokens; `promised` will have rows before it."""
        ...


class ConstantReserve:
    """So many tokens for each, as SGLang keeps them (--num-reserved-decode-tokens)."""

    def __init__(self, tokens: int, rows: Callable[[], int]) -> None:
        self._tokens, self._rows = tokens, rows

    def growth(self, limit: int, promised: Sequence[Promised] = ()) -> Growth:
        return Growth(self._tokens * (self._rows() + len(promised) + 1), self._tokens)
