"""CUDA graphs of a decode server that offloads: for each batch size one without and one with round trips.

The paper keys its graphs by batch size and by offloaded batch size. Here rows without a lane cost the exchanging
kernels next to nothing and lanes are read from device memory, so the second dimension has two values.
"""

from __future__ import annotations

from typing import Any

EXCHANGE = "exchange"
"""Variant label of the graphs with round trips."""


def make_graph_runner(base: type) -> type:
    """The class that takes the place of `base` (SGLang's DecodeCudaGraphRunner); its attention backend is ours."""

    class OffloadGraphRunner(base):
        _exchanges: bool | None = None
        """Of the batch that is being replayed, once it was staged."""

        def capture_one_shape(
            self, size: int, forward: Any, stream_idx: int | None = None, variant_label: str | None = None
        ) -> None:
            super().capture_one_shape(size, forward, stream_idx, variant_label)
            with self.attn_backend.recording_exchange():
                super().capture_one_shape(size, forward, stream_idx, EXCHANGE)

        def load_batch(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
            self._exchanges = self.attn_backend.stage(forward_batch)
            try:
                super().load_batch(forward_batch, pp_proxy_tensors)
            finally:
                self._exchanges = None

        def _resolve_lora_variant(self, forward_batch: Any) -> str | None:
            # Upstream asks before a replay, to see if there is a graph, and while it loads the batch.
            exchanges = self._exchanges
            if exchanges is None:
                exchanges = self.attn_backend.exchanges(forward_batch)
            return EXCHANGE if exchanges else super()._resolve_lora_variant(forward_batch)

    return OffloadGraphRunner
