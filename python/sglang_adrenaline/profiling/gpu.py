"""Times the work of a model on this GPU: matrices, decode's attention, and executor and prefill side by side.

Every measurement is a CUDA graph that is replayed, timed by events: what a decode step costs inside SGLang's graphs.
The round trip between two GPUs is `benchmark/gpu_channel.py`'s business; data sheet figures stand in for it here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_adrenaline.attention.shared_runs import Run
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import DEVICES, ModelFigures, known_device
from sglang_adrenaline.prefill.executor import LayerKV
from sglang_adrenaline.prefill.lane_attention import LaneAttention
from sglang_adrenaline.profile_data import ShareFigures, TripPoint, datasheet_profile

MOST_BYTES = 24 << 30
REPLAYS = 10
SIDE_S = 0.15
"""How long executor and prefill are kept busy side by side."""
WORKSPACE_BYTES = 256 << 20
PREFILL_ROWS = 2048


@dataclass(frozen=True)
class Work:
    """A captured graph, the stream it is replayed on, and how long a replay takes with the GPU to itself."""

    graph: torch.cuda.CUDAGraph
    stream: torch.cuda.Stream
    alone_s: float


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
        self._most_bytes = min(MOST_BYTES, properties.total_memory // 4)
        layer_bytes = model.layer_parameters * model.weight_bytes_each
        self._layers = max(min(model.num_layers, self._most_bytes // layer_bytes), 1)
        self._weights = [[self._random(*shape) for shape in model.matrices] for _ in range(self._layers)]
        self._head = self._random(model.vocab_size, model.hidden_size)
        self._widths = {model.hidden_size} | {columns for _, columns in model.matrices}
        self.notes = [
            f"{dtype}; matrices and attention in CUDA graphs",
            "round trip, transfer and step_fixed_s are data sheet figures",
        ]

    def linear_s(self, rows: int) -> float:
        last = self._random(min(rows, 256), self._model.hidden_size)
        head_s = self._work(lambda: torch.nn.functional.linear(last, self._head)).alone_s
        return self._work(self._products(rows)).alone_s * self._model.num_layers / self._layers + head_s

    def attention_s(self, rows: int, context: int) -> float:
        attend, layers = self._attention(rows, context)
        return self._work(attend).alone_s * self._model.num_layers / layers

    def prefill_attention_s(self, tokens: int) -> float:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        model = self._model
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(self._workspace(), "NHD")
        indptr = torch.tensor([0, tokens], dtype=torch.int32, device=self._device)
        heads = (model.num_qo_heads, model.num_kv_heads, model.head_dim)
        wrapper.plan(indptr, indptr, *heads, causal=True, q_data_type=self._dtype, kv_data_type=self._dtype)
        q = self._random(tokens, model.num_qo_heads, model.head_dim)
        k, v = (self._random(tokens, model.num_kv_heads, model.head_dim) for _ in "kv")
        return self._work(lambda: wrapper.run(q, k, v)).alone_s * model.num_layers

    def shares(self) -> list[ShareFigures]:
        """For each part of the SMs the executor on it and prefill's products on the others, both busy all the time:
        they share the GPU's memory and power, so each is slower than alone on these SMs."""
        from sglang_adrenaline.prefill.sm_partition import SmPartition

        context = 512
        tokens = self.attention_rows * context
        pools = self._pools(tokens)
        products = self._products(PREFILL_ROWS)
        whole_s = self._work(products).alone_s
        read_bytes = tokens * self._model.kv_token_bytes * len(pools) / self._model.num_layers
        points = []
        for count in self._sm_counts:
            if not 0 < count < self._sms:
                continue
            partition = SmPartition(self._index, count)
            stream = partition.take_executor_stream()
            # It holds what its graph reads.
            attend = self._own(pools, self.attention_rows, context, partition.executor_sms, stream)
            executor = self._work(attend, stream)
            prefill = self._work(products, partition.prefill_stream())
            attention_s, prefill_s = side_by_side_s(executor, prefill)
            points.append(
                ShareFigures(
                    share=partition.executor_sms / self._sms,
                    attention_bytes_s=read_bytes / attention_s,
                    prefill_factor=min(whole_s / prefill_s, 1.0),
                )
            )
        distinct = {point.share: point for point in points}  # counts are rounded up, so two may be the same
        if not distinct:
            raise ConfigError(f"none of {self._sm_counts} is a part of this GPU's {self._sms} SMs")
        return [distinct[share] for share in sorted(distinct)]

    def round_trip(self) -> list[TripPoint]:
        return self._trips

    # ---- work --------------------------------------------------------------------------------------------------------

    def _products(self, rows: int) -> Callable[[], None]:
        """Every matrix of the layers held, once."""
        inputs = {width: self._random(rows, width) for width in self._widths}

        def run() -> None:
            for matrices in self._weights:
                for matrix in matrices:
                    torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)

        return run

    def _attention(self, rows: int, context: int) -> tuple[Callable[[], None], int]:
        """Decode attention, planned, and how many layers of it: each over a pool of its own, so that no cache helps.

        By the kernel that a decode server takes (`attention/local_rows.py`): ours where query heads share KV heads.
        """
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        model = self._model
        slots = rows * context
        if model.num_qo_heads > model.num_kv_heads:
            pools = self._pools(slots)
            return self._own(pools, rows, context, self._sms, torch.cuda.current_stream(self._device)), len(pools)
        pools = [(k.unsqueeze(1), v.unsqueeze(1)) for k, v in self._pools(slots)]
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._workspace(),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=model.num_qo_heads // model.num_kv_heads >= 4,
            paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=self._device),
            paged_kv_indices_buffer=torch.zeros(slots, dtype=torch.int32, device=self._device),
            paged_kv_last_page_len_buffer=torch.ones(rows, dtype=torch.int32, device=self._device),
        )
        wrapper.plan(
            torch.arange(rows + 1, dtype=torch.int32) * context,
            torch.arange(slots, dtype=torch.int32, device=self._device),
            torch.ones(rows, dtype=torch.int32),
            model.num_qo_heads,
            model.num_kv_heads,
            model.head_dim,
            1,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        q = self._random(rows, model.num_qo_heads, model.head_dim)

        def run() -> None:
            for pool in pools:
                wrapper.run(q, pool, return_lse=True)

        return run, len(pools)

    def _own(
        self,
        pools: Sequence[tuple[torch.Tensor, torch.Tensor]],
        rows: int,
        context: int,
        sms: int,
        stream: torch.cuda.Stream,
    ) -> Callable[[], None]:
        """Our kernel's attention on a stream of so many SMs, planned: a layer of each pool, nothing shared."""
        layers = [LayerKV(k, v, self._model.head_dim**-0.5, 0.0) for k, v in pools]
        q = self._random(rows, self._model.num_qo_heads, self._model.head_dim)
        o, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=self._device)
        attention = LaneAttention(
            layers, lanes=rows, num_qo_heads=q.shape[1], dtype=q.dtype, capacity=rows * context, sms=sms
        )
        slots = torch.arange(rows * context, dtype=torch.int32, device=self._device).view(rows, context)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(stream):
            attention.plan([Run((row,), 0, context) for row in range(rows)], dict(enumerate(slots)))

        def run() -> None:
            for layer in range(len(layers)):
                attention.run(layer, q, o, lse)

        return run

    def _pools(self, slots: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [slots, KV heads, head_dim] of as many layers as fit."""
        model = self._model
        layer_bytes = 2 * slots * model.num_kv_heads * model.head_dim * model.kv_bytes_each
        layers = max(min(model.num_layers, self._most_bytes // layer_bytes), 1)

        def values() -> torch.Tensor:
            return self._random(slots, model.num_kv_heads, model.head_dim)

        return [(values(), values()) for _ in range(layers)]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device, dtype=self._dtype)

    def _workspace(self) -> torch.Tensor:
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)

    def _work(self, run: Callable[[], object], stream: torch.cuda.Stream | None = None) -> Work:
        """`run` captured on `stream` (its SMs; None: all) and timed: the mean of REPLAYS."""
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
        return Work(graph, stream, begin.elapsed_time(end) / 1e3 / REPLAYS)


def side_by_side_s(one: Work, other: Work) -> tuple[float, float]:
    """Medians of a replay of each while both are busy all the time."""
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    origin.synchronize()
    works = (one, other)
    events: tuple[list[list[torch.cuda.Event]], ...] = ([], [])
    counts = [math.ceil(SIDE_S / work.alone_s) + 2 for work in works]
    launched = [0, 0]
    while any(done < count for done, count in zip(launched, counts, strict=True)):
        # Whose queue is shorter goes first, so that neither runs dry while the other one's is filled.
        side = min((0, 1), key=lambda n: launched[n] / counts[n])
        work = works[side]
        with torch.cuda.stream(work.stream):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record(work.stream)
            work.graph.replay()
            pair[1].record(work.stream)
        events[side].append(pair)
        launched[side] += 1
    torch.cuda.synchronize()
    spans = [[(origin.elapsed_time(a) / 1e3, origin.elapsed_time(b) / 1e3) for a, b in side] for side in events]
    return medians_of_overlap(spans[0], spans[1])


Spans = Sequence[tuple[float, float]]
"""(begin, end) of replays that follow each other, seconds."""


def medians_of_overlap(one: Spans, other: Spans) -> tuple[float, float]:
    """Median length of those replays of each that lie within what both cover. Raises ConfigError if there are none."""
    begin, end = max(one[0][0], other[0][0]), min(one[-1][1], other[-1][1])
    inside = [[b - a for a, b in spans if a >= begin and b <= end] for spans in (one, other)]
    if not all(inside):
        raise ConfigError("executor and prefill did not run side by side: is something else running on this GPU?")
    return statistics.median(inside[0]), statistics.median(inside[1])
