"""Attention of the GPU executor: one query per lane over that lane's slots of the KV pool, with its lse.

Which slots a lane attends to is read from buffers that `plan` fills, in the order of the current stream and without
waiting for the device, so that launches can be captured in CUDA graphs (`attention/planned.py`). Slots that lanes share
are read once (`attention/shared_runs.py`). One thread, one stream. No channel, no graphs here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.planned import Heads, PlannedAttention, Workspace
from sglang_adrenaline.attention.shared_runs import Run
from sglang_adrenaline.errors import ChannelError
from sglang_adrenaline.prefill.executor import LayerKV

_PLAN_WAIT_S = 30.0  # ends earlier if the stream does, and the waits of its kernels have limits of their own


class LaneAttention:
    """See the module. Made, planned and run on one stream; freed with its last reference, once that stream is done."""

    def __init__(
        self, layers: Sequence[LayerKV], *, lanes: int, num_qo_heads: int, dtype: torch.dtype, capacity: int, sms: int
    ) -> None:
        """`capacity`: most slots of all runs together. `sms`: on which the stream's kernels run.

        Raises ChannelError on pools that it cannot read. Blocks while the kernels are compiled, once a machine.
        """
        check_pool(layers, num_qo_heads, dtype)
        self.layers = layers
        self.capacity = capacity
        device = layers[0].k.device
        _, kv_heads, head_dim = layers[0].k.shape
        heads = Heads(num_qo_heads, kv_heads, head_dim)
        self._planned = PlannedAttention(lanes, heads, Workspace.make(lanes, heads, device), sms)
        self._slots = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._held: list[Tensor] = []
        """What the last plan copies from."""

    def plan(self, runs: Sequence[Run], slots: Mapping[int, Tensor], *, piece_tiles: int | None = None) -> None:
        """Let lanes attend to these runs of slots[lane] (int32 [n] on the device) from here on; others to nothing.

        `piece_tiles` is `make_plan`'s.
        Waits for the copies of the plan before this one, which lie behind what the stream did then. Raises
        ChannelError if they are not over in time, ValueError beyond the capacity or what `within_rows` allows.
        """
        total = sum(run.end - run.begin for run in runs)
        if total > self.capacity:
            raise ValueError(f"{total} slots for an attention that was made for {self.capacity}")
        try:
            self._planned.plan(runs, _PLAN_WAIT_S, piece_tiles=piece_tiles)
        except TimeoutError as error:
            raise ChannelError(str(error)) from None
        self._held = [slots[run.lanes[0]][run.begin : run.end] for run in runs]
        if self._held:
            torch.cat(self._held, out=self._slots[:total])
        self._planned.copies()

    def run(self, layer: int, q: Tensor, o: Tensor, lse: Tensor) -> None:
        """Attention of one layer with the plan that the stream has got to. Allocates nothing; graph-safe.

        q, o  [lanes, num_qo_heads, head_dim]  `dtype`, contiguous; row i is lane i, and lanes of the plan have one
        lse   [lanes, num_qo_heads]            float32, base 2
        """
        kv = self.layers[layer]
        self._planned.run(q, kv.k, kv.v, o, lse, self._slots, kv.sm_scale)


def check_pool(layers: Sequence[LayerKV], num_qo_heads: int, dtype: torch.dtype) -> None:
    """Raises ChannelError on a pool that the GPU executor cannot attend over."""
    k, v = layers[0].k, layers[0].v
    if any(layer.logit_cap for layer in layers):
        raise ChannelError("the GPU executor does not cap attention scores (logit soft cap)")
    if k.dtype != dtype:
        raise ChannelError(f"the GPU executor needs KV in the model's dtype {dtype}, not {k.dtype}")
    if k.shape != v.shape or k.dim() != 3:
        raise ChannelError(f"the GPU executor needs keys and values of one shape, not {k.shape} and {v.shape}")
    if k.shape[2] not in kernels.HEAD_DIMS:
        raise ChannelError(f"the GPU executor needs heads of {kernels.HEAD_DIMS} elements, not {k.shape[2]}")
    if num_qo_heads % k.shape[1] or num_qo_heads // k.shape[1] > kernels.ATTEND_COLUMNS:
        raise ChannelError(
            f"the GPU executor attends with {kernels.ATTEND_COLUMNS} query heads to a KV head at most, not with "
            f"{num_qo_heads} to {k.shape[1]}"
        )
