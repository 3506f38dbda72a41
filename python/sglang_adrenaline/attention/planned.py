"""`attend_kernel` with its plan and its partial results: attention of one query a lane over slots of a KV pool.

A launch depends on nothing but addresses, so that it can be captured in a CUDA graph; how the work is cut into pieces
is read from a buffer that `plan` fills, in the order of the current stream and without waiting for the device. One
thread, one stream. Whose slots they are, and where they come from, is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.lane_plan import KernelShape, make_plan, max_words, most_rows
from sglang_adrenaline.attention.shared_runs import Run
from sglang_adrenaline.cuda_wait import await_event


@dataclass(frozen=True)
class Heads:
    """Of one rank."""

    num_qo_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Workspace:
    """Partial results and tickets. Attentions whose launches follow each other on one stream may share one.

    o  [rows, num_qo_heads, head_dim] float32; lse [rows, num_qo_heads] float32; tickets [2] int32, 0 between launches
    """

    o: Tensor
    lse: Tensor
    tickets: Tensor

    @staticmethod
    def make(lanes: int, heads: Heads, device: torch.device) -> Workspace:
        """For attentions over at most so many lanes."""
        rows, float32 = most_rows(lanes), {"dtype": torch.float32, "device": device}
        return Workspace(
            o=torch.empty(rows, heads.num_qo_heads, heads.head_dim, **float32),
            lse=torch.empty(rows, heads.num_qo_heads, **float32),
            tickets=torch.zeros(2, dtype=torch.int32, device=device),
        )


class PlannedAttention:
    """See the module. Made, planned and run on one stream; freed with its last reference, once that stream is done."""

    def __init__(self, lanes: int, heads: Heads, workspace: Workspace, sms: int) -> None:
        """`sms`: on which the stream's kernels run; `workspace`: for as many lanes or more.

        Blocks while the kernels are compiled, once a machine.
        """
        device = workspace.o.device
        self._sms, self._workspace = sms, workspace
        self._shape = KernelShape(
            group=heads.num_qo_heads // heads.kv_heads,
            kv_heads=heads.kv_heads,
            columns=kernels.ATTEND_COLUMNS,
            warps=sms * kernels.attend_warps(heads.head_dim, device.index),
        )
        self._max_rows = most_rows(lanes)
        self._plan = torch.zeros(max_words(lanes, self._max_rows), dtype=torch.int32, device=device)
        self._plan_pinned = torch.zeros(self._plan.shape, dtype=torch.int32, pin_memory=True)
        self._copied = torch.cuda.Event()
        """After what the stream copies of the last plan: until then its host buffer must stay as it is."""

    def plan(self, runs: Sequence[Run], wait_s: float, *, piece_tiles: int | None = None) -> None:
        """Let lanes attend to these runs, whose slots lie one behind the other, from here on; others to nothing.

        `piece_tiles` is `make_plan`'s. Waits for the copies of the plan before this one, which lie behind what the
        stream did then. Raises TimeoutError if they are not over within `wait_s`, ValueError beyond what `within_rows`
        allows.
        """
        words = make_plan(runs, self._shape, self._max_rows, piece_tiles)
        if not await_event(self._copied, wait_s):
            raise TimeoutError(f"the GPU has not got to the last plan of attention within {wait_s:g} s")
        self._plan_pinned[: len(words)] = torch.from_numpy(words)
        self._plan[: len(words)].copy_(self._plan_pinned[: len(words)], non_blocking=True)
        self.copies()

    def copies(self) -> None:
        """What the stream copies until here belongs to the last plan: the next one waits for it, too."""
        self._copied.record()

    def run(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, slots: Tensor, sm_scale: float) -> None:
        """One layer with the plan that the stream has got to. Allocates nothing; graph-safe.

        q, o   [lanes, num_qo_heads, head_dim]      contiguous; row i is lane i, and lanes of the plan have one
        k, v   [num_slots, kv_heads, head_dim]      q's dtype
        lse    [lanes, num_qo_heads]                float32, base 2
        slots  [n]                                  int32: those of the plan's runs
        """
        work = self._workspace
        kernels.attend(q, k, v, o, lse, slots, self._plan, work.o, work.lse, work.tickets, sm_scale, self._sms)
