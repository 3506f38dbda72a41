"""Exact merge of two partial attention results of the same queries. Torch operators; runs on any device.

For key sets A and B with lse_X = log2 sum_i 2^s_i and o_X = sum_i 2^(s_i - lse_X) v_i, attention over their union
is the sum of o_A and o_B weighted by 2^(lse_X - lse), lse = log2(2^lse_A + 2^lse_B). An empty set has lse = -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_rows_(o: Tensor, lse: Tensor, o_remote: Tensor, lse_remote: Tensor, rows: Tensor) -> None:
    """Merge remote partial attention into `rows` of (o, lse), in place.

    o           [batch, num_qo_heads, head_dim]     fp32/bf16/fp16
    lse         [batch, num_qo_heads]               float32, base 2; -inf = empty
    o_remote    [num_rows, num_qo_heads, head_dim]  floating point, any
    lse_remote  [num_rows, num_qo_heads]            float32, base 2; -inf = empty
    rows        [num_rows]                          int32/int64, distinct, in [0, batch)

    Computed in float32. A part with lse = -inf has weight exactly 0, so its o may hold anything finite; where both
    parts are empty, o becomes 0 and lse stays -inf. Raises ValueError on a shape, dtype or device that differs.
    """
    num_rows, num_qo_heads, head_dim = rows.numel(), o.shape[1], o.shape[2]
    _check("lse", lse, (o.shape[0], num_qo_heads), o.device, torch.float32)
    _check("o_remote", o_remote, (num_rows, num_qo_heads, head_dim), o.device)
    _check("lse_remote", lse_remote, (num_rows, num_qo_heads), o.device, torch.float32)
    if num_rows == 0:
        return
    merged, merged_lse = combine(o[rows], lse[rows], o_remote, lse_remote)
    o[rows] = merged.to(o.dtype)
    lse[rows] = merged_lse


def combine(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) of attention over both parts. o [..., head_dim] any floating dtype, lse [...] float32, base 2.

    Returns new float32 tensors; the properties are those of `merge_rows_`, shapes are not checked.
    """
    lse = torch.logaddexp2(lse_a, lse_b)
    o = o_a.float() * _weight(lse_a, lse)
    return o.addcmul_(o_b.float(), _weight(lse_b, lse)), lse


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    """2^(part - whole), 0 where both are -inf (the difference is NaN there); one trailing dimension added."""
    return torch.exp2(part - whole).nan_to_num_(nan=0.0).unsqueeze(-1)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    if tuple(tensor.shape) != shape or tensor.device != device or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(
            f"{name}: expected {shape} {dtype or 'floating point'} on {device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
