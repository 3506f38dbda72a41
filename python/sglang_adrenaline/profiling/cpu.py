"""Times the work of a model on this CPU: matrices, our ragged attention, the shm channel.

Times are processor time divided by the threads, the least of several runs: on an idle machine that is wall time, and on
a busy one it can still be compared. Only the round trip is wall time.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event

import torch

from sglang_adrenaline import cpu_info
from sglang_adrenaline.attention.prefill import attend_causal
from sglang_adrenaline.attention.ragged import RaggedPlan, attend
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import ModelFigures
from sglang_adrenaline.profile_data import ShareFigures, TripPoint
from sglang_adrenaline.profiling.machine import CONTEXT
from sglang_adrenaline.profiling.round_trip import measure_shm

MOST_BYTES = 1 << 30
"""Of weights or KV that are held at once; a model with more is measured in part and scaled."""
SIDE_DEADLINE_S = 120.0


def least_s(run: Callable[[], object], budget_s: float, threads: int) -> float:
    """Shortest time of a call, after one to warm up, within about `budget_s` of wall time (at least two calls)."""
    run()
    times: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times) < 2 or (len(times) < 50 and time.perf_counter() < deadline):
        begun = time.process_time()
        run()
        times.append((time.process_time() - begun) / threads)
    return max(min(times), 1e-9)


class CpuMachine:
    """See `machine.Machine`. threads: of one server."""

    attention_rows = 8
    linear_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    step_fixed_s = 0.0

    def __init__(self, model: ModelFigures, dtype: str, threads: int, budget_s: float) -> None:
        torch.set_num_threads(threads)
        self._model, self._dtype, self._threads, self._budget_s = model, dtype, threads, budget_s
        self._torch_dtype = getattr(torch, dtype)
        self.device = cpu_info.device_name()
        self.memory_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        layer_bytes = model.layer_parameters * model.weight_bytes_each
        self._layers = max(min(model.num_layers, MOST_BYTES // layer_bytes), 1)
        self._weights = [
            [torch.randn(shape).to(self._torch_dtype) for shape in model.matrices] for _ in range(self._layers)
        ]
        self._head = torch.randn(model.vocab_size, model.hidden_size).to(self._torch_dtype)
        self._widths = {model.hidden_size} | {columns for _, columns in model.matrices}
        self._kv = _Kv(model, self._torch_dtype)
        self.overhead_layer_s = 0.0
        block = torch.empty(1 << 24)
        copy_s = least_s(lambda: block.clone(), budget_s, threads)
        self.transfer_bytes_s = block.nbytes / copy_s
        self.notes = [
            f"{threads} threads, {dtype}; matrices and attention alone: norms, sampling and Python are not in it",
            "transfer: one copy in memory",
        ]

    def linear_s(self, rows: int) -> float:
        inputs = {width: torch.randn(rows, width).to(self._torch_dtype) for width in self._widths}

        def layers() -> None:
            for matrices in self._weights:
                for matrix in matrices:
                    torch.nn.functional.linear(inputs[matrix.shape[1]], matrix)

        last = inputs[self._model.hidden_size][: min(rows, 64)]  # a prompt's other tokens need no logits
        head_s = least_s(lambda: torch.nn.functional.linear(last, self._head), self._budget_s / 4, self._threads)
        return least_s(layers, self._budget_s, self._threads) * self._model.num_layers / self._layers + head_s

    def attention_s(self, rows: int, context: int) -> float:
        return self._kv.attention_s(rows, context, self._budget_s, self._threads) * self._scale()

    def prefill_attention_s(self, tokens: int) -> float:
        model = self._model
        q = torch.randn(tokens, model.num_qo_heads, model.head_dim).to(self._torch_dtype)
        k, v = (torch.randn(tokens, model.num_kv_heads, model.head_dim).to(self._torch_dtype) for _ in "kv")
        none = torch.empty(0, dtype=torch.int64)
        scale = model.head_dim**-0.5
        one = least_s(lambda: attend_causal(q, k, v, k, v, none, sm_scale=scale), self._budget_s, self._threads)
        return one * model.num_layers

    def shares(self) -> list[ShareFigures]:
        """One point: an executor with as many threads as this server, in a process of its own, while prefill runs."""
        alone = self.linear_s(256)
        context = multiprocessing.get_context("spawn")
        results, sender = context.Pipe(duplex=False)
        ready, stop = context.Event(), context.Event()
        process = context.Process(
            target=_attend_until, args=(self._model, self._dtype, self._threads, ready, stop, sender), daemon=True
        )
        process.start()
        sender.close()
        try:
            if not ready.wait(SIDE_DEADLINE_S):
                raise ConfigError("the attention executor's process did not start in time")
            beside = self.linear_s(256)
            stop.set()
            if not results.poll(SIDE_DEADLINE_S):
                raise ConfigError("the attention executor's process gave no result")
            bytes_s = results.recv() / self._scale()
        except EOFError:
            raise ConfigError("the attention executor's process ended early") from None
        finally:
            stop.set()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)
        return [ShareFigures(share=0.5, attention_bytes_s=bytes_s, prefill_factor=min(alone / beside, 1.0))]

    def round_trip(self) -> list[TripPoint]:
        model = self._model
        seconds = measure_shm(model.num_layers, model.num_qo_heads, model.head_dim, self._dtype, [1, 8, 32])
        return [TripPoint(rows=rows, seconds=seconds[rows]) for rows in sorted(seconds)]

    def _scale(self) -> float:
        return self._model.num_layers / self._kv.layers


class _Kv:
    """Pools of several layers, so that none finds its KV in a cache that a real step would not have warm."""

    def __init__(self, model: ModelFigures, dtype: torch.dtype) -> None:
        slots = 8 * CONTEXT + 64
        layer_bytes = 2 * slots * model.num_kv_heads * model.head_dim * model.kv_bytes_each
        self.model, self.dtype = model, dtype
        self.layers = max(min(model.num_layers, MOST_BYTES // layer_bytes), 1)
        shape = (slots, model.num_kv_heads, model.head_dim)
        self._pools = [tuple(torch.randn(shape).to(dtype) for _ in "kv") for _ in range(self.layers)]

    def attention_s(self, rows: int, context: int, budget_s: float, threads: int) -> float:
        """Of the layers held; rows * context must fit into the pools."""
        plan = RaggedPlan.from_slots([torch.arange(row * context, (row + 1) * context) for row in range(rows)])
        q = torch.randn(rows, self.model.num_qo_heads, self.model.head_dim).to(self.dtype)
        scale = self.model.head_dim**-0.5

        def step() -> None:
            for k, v in self._pools:
                attend(q, k, v, plan, sm_scale=scale)

        return least_s(step, budget_s, threads)


def _attend_until(
    model: ModelFigures, dtype: str, threads: int, ready: Event, stop: Event, results: Connection
) -> None:
    torch.set_num_threads(threads)
    kv = _Kv(model, getattr(torch, dtype))
    best_s = kv.attention_s(8, CONTEXT, 0.2, threads)
    ready.set()
    deadline = time.monotonic() + SIDE_DEADLINE_S
    while not stop.is_set() and time.monotonic() < deadline:
        best_s = kv.attention_s(8, CONTEXT, 0.2, threads)
    results.send(8 * CONTEXT * model.kv_token_bytes / best_s)
