"""Times the work of a model on this GPU: matrices, FlashInfer's decode attention, both on parts of the SMs.

Every measurement is a CUDA graph that is replayed, timed by events: what a decode step costs inside SGLang's graphs.
The round trip between two GPUs is `benchmark/gpu_channel.py`'s business; data sheet figures stand in for it here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import DEVICES, ModelFigures, known_device
from sglang_adrenaline.profile_data import ShareFigures, TripPoint, datasheet_profile

MOST_BYTES = 24 << 30
REPLAYS = 10
WORKSPACE_BYTES = 256 << 20
PREFILL_ROWS = 2048


class GpuMachine:
    """See `machine.Machine`. sm_counts: parts of the GPU that executors are measured on."""

    attention_rows = 128
    linear_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    step_fixed_s = 3e-4

    def __init__(self, model: ModelFigures, dtype: str, device: int, sm_counts: list[int]) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("no CUDA device is available")
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        self._model, self._dtype, self._index = model, getattr(torch, dtype), device
        self._device = torch.device("cuda", device)
        self._sms, self._sm_counts = properties.multi_processor_count, sm_counts
        self.device = properties.name
        self.memory_bytes = float(properties.total_memory)
        sheet = datasheet_profile(known_device(self.device), model)
        self._trips, self.overhead_layer_s = sheet.round_trip, sheet.overhead_layer_s
        self.transfer_bytes_s = DEVICES[known_device(self.device)].peer_bytes_s * 0.85
        layer_bytes = model.layer_parameters * model.weight_bytes_each
        self._layers = max(min(model.num_layers, MOST_BYTES // layer_bytes), 1)
        self._weights = [[self._random(*shape) for shape in model.matrices] for _ in range(self._layers)]
        self._head = self._random(model.vocab_size, model.hidden_size)
        self._widths = {model.hidden_size} | {columns for _, columns in model.matrices}
        self.notes = [
            f"{dtype}; matrices and attention in CUDA graphs",
            "round trip, transfer and step_fixed_s are data sheet figures",
        ]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype)

    def linear_s(self, rows: int, stream: torch.cuda.Stream | None = None) -> float:
        inputs = {width: self._random(rows, width) for width in self._widths}

        def layers() -> None:
            for matrices in self._weights:
                for matrix in matrices:
                    torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)

        last = inputs[self._model.hidden_size][: min(rows, 256)]
        head_s = self._graph_s(lambda: torch.nn.functional.linear(last, self._head), stream)
        return self._graph_s(layers, stream) * self._model.num_layers / self._layers + head_s

    def attention_s(self, rows: int, context: int, stream: torch.cuda.Stream | None = None) -> float:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        model = self._model
        slots = rows * context
        layer_bytes = 2 * slots * model.num_kv_heads * model.head_dim * model.kv_bytes_each
        layers = max(min(model.num_layers, MOST_BYTES // layer_bytes), 1)
        pools = [tuple(self._random(slots, 1, model.num_kv_heads, model.head_dim) for _ in "kv") for _ in range(layers)]
        indptr = torch.arange(rows + 1, dtype=torch.int32) * context
        last_page = torch.ones(rows, dtype=torch.int32)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=model.num_qo_heads // model.num_kv_heads >= 4,
            paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=self._device),
            paged_kv_indices_buffer=torch.zeros(slots, dtype=torch.int32, device=self._device),
            paged_kv_last_page_len_buffer=torch.ones(rows, dtype=torch.int32, device=self._device),
        )
        wrapper.plan(
            indptr,
            torch.arange(slots, dtype=torch.int32, device=self._device),
            last_page,
            model.num_qo_heads,
            model.num_kv_heads,
            model.head_dim,
            1,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        q = self._random(rows, model.num_qo_heads, model.head_dim)

        def step() -> None:
            for pool in pools:
                wrapper.run(q, pool, return_lse=True)

        return self._graph_s(step, stream) * model.num_layers / layers

    def prefill_attention_s(self, tokens: int) -> float:
        from flashinfer import single_prefill_with_kv_cache

        model = self._model
        q = self._random(tokens, model.num_qo_heads, model.head_dim)
        k, v = (self._random(tokens, model.num_kv_heads, model.head_dim) for _ in "kv")
        return self._graph_s(lambda: single_prefill_with_kv_cache(q, k, v, causal=True)) * model.num_layers

    def shares(self) -> list[ShareFigures]:
        """Each part of the SMs by itself: executor on it, prefill on the others. They share memory bandwidth."""
        from sglang_adrenaline.prefill.sm_partition import SmPartition

        model, whole_s = self._model, self.linear_s(PREFILL_ROWS)
        points = []
        for count in self._sm_counts:
            if not 0 < count < self._sms:
                continue
            partition = SmPartition(self._index, count)
            attention_s = self.attention_s(self.attention_rows, 512, partition.take_executor_stream())
            prefill_s = self.linear_s(PREFILL_ROWS, partition.prefill_stream())
            points.append(
                ShareFigures(
                    share=partition.executor_sms / self._sms,
                    attention_bytes_s=self.attention_rows * 512 * model.kv_token_bytes / attention_s,
                    prefill_factor=min(whole_s / prefill_s, 1.0),
                )
            )
        distinct = {point.share: point for point in points}  # counts are rounded up, so two may be the same
        if not distinct:
            raise ConfigError(f"none of {self._sm_counts} is a part of this GPU's {self._sms} SMs")
        return [distinct[share] for share in sorted(distinct)]

    def round_trip(self) -> list[TripPoint]:
        return self._trips

    def _graph_s(self, run: Callable[[], object], stream: torch.cuda.Stream | None = None) -> float:
        """Mean time of a replay of `run`, captured on `stream` (its SMs)."""
        stream = stream or torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()  # kernels are loaded and tuned outside the capture
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            begin.record(stream)
            for _ in range(REPLAYS):
                graph.replay()
            end.record(stream)
            end.synchronize()
        return begin.elapsed_time(end) / 1e3 / REPLAYS
