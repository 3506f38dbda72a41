"""Attention over what the rows of a decode batch hold here, on a GPU: FlashInfer's, or our own kernel in CUDA graphs.

Both are planned once a step and then attend layer by layer. Our kernel (`attend_kernel`, that of the executor) reads
faster than FlashInfer's where several query heads share a KV head (docs/gpu-results.md); where they do not, both read
as fast as the memory. What it does not serve, and passes without a graph, is FlashInfer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from flashinfer import fast_decode_plan

from sglang_adrenaline import compat, kernels
from sglang_adrenaline.attention.planned import Heads, PlannedAttention, Workspace
from sglang_adrenaline.attention.shared_runs import Run

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from torch import Tensor

KERNEL_FROM_ROWS = 8
"""Smaller graphs hold FlashInfer's kernels: over a single long row they take 20 microseconds where ours takes 25."""
PLAN_WAIT_S = 60.0
"""Beyond every wait of a step for executors, which end by themselves."""


class Span(NamedTuple):
    """What rows of a step attend to here: positions starts[i] to starts[i] + lens[i] of request rows[i].

    rows, lens  [n]  integer, on the device; starts likewise, None = 0 for all
    lens_cpu    [n]  integer, the same on the CPU
    """

    rows: Tensor
    starts: Tensor | None
    lens: Tensor
    lens_cpu: Tensor


class LocalRows(Protocol):
    """One thread, one stream."""

    def plan(self, span: Span, **options: Any) -> None:
        """What the rows attend to from here on. `options` are SGLang's for FlashInfer."""

    def attend(self, q: Tensor, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        """o as q [rows, num_qo_heads, head_dim]; lse [rows, num_qo_heads] float32, base 2. Graph-safe."""


@dataclass(eq=False)
class FlashInferRows:
    """By a FlashInfer wrapper. updater: SGLang's, which plans wrappers; indptr: int32 [rows + 1], for its use.

    fast_plans: after the first plan take the one that needs no look at the device, as upstream does with its own.
    """

    wrapper: Any
    indptr: Tensor
    updater: Any
    pool: Any
    fast_plans: bool = False

    def plan(self, span: Span, **options: Any) -> None:
        self.updater.call_begin_forward(
            self.wrapper,
            span.rows,
            span.lens,
            int(span.lens_cpu.sum()),
            self.indptr,
            span.starts,
            options.pop("spec_info", None),
            span.lens_cpu,
            **options,
        )
        if self.fast_plans:
            self.wrapper.begin_forward = partial(fast_decode_plan, self.wrapper)

    def attend(self, q: Tensor, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        o, lse = self.wrapper.forward_return_lse(
            q,
            self.pool.get_kv_buffer(layer.layer_id),
            sm_scale=layer.scaling,
            logits_soft_cap=layer.logit_cap,
            k_scale=layer.k_scale_float,
            v_scale=layer.v_scale_float,
        )
        return o, lse


class KernelRows:
    """By our own kernel. Every row of a plan attends to one token at least: the one that it decodes."""

    def __init__(
        self, rows: int, heads: Heads, workspace: Workspace, slots: Tensor, req_to_token: Tensor, pool: Any
    ) -> None:
        """For at most so many rows; slots: int32, room for those of a step, not used by others while it runs."""
        device = slots.device
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._planned = PlannedAttention(rows, heads, workspace, sms)
        self._slots, self._req_to_token, self._pool = slots, req_to_token, pool
        self._indptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)

    def plan(self, span: Span, **options: Any) -> None:
        """Raises TimeoutError if the GPU does not get to the last plan within PLAN_WAIT_S."""
        self._planned.plan([Run((row,), 0, tokens) for row, tokens in enumerate(span.lens_cpu.tolist())], PLAN_WAIT_S)
        indptr = self._indptr[: len(span.rows) + 1]
        indptr[1:] = torch.cumsum(span.lens, 0)
        compat.write_kv_slots(self._req_to_token, span.rows, span.lens, indptr, span.starts, self._slots)

    def attend(self, q: Tensor, layer: RadixAttention) -> tuple[Tensor, Tensor]:
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        k, v = self._pool.get_kv_buffer(layer.layer_id)
        self._planned.run(q, k, v, o, lse, self._slots, layer.scaling)
        return o, lse


def kernel_heads(layers: Sequence[compat.AttentionLayer], dtype: torch.dtype, kv_dtype: torch.dtype) -> Heads | None:
    """Heads of a model whose attention our kernel serves; None: it does not."""
    first = layers[0]
    serves = (
        kv_dtype == dtype in (torch.float16, torch.bfloat16)
        and first.head_dim == first.v_head_dim in kernels.HEAD_DIMS
        and first.num_qo_heads // first.num_kv_heads <= kernels.ATTEND_COLUMNS
        and all(_shape(layer) == _shape(first) and not layer.logit_cap for layer in layers)
    )
    return Heads(first.num_qo_heads, first.num_kv_heads, first.head_dim) if serves else None


def _shape(layer: compat.AttentionLayer) -> tuple[int, int, int, int]:
    return layer.num_qo_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim
