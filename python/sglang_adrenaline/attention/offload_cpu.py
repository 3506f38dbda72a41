"""Attention of a decode server that offloads, on a CPU: the suffix here, the prefix at the executor, merged.

Runs in the decode scheduler's process, inside the forward pass. Per layer the queries of offloaded rows go out
first, the local part is computed while the executor works, then the two are joined: the round trip hides behind
local work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sglang_adrenaline.attention.cpu_backend import CpuAttnBackend
from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.decode.links import Link
from sglang_adrenaline.decode.runtime import DecodeRuntime
from sglang_adrenaline.decode.table import StepPlan
from sglang_adrenaline.errors import PeerLostError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from torch import Tensor


@dataclass(frozen=True)
class RemotePart:
    """A link with which a step is under way. rows: int64 [n], positions in the batch, in the order of its lanes."""

    link: Link
    rows: Tensor


class OffloadCpuAttnBackend(CpuAttnBackend):
    """`_plan` is that of the step under way, `_remote` its parts whose links still work."""

    def __init__(self, model_runner: ModelRunner, runtime: DecodeRuntime) -> None:
        super().__init__(model_runner)
        self._runtime = runtime
        self._plan: StepPlan | None = None
        self._remote: list[RemotePart] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        decodes = forward_batch.forward_mode.is_decode()
        self._plan = self._runtime.table.plan(forward_batch.rids or ()) if decodes else None
        self._remote = []
        super().init_forward_metadata(forward_batch)
        for part in self._plan.parts if self._plan is not None else ():
            link = self._runtime.link(part.link)
            try:
                link.channel.begin_step(part.lanes)
            except PeerLostError as error:
                self._runtime.step_failed(link, str(error))
            else:
                self._remote.append(RemotePart(link, torch.tensor(part.rows)))

    def _decode_starts(self, forward_batch: ForwardBatch) -> Tensor | None:
        return self._plan.starts if self._plan is not None else None

    def _decode_attention(self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> Tensor:
        if not self._remote:
            return super()._decode_attention(q, layer, forward_batch)
        sent = [part for part in self._remote if self._send(part, q, layer.layer_id)]
        o, lse = self._local_attention(q, layer)
        # A link that fails leaves its rows with their suffix alone; their requests end before the step's tokens count.
        self._remote = [part for part in sent if self._merge(part, o, lse, layer.layer_id)]
        return o

    def _send(self, part: RemotePart, q: Tensor, layer_id: int) -> bool:
        try:
            part.link.channel.send_q(layer_id, q[part.rows])
        except PeerLostError as error:
            self._runtime.step_failed(part.link, str(error))
            return False
        return True

    def _merge(self, part: RemotePart, o: Tensor, lse: Tensor, layer_id: int) -> bool:
        try:
            o_remote, lse_remote = part.link.channel.recv(layer_id)
        except PeerLostError as error:
            self._runtime.step_failed(part.link, str(error))
            return False
        merge_rows_(o, lse, o_remote, lse_remote, part.rows)
        return True

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True) -> Any:
        if self._plan is not None and not self._serves(layer):
            raise NotImplementedError(f"layer {layer.layer_id} cannot be offloaded")  # refused at start: see refusals
        return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
