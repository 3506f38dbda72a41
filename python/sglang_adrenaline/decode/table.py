"""Which running requests have a remote prefix: what the attention backend reads when a decode step is planned.

Written by the scheduler thread when a request joins or leaves decode's KV pool, read by the same thread at each step.
Everything is on the host; a backend on a GPU copies what it needs of a step's plan in the order of its stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_LINK = -1


@dataclass(slots=True)
class RemotePrefix:
    """length: tokens attended remotely; link: index of the link, NO_LINK once it is lost; lane: the link's lane."""

    length: int
    link: int
    lane: int


@dataclass(frozen=True)
class RemoteRows:
    """The offloaded rows of one batch that one link serves.

    link   index of the link
    rows   positions in the batch
    lanes  the link's lane of each of them
    """

    link: int
    rows: tuple[int, ...]
    lanes: tuple[int, ...]


@dataclass(frozen=True)
class StepPlan:
    """One decode step. starts: int64 [batch] on the CPU, first position of each row that is attended locally."""

    starts: torch.Tensor
    parts: tuple[RemoteRows, ...]
    """One entry a link, in order of link; rows of lost links are in none."""


class OffloadTable:
    """Remote prefixes by request id (SGLang's `rid`, unique among the requests of a server)."""

    def __init__(self) -> None:
        self._prefixes: dict[str, RemotePrefix] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def set(self, rid: str, *, length: int, link: int, lane: int) -> None:
        self._prefixes[rid] = RemotePrefix(length, link, lane)

    def disconnect(self, rid: str) -> None:
        """The request's link is gone: attend its suffix only, it is about to end with an error."""
        prefix = self._prefixes.get(rid)
        if prefix is not None:
            prefix.link = NO_LINK

    def clear(self, rid: str) -> None:
        self._prefixes.pop(rid, None)

    def any_remote(self, rids: Sequence[str]) -> bool:
        return bool(self._prefixes) and not self._prefixes.keys().isdisjoint(rids)

    def plan(self, rids: Sequence[str]) -> StepPlan | None:
        """The step of a batch with these requests, in its order; None if all of them are local."""
        if not self.any_remote(rids):
            return None
        starts = [0] * len(rids)
        parts: dict[int, tuple[list[int], list[int]]] = {}
        for row, rid in enumerate(rids):
            prefix = self._prefixes.get(rid)
            if prefix is None:
                continue
            starts[row] = prefix.length
            if prefix.link != NO_LINK:
                rows, lanes = parts.setdefault(prefix.link, ([], []))
                rows.append(row)
                lanes.append(prefix.lane)
        remote = tuple(RemoteRows(link, tuple(rows), tuple(lanes)) for link, (rows, lanes) in sorted(parts.items()))
        return StepPlan(torch.tensor(starts, dtype=torch.int64), remote)
