"""Which rows of the decode KV pool have a remote prefix: per-row tables that the attention backend reads each step.

Written by the scheduler thread when a request gets or leaves its row, read by the same thread when a step is planned;
on a GPU the device copies are updated on the schedule stream, in the order of req_to_token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

NO_LINK = -1


@dataclass(frozen=True)
class RemoteRows:
    """The offloaded rows of one batch that one link serves.

    link   index of the link
    rows   int64 [n], positions in the batch
    lanes  the link's lane of each of them
    """

    link: int
    rows: torch.Tensor
    lanes: tuple[int, ...]


@dataclass
class OffloadTable:
    """Tables over rows of req_to_token. Row 0 is SGLang's padding row and stays local."""

    num_rows: int
    remote_len: torch.Tensor = field(init=False)
    """int64 [num_rows]: tokens of the row's prefix that are attended remotely; 0 for local requests."""
    link: torch.Tensor = field(init=False)
    lane: torch.Tensor = field(init=False)
    num_remote: int = 0

    def __post_init__(self) -> None:
        self.remote_len = torch.zeros(self.num_rows, dtype=torch.int64)
        self.link = torch.full((self.num_rows,), NO_LINK, dtype=torch.int64)
        self.lane = torch.zeros(self.num_rows, dtype=torch.int64)

    def set(self, row: int, *, remote_len: int, link: int, lane: int) -> None:
        self.clear(row)
        self.remote_len[row] = remote_len
        self.link[row] = link
        self.lane[row] = lane
        self.num_remote += 1

    def disconnect(self, row: int) -> None:
        """The row's link is gone: attend its suffix only, its request is about to end with an error."""
        self.link[row] = NO_LINK

    def clear(self, row: int) -> None:
        if self.remote_len[row] != 0:
            self.num_remote -= 1
        self.remote_len[row] = 0
        self.link[row] = NO_LINK
        self.lane[row] = 0

    def starts(self, req_pool_indices: torch.Tensor) -> torch.Tensor:
        """First position that is attended locally, int64 [batch]."""
        return self.remote_len[req_pool_indices]

    def remote_rows(self, req_pool_indices: torch.Tensor) -> list[RemoteRows]:
        """The batch's offloaded rows, one entry a link, in order of link."""
        if self.num_remote == 0:
            return []
        links = self.link[req_pool_indices]
        result = []
        for link in torch.unique(links).tolist():
            if link != NO_LINK:
                rows = torch.nonzero(links == link).flatten()
                lanes = tuple(self.lane[req_pool_indices[rows]].tolist())
                result.append(RemoteRows(link, rows, lanes))
        return result
