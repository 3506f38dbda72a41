"""Causal attention of a prompt's new tokens over a cached prefix and over themselves, on a CPU, for one request."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_adrenaline.attention.merge import combine
from sglang_adrenaline.attention.ragged import LOG2_E

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, k_buffer: Tensor, v_buffer: Tensor, prefix_slots: Tensor, *, sm_scale: float
) -> Tensor:
    """Token i of q attends to the whole prefix and to tokens 0..i of (k, v).

    q                   [new, num_qo_heads, head_dim]    fp32/bf16/fp16, CPU
    k, v                [new, num_kv_heads, head_dim]    dtype of q
    k_buffer, v_buffer  [slots, num_kv_heads, head_dim]  the pool; cast to q's dtype where it differs
    prefix_slots        [prefix_len]                     int64; may be empty

    Returns o like q, computed with float32 accumulation. PyTorch's causal mask starts at the first key, so prefix and
    new tokens are two calls and an exact merge; none computes what the mask would throw away.
    """
    # flash takes [1, heads, tokens, head_dim] and pairs query heads with their KV head by itself.
    o, lse = _flash(_heads_first(q), _heads_first(k), _heads_first(v), is_causal=True, scale=sm_scale)
    o = o[0].transpose(0, 1)
    if len(prefix_slots) == 0:
        return o
    o_prefix, lse_prefix = _attend_prefix(
        q, _take(k_buffer, prefix_slots).to(q.dtype), _take(v_buffer, prefix_slots).to(q.dtype), sm_scale
    )
    merged, _ = combine(o, lse[0].transpose(0, 1) * LOG2_E, o_prefix, lse_prefix)
    return merged


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """Every token of q over all of (k, v): (o [new, heads, D], lse [new, heads] base 2)."""
    o, lse = _flash(_heads_first(q), _heads_first(k), _heads_first(v), scale=sm_scale)
    return o[0].transpose(0, 1), lse[0].transpose(0, 1) * LOG2_E


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _take(buffer: Tensor, slots: Tensor) -> Tensor:
    """Rows `slots` of the pool: a view where they are one ascending run, else a copy."""
    first, count = int(slots[0]), len(slots)
    if int(slots[-1]) - first == count - 1 and bool((slots[1:] - slots[:-1] == 1).all()):
        return buffer[first : first + count]
    return torch.index_select(buffer.view(buffer.shape[0], -1), 0, slots).view(count, *buffer.shape[1:])
