"""A decode batch as two halves whose passes take turns at every layer, recorded into one CUDA graph on one stream.

    first half   .. qkv, put | attend(l-1) merge o mlp qkv | put ..
    second half              | put ..                      | attend(l-1) merge o mlp qkv, put ..

Between a half's put and its merge lies the other half's whole turn and its own local attention, so remote attention
hides under all that decode does, and an executor always has the queries of one half while decode works on the other.
What it costs: each half reads the weights, in more and smaller kernels than a whole (`cost_model.HALVES_LAYER_S`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan

from sglang_adrenaline import compat
from sglang_adrenaline.attention.turns import HandOver, take_turns

if TYPE_CHECKING:
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend


def _nobody() -> None:
    raise RuntimeError("a half hands over outside of a pass")


@dataclass(eq=False)
class Half:
    """One half of the graphs of a size. wrapper: FlashInfer's; indptr: int32 [rows + 1], what it was planned with."""

    index: int
    rows: slice
    wrapper: Any
    indptr: torch.Tensor
    hand_over: HandOver = _nobody
    """Let the other half go on; returns when it is this one's turn again."""

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    def planned(self) -> None:
        """After each plan: from the first one on, as upstream does, the plan needs no look at the device."""
        self.wrapper.begin_forward = partial(fast_decode_plan, self.wrapper)


def make_halves(backend: FlashInferAttnBackend, size: int) -> tuple[Half, Half]:
    """For graphs of `size` rows. Both share what the backend's graphs share, since only one runs at a time."""
    middle = size // 2
    indices = backend.cuda_graph_kv_indices[0]
    cut = middle * backend.max_context_len

    def half(index: int, rows: slice, part: torch.Tensor) -> Half:
        count = rows.stop - rows.start
        indptr = torch.zeros(count + 1, dtype=torch.int32, device=indices.device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            backend.workspace_buffer,
            "NHD",
            backend=backend.decode_backend,
            use_cuda_graph=True,
            use_tensor_cores=backend.decode_use_tensor_cores,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=part,
            paged_kv_last_page_len_buffer=backend.kv_last_page_len[:count],
        )
        return Half(index, rows, wrapper, indptr)

    return half(0, slice(0, middle), indices[:cut]), half(1, slice(middle, size), indices[cut:])


def run_in_turns(
    forward: Callable[..., Any], halves: tuple[Half, Half], enter: Callable[[Half | None], None]
) -> Callable[..., Any]:
    """The model's `forward(input_ids, positions, forward_batch)` as passes over the halves, outputs joined.

    enter: called when a half begins its pass, and with None when both are over.
    """

    def run(input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, **kwargs: Any) -> Any:
        stream = torch.cuda.current_stream()
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def over(half: Half) -> Callable[[HandOver], Any]:
            def go(hand_over: HandOver) -> Any:
                half.hand_over = hand_over
                enter(half)
                # Streams and modes are a thread's own.
                with (
                    torch.cuda.device(stream.device),
                    torch.cuda.stream(stream),
                    torch.inference_mode(inference),
                    torch.set_grad_enabled(grad),
                ):
                    part = compat.batch_rows(forward_batch, half.rows)
                    return forward(input_ids[half.rows], positions[half.rows], part, **kwargs)

            return go

        try:
            outputs = take_turns(over(halves[0]), over(halves[1]))
        finally:
            enter(None)
        return compat.joined_outputs(*outputs)

    return run
