"""CUDA graphs of a decode server that offloads: for each batch size one without and one with round trips, and for large
ones a third in which the batch runs as two halves.

The paper keys its graphs by batch size and by offloaded batch size. Here rows without a lane cost the exchanging
kernels next to nothing and lanes are read from device memory, so the second dimension has these values only.
"""

from __future__ import annotations

import bisect
from typing import Any

from sglang_adrenaline.attention.offload_flashinfer import Exchange

_LABELS = {Exchange.WHOLE: "exchange", Exchange.HALVES: "halves"}
"""Variant labels of the graphs with round trips."""


def make_graph_runner(base: type) -> type:
    """The class that takes the place of `base` (SGLang's DecodeCudaGraphRunner); its attention backend is ours."""

    class OffloadGraphRunner(base):
        _staged: Exchange | None = None
        """Of the batch that is being replayed, once it was staged."""

        def capture_one_shape(
            self, size: int, forward: Any, stream_idx: int | None = None, variant_label: str | None = None
        ) -> None:
            backend = self.attn_backend
            super().capture_one_shape(size, forward, stream_idx, variant_label)
            with backend.recording(Exchange.WHOLE):
                super().capture_one_shape(size, forward, stream_idx, _LABELS[Exchange.WHOLE])
            if backend.splits(size) and not self.enable_torch_compile:
                in_halves = backend.in_halves(forward, size)
                with backend.recording(Exchange.HALVES):
                    super().capture_one_shape(size, in_halves, stream_idx, _LABELS[Exchange.HALVES])

        def load_batch(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
            self._staged = self.attn_backend.stage(forward_batch, self._size_for(forward_batch.batch_size))
            try:
                super().load_batch(forward_batch, pp_proxy_tensors)
            finally:
                self._staged = None

        def _size_for(self, batch_size: int) -> int:
            return int(self.capture_bs[bisect.bisect_left(self.capture_bs, batch_size)])

        def _resolve_lora_variant(self, forward_batch: Any) -> str | None:
            # Upstream asks before a replay, to see if there is a graph, and while it loads the batch.
            exchange = self._staged
            if exchange is None:
                exchange = Exchange.WHOLE if self.attn_backend.exchanges(forward_batch) else Exchange.NONE
            return _LABELS.get(exchange) or super()._resolve_lora_variant(forward_batch)

    return OffloadGraphRunner
