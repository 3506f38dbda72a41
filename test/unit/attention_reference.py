"""Attention written down as its definition, in float64: what every implementation is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, *, sm_scale: float, logit_cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """q [heads, D] over k, v [n, kv_heads, D]: (o [heads, Dv], lse [heads] base 2), float64. n = 0: (0, -inf)."""
    group = q.shape[0] // k.shape[1]
    if len(k) == 0:
        return q.new_zeros(q.shape[0], v.shape[2], dtype=torch.float64), torch.full((q.shape[0],), -math.inf).double()
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("hd,nhd->hn", q.double(), k) * sm_scale
    if logit_cap > 0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v), torch.logsumexp(scores, -1) / math.log(2)


def reference_causal(q: Tensor, k: Tensor, v: Tensor, prefix_len: int, *, sm_scale: float) -> Tensor:
    """Token i of q [new, heads, D] over the first prefix_len + i + 1 of k, v [prefix_len + new, kv_heads, D]."""
    rows = [
        reference(q[i], k[: prefix_len + i + 1], v[: prefix_len + i + 1], sm_scale=sm_scale)[0] for i in range(len(q))
    ]
    return torch.stack(rows)
