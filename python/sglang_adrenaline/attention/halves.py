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
from typing import TYPE_CHECKING, Any

import torch

from sglang_adrenaline import compat
from sglang_adrenaline.attention.turns import HandOver, take_turns

if TYPE_CHECKING:
    from sglang_adrenaline.attention.local_rows import LocalRows


def _nobody() -> None:
    raise RuntimeError("a half hands over outside of a pass")


@dataclass(eq=False)
class Half:
    """One half of the graphs of a size, with the attention of its rows."""

    index: int
    rows: slice
    local: LocalRows
    hand_over: HandOver = _nobody
    """Let the other half go on; returns when it is this one's turn again."""

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


def make_halves(size: int, local_rows: Callable[[slice], LocalRows]) -> tuple[Half, Half]:
    """For graphs of `size` rows; local_rows: makes the attention of these rows of a batch."""
    first, second = slice(0, size // 2), slice(size // 2, size)
    return Half(0, first, local_rows(first)), Half(1, second, local_rows(second))


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
