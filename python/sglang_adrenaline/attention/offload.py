"""Attention of a decode server that offloads, on a CPU: the suffix here, the prefix at the executor, merged.

Runs in the decode scheduler's process, inside the forward pass. Per layer the queries of offloaded rows go out
first, the local part is computed while the executor works, then the two are joined: the round trip hides behind
local work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_adrenaline.attention.cpu_backend import CpuAttnBackend
from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.decode.links import Link
from sglang_adrenaline.decode.runtime import DecodeRuntime
from sglang_adrenaline.decode.table import RemoteRows
from sglang_adrenaline.errors import PeerLostError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from torch import Tensor


class OffloadCpuAttnBackend(CpuAttnBackend):
    """`_remote` holds the links of the step under way that still work, with their rows of the batch."""

    def __init__(self, model_runner: ModelRunner, runtime: DecodeRuntime) -> None:
        super().__init__(model_runner)
        self._runtime = runtime
        self._table = runtime.attach_backend(self.req_to_token_pool.req_to_token.shape[0])
        self._remote: list[tuple[Link, RemoteRows]] = []

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self._remote = []
        if self.decode_plan is None:
            return
        for part in self._table.remote_rows(forward_batch.req_pool_indices):
            link = self._runtime.link(part.link)
            try:
                link.channel.begin_step(part.lanes)
            except PeerLostError as error:
                self._runtime.step_failed(link, str(error))
            else:
                self._remote.append((link, part))

    def _decode_starts(self, forward_batch: ForwardBatch) -> Tensor | None:
        return self._table.starts(forward_batch.req_pool_indices) if self._table.num_remote else None

    def _decode_attention(self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> Tensor:
        if not self._remote:
            return super()._decode_attention(q, layer, forward_batch)
        sent = [(link, part) for link, part in self._remote if self._send(link, part, q, layer.layer_id)]
        o, lse = self._local_attention(q, layer)
        # A link that fails leaves its rows with their suffix alone; their requests end before the step's tokens count.
        self._remote = [(link, part) for link, part in sent if self._merge(link, part, o, lse, layer.layer_id)]
        return o

    def _send(self, link: Link, part: RemoteRows, q: Tensor, layer_id: int) -> bool:
        try:
            link.channel.send_q(layer_id, q[part.rows])
        except PeerLostError as error:
            self._runtime.step_failed(link, str(error))
            return False
        return True

    def _merge(self, link: Link, part: RemoteRows, o: Tensor, lse: Tensor, layer_id: int) -> bool:
        try:
            o_remote, lse_remote = link.channel.recv(layer_id)
        except PeerLostError as error:
            self._runtime.step_failed(link, str(error))
            return False
        merge_rows_(o, lse, o_remote, lse_remote, part.rows)
        return True

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True) -> Any:
        if self._table.num_remote and not self._serves(layer):
            raise NotImplementedError(f"layer {layer.layer_id} cannot be offloaded")  # refused at start: see refusals
        return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)


def register_offload_backend(runtime: DecodeRuntime) -> None:
    """Make this the implementation of SGLang's backend name `torch_native`, the one that CPU machines use.

    The name stays because SGLang decides by it which operators may be used. Must run before the CPU platform starts.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend("torch_native")(lambda runner: OffloadCpuAttnBackend(runner, runtime))
