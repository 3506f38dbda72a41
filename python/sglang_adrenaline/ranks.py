"""The tensor-parallel ranks of one server, and the one question that they ask each other. No SGLang import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of its server.

    cpu_group  torch process group on gloo of all of them; its own timeout bounds every wait, and a rank that dies ends
               it at once. None where there is one rank.
    """

    tp_rank: int
    tp_size: int
    cpu_group: Any = None

    @property
    def is_first(self) -> bool:
        return self.tp_rank == 0

    def lowest(self, values: Sequence[int]) -> list[int]:
        """Of each value the lowest that any rank gives; int64.

        A collective: all ranks call it at the same point of the same scheduler loop, with equally many values. Without
        values, and where there is one rank, nothing is exchanged.
        """
        if self.tp_size == 1 or not values:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.cpu_group)
        return tensor.tolist()
