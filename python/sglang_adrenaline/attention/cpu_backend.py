"""Attention backend for CPUs: SGLang's `torch_native` with decode over ragged batches and prefill without padding.

Runs in the scheduler process. Serves causal self-attention of decoders with equal key and value widths; for all else
(cross and encoder attention, sliding windows, logit caps, quantised KV) it is upstream's implementation. Decode
servers that offload subclass it: `_decode_starts` and `_decode_attention` are their seam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from sglang_adrenaline.attention.prefill import attend_causal
from sglang_adrenaline.attention.ragged import RaggedPlan, Scratch, attend

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


@dataclass(frozen=True, slots=True)
class ExtendPiece:
    """One request of a prefill batch: rows [start, stop) of q attend to its cached prefix and, causally, each other."""

    start: int
    stop: int
    prefix_slots: Tensor
    """int64 [prefix_len], slots of the KV pool."""


class CpuAttnBackend(TorchNativeAttnBackend):
    """State of a forward pass: `decode_plan` or `extend_pieces`, set by `init_forward_metadata`, else None."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self.scratch = Scratch()
        self.decode_plan: RaggedPlan | None = None
        self.extend_pieces: tuple[ExtendPiece, ...] | None = None

    # ---- seam for offloading ----

    def _decode_starts(self, forward_batch: ForwardBatch) -> Tensor | None:
        """First position that each row of a decode batch attends to here, integer [rows]; None = 0 for all."""
        return None

    def _decode_attention(self, q: Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> Tensor:
        """o [rows, num_qo_heads, head_dim] of a decode batch, for q of the same shape."""
        return self._local_attention(q, layer)[0]

    def _local_attention(self, q: Tensor, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        """(o, lse) of a decode batch over the positions from `_decode_starts` on; lse float32, base 2."""
        assert self.decode_plan is not None
        k_buffer, v_buffer = self._kv(layer)
        return attend(q, k_buffer, v_buffer, self.decode_plan, sm_scale=layer.scaling)

    # ---- SGLang's interface ----

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.decode_plan = self.extend_pieces = None
        if forward_batch.encoder_lens is not None:
            return
        mode = forward_batch.forward_mode
        if mode.is_decode():
            ends = forward_batch.seq_lens
            starts = self._decode_starts(forward_batch)
            self.decode_plan = RaggedPlan.from_rows(
                self.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices,
                torch.zeros_like(ends) if starts is None else starts,
                ends,
                scratch=self.scratch,
            )
        elif mode.is_extend_without_speculative() and not mode.is_dllm_extend():
            self.extend_pieces = self._pieces(forward_batch)

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> Tensor:
        if self.decode_plan is None or not self._serves(layer):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            self._store(layer, forward_batch, k, v)
        o = self._decode_attention(q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim), layer, forward_batch)
        return o.reshape(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> Tensor:
        if self.extend_pieces is None or k is None or v is None or not self._serves(layer):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache:
            self._store(layer, forward_batch, k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        v = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
        k_buffer, v_buffer = self._kv(layer)
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        for piece in self.extend_pieces:
            rows = slice(piece.start, piece.stop)
            o[rows] = attend_causal(
                q[rows], k[rows], v[rows], k_buffer, v_buffer, piece.prefix_slots, sm_scale=layer.scaling
            )
        return o.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    # ---- internals ----

    def _serves(self, layer: RadixAttention) -> bool:
        return (
            layer.attn_type == AttentionType.DECODER
            and not layer.is_cross_attention
            and layer.sliding_window_size <= -1
            and layer.logit_cap == 0.0
            and layer.qk_head_dim == layer.v_head_dim
            and self.token_to_kv_pool.dtype in (torch.float32, torch.bfloat16, torch.float16)
        )

    def _kv(self, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        """The layer's pool, each [slots, num_kv_heads, head_dim]."""
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def _store(self, layer: RadixAttention, forward_batch: ForwardBatch, k: Tensor, v: Tensor) -> None:
        loc = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
        self.token_to_kv_pool.set_kv_buffer(
            layer,
            loc,
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
        )

    def _pieces(self, forward_batch: ForwardBatch) -> tuple[ExtendPiece, ...]:
        req_to_token = self.req_to_token_pool.req_to_token
        pieces, start = [], 0
        for row, prefix_len, extend_len in zip(
            forward_batch.req_pool_indices.tolist(),
            forward_batch.extend_prefix_lens.tolist(),
            forward_batch.extend_seq_lens.tolist(),
            strict=True,
        ):
            if extend_len:
                slots = req_to_token[row, :prefix_len].to(torch.int64)
                pieces.append(ExtendPiece(start, start + extend_len, slots))
            start += extend_len
        return tuple(pieces)
