"""Attention of a decode server that offloads, on a GPU: over the suffix here, and the round trip of a layer.

Runs in the decode scheduler's process, inside the forward pass and inside its CUDA graphs. Per layer: queries of all
rows that have a lane are stored into the buffers of their executors, FlashInfer or our kernel (`local_rows.py`) attends
over [P, n) of every row, then one kernel waits for the answers and merges them in place. What differs from step to step
is in device memory (places of the rows, the channels' endpoints), so a graph serves any set of offloaded requests on
any links.

A step is staged before it is planned (`stage`), by the graph runner for a replay and by `init_forward_metadata` for a
pass without a graph; plan and kernels then find the positions from which they attend here.

Large batches run as two halves (`halves.py`): after the queries of one half are out, the other half is worked on until
its queries are. So an executor has all of decode's work on the other half to hide under, not local attention alone.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from sglang.srt.layers.attention.flashinfer_backend import DecodeMetadata, FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_adrenaline import compat, kernels
from sglang_adrenaline.attention.halves import Half, make_halves, run_in_turns
from sglang_adrenaline.attention.local_rows import (
    KERNEL_FROM_ROWS,
    PLAN_WAIT_S,
    FlashInferRows,
    KernelRows,
    LocalRows,
    Span,
    kernel_heads,
)
from sglang_adrenaline.attention.planned import Heads, Workspace
from sglang_adrenaline.channel.calls import StepCalls, calls_of
from sglang_adrenaline.channel.ipc import IpcDecodeEnd
from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoints
from sglang_adrenaline.cuda_wait import await_event
from sglang_adrenaline.decode.runtime import DecodeRuntime
from sglang_adrenaline.decode.table import StepPlan
from sglang_adrenaline.errors import ConfigError, PeerLostError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from torch import Tensor


class Exchange(enum.Enum):
    """What a step has to do with channels: none takes part, it runs as a whole, it runs as two halves."""

    NONE = enum.auto()
    WHOLE = enum.auto()
    HALVES = enum.auto()


@dataclass(frozen=True)
class StagedStep:
    """starts: int64 [batch], CPU, first position of each row that is attended here."""

    starts: Tensor
    exchange: Exchange


class OffloadFlashInferBackend(FlashInferAttnBackend):
    """`_staged` is the step that is planned next, None if all its rows are local.

    `_exchange` says what the pass does that is under way, or recorded; `_half` which half of it, None for a whole;
    `_local` is the attention of a whole one's rows. A pass that needs nothing of ours is upstream's.
    """

    def __init__(self, model_runner: ModelRunner, runtime: DecodeRuntime) -> None:
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace)
        self._runtime = runtime
        self._device = torch.device("cuda", model_runner.gpu_id)
        self._words = runtime.attach_endpoints(IpcEndpoints(model_runner.gpu_id)).words
        capacity = self.kv_last_page_len.shape[0]
        self._rows = torch.arange(capacity, dtype=torch.int32, device=self._device)
        self._places = torch.full((capacity,), -1, dtype=torch.int32, device=self._device)
        layers = model_runner.model_config.num_attention_layers
        self._calls = StepCalls(layers, calls_of(layers, "cuda"))
        splits = self._calls.halves and model_runner.server_args.tp_size == 1
        splits = splits and compat.is_dense(model_runner.model_config)
        self._halves_from = runtime.halves_from = runtime.config.halves_from if splits else 0
        self._halves: dict[int, tuple[Half, Half]] = {}
        """By size of the graph."""
        self._half: Half | None = None
        self._staged: StagedStep | None = None
        self._exchange = Exchange.NONE
        self._local: LocalRows | None = None
        self._heads = _own_heads(runtime.config.decode_attention, model_runner, self.token_to_kv_pool.dtype)
        """Of a model whose graphs hold our own kernel; None: they hold FlashInfer's."""
        self._workspace: Workspace | None = None
        self._kernel_rows: KernelRows | None = None
        """Of the rows of graphs that run as a whole."""
        self._plan_copied = torch.cuda.Event()
        """After the last plan's copies."""
        self._plan_whole = self.indices_updater_decode.update
        self.indices_updater_decode.update = self._plan

    # ---- steps ------------------------------------------------------------------------------------------------------

    def stage(self, forward_batch: ForwardBatch, graph_size: int = 0) -> Exchange:
        """Make this decode batch the step that is planned next. graph_size: of the graph that it runs in, 0 for none.

        On the model's stream, once a step: it announces the step to the executors that hold prefixes of its rows.
        """
        plan = self._runtime.table.plan(forward_batch.rids or ())
        self._staged = None
        if plan is None:
            return Exchange.NONE
        halves = self._halves.get(graph_size) if self._runtime.halves_pay else None
        self._staged = StagedStep(plan.starts, self._begin(plan, halves))
        return self._staged.exchange

    def exchanges(self, forward_batch: ForwardBatch) -> bool:
        """Whether the step of this batch would need a channel; announces nothing."""
        return self._runtime.table.any_remote(forward_batch.rids or ())

    @contextmanager
    def recording(self, exchange: Exchange) -> Iterator[None]:
        """Graphs captured inside hold the round trips."""
        self._exchange = exchange
        try:
            yield
        finally:
            self._exchange = Exchange.NONE

    def splits(self, graph_size: int) -> bool:
        """Whether steps in graphs of this size may run as two halves."""
        return 0 < self._halves_from <= graph_size

    def in_halves(self, forward: Callable[..., Any], graph_size: int) -> Callable[..., Any]:
        """The model's forward pass over a batch of this size, as passes over its halves in turn."""
        if graph_size not in self._halves:
            self._halves[graph_size] = make_halves(graph_size, self._rows_of_a_half)

        def enter(half: Half | None) -> None:
            self._half = half

        return run_in_turns(forward, self._halves[graph_size], enter)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, kv_indices_buf: Tensor | None = None) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        if self._heads is not None:
            self._workspace = Workspace.make(max_bs, self._heads, self._device)
            self._kernel_rows = self._make_kernel_rows(max_bs, self.cuda_graph_kv_indices[0])

    def _rows_of_a_half(self, rows: slice) -> LocalRows:
        """They share what the graphs' rows share, since only one graph runs at a time."""
        count, context = rows.stop - rows.start, self.max_context_len
        slots = self.cuda_graph_kv_indices[0][rows.start * context : rows.stop * context]
        if self._heads is not None:
            return self._make_kernel_rows(count, slots)
        indptr = torch.zeros(count + 1, dtype=torch.int32, device=self._device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self.workspace_buffer,
            "NHD",
            backend=self.decode_backend,
            use_cuda_graph=True,
            use_tensor_cores=self.decode_use_tensor_cores,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=slots,
            paged_kv_last_page_len_buffer=self.kv_last_page_len[:count],
        )
        return FlashInferRows(wrapper, indptr, self.indices_updater_decode, self.token_to_kv_pool, fast_plans=True)

    def _make_kernel_rows(self, rows: int, slots: Tensor) -> KernelRows:
        assert self._heads is not None and self._workspace is not None
        return KernelRows(
            rows, self._heads, self._workspace, slots, self.req_to_token_pool.req_to_token, self.token_to_kv_pool
        )

    def _begin(self, plan: StepPlan, halves: tuple[Half, Half] | None) -> Exchange:
        # Rows of a padded graph beyond the batch have no place.
        places = torch.full(self._places.shape, -1, dtype=torch.int32, pin_memory=True)
        first = [sum(row < halves[0].size for row in part.rows) if halves else None for part in plan.parts]
        # A link takes part in a step from its first call on, so it needs rows in the first half.
        if not all(first):
            first = [None] * len(first)
        begun = False
        for part, in_first in zip(plan.parts, first, strict=True):
            link = self._runtime.link(part.link)
            channel = cast("IpcDecodeEnd", link.channel)
            try:
                channel.begin_step(part.lanes, in_first)
            except PeerLostError as error:
                self._runtime.step_failed(link, str(error))
                continue
            begun = True
            places[list(part.rows)] = torch.tensor(channel.places(part.lanes), dtype=torch.int32)
        if not begun:
            return Exchange.NONE
        self._places.copy_(places, non_blocking=True)
        return Exchange.WHOLE if first[0] is None else Exchange.HALVES

    # ---- planning ---------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._staged, self._exchange = None, Exchange.NONE
        if forward_batch.forward_mode.is_decode():
            self._exchange = self.stage(forward_batch)
        super().init_forward_metadata(forward_batch)

    def _prepare_cuda_graph_metadata(self, bs: int, num_tokens: int, forward_mode: Any, spec_info: Any) -> None:
        # Upstream makes new wrappers at every capture and plans only the last ones at replay: the graph captured first
        # would attend with a stale plan. Graphs of a batch size share the wrappers of the first; halves have others.
        wrappers = self.decode_cuda_graph_metadata.get(bs) if forward_mode.is_decode_or_idle() else None
        if wrappers is None:
            super()._prepare_cuda_graph_metadata(bs, num_tokens, forward_mode, spec_info)
        else:
            self.forward_metadata = DecodeMetadata(wrappers)

    def _plan(
        self,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        seq_lens_cpu: Tensor | None,
        seq_lens_sum: int,
        decode_wrappers: Any,
        encoder_lens: Tensor | None,
        spec_info: Any,
        fixed_split_size: int | None = None,
        disable_split_kv: bool | None = None,
    ) -> None:
        """Plan attention over [start, seq_len) of each row, in place of upstream's [0, seq_len).

        FlashInfer writes a plan into a pinned buffer and copies it in the stream's order. Before the next plan may
        overwrite that, the copy has to be over: it long is, unless another process has the GPU (docs/gpu-results.md).
        """
        if not await_event(self._plan_copied, PLAN_WAIT_S):
            raise RuntimeError(f"the GPU has not got to the last step's plan within {PLAN_WAIT_S:g} s")
        staged, self._staged = self._staged, None
        self._local = self._rows_of_a_whole(len(req_pool_indices), decode_wrappers)
        if staged is None and self._exchange is not Exchange.HALVES and not isinstance(self._local, KernelRows):
            self._plan_whole(
                req_pool_indices,
                seq_lens,
                seq_lens_cpu,
                seq_lens_sum,
                decode_wrappers,
                encoder_lens,
                spec_info,
                fixed_split_size,
                disable_split_kv,
            )
            self._plan_copied.record()
            return
        assert seq_lens_cpu is not None
        # A graph's batch is padded with rows of length 1.
        starts_cpu = torch.zeros(len(req_pool_indices), dtype=torch.int64, pin_memory=True)
        if staged is not None:  # else halves are being captured, or all rows are local
            starts_cpu[: len(staged.starts)] = staged.starts
        starts = starts_cpu.to(self._device, non_blocking=True)
        lens, lens_cpu = seq_lens - starts.to(seq_lens.dtype), seq_lens_cpu - starts_cpu.to(seq_lens_cpu.dtype)
        options = {"spec_info": spec_info, "fixed_split_size": fixed_split_size, "disable_split_kv": disable_split_kv}
        in_halves = self._exchange is Exchange.HALVES if staged is None else staged.exchange is Exchange.HALVES
        parts = [(slice(None), self._local)]
        if in_halves:
            parts = [(half.rows, half.local) for half in self._halves[len(req_pool_indices)]]
        for rows, local in parts:
            local.plan(Span(req_pool_indices[rows], starts[rows], lens[rows], lens_cpu[rows]), **options)
        self._plan_copied.record()

    def _rows_of_a_whole(self, size: int, wrappers: Any) -> LocalRows:
        updater = self.indices_updater_decode
        wrapper = (wrappers or updater.decode_wrappers)[0]
        if self._kernel_rows is not None and wrapper.is_cuda_graph_enabled and size >= KERNEL_FROM_ROWS:
            return self._kernel_rows
        return FlashInferRows(wrapper, updater.kv_indptr[0], updater, self.token_to_kv_pool)

    # ---- layers -----------------------------------------------------------------------------------------------------

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> Tensor:
        local = self._half.local if self._half is not None else self._local
        assert local is not None
        if self._exchange is Exchange.NONE and not isinstance(local, KernelRows):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        q = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        half, exchanging = self._half, self._exchange is not Exchange.NONE
        if half is None:
            call, places = self._calls.whole(layer.layer_id), self._places[: len(q)]
        else:
            call, places = self._calls.half(layer.layer_id, half.index), self._places[half.rows]
        rows = self._rows[: len(q)]
        if exchanging:
            kernels.put_queries(self._words, q, rows, places, call)
        if half is not None:
            half.hand_over()
            self._half = half
        if save_kv_cache and k is not None and v is not None:
            loc = KVWriteLoc(forward_batch.out_cache_loc, self.forward_metadata.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, *self._kv_write_scales(layer))
        o, lse = local.attend(q, layer)
        if exchanging:
            kernels.wait_and_merge_(self._words, o, lse, rows, places, call)
        return o.view(-1, layer.tp_q_head_num * layer.v_head_dim)


def _own_heads(wanted: str, model_runner: ModelRunner, kv_dtype: torch.dtype) -> Heads | None:
    """Heads of a model that our kernel is to serve by --adrenaline-decode-attention; None: FlashInfer serves it."""
    if wanted == "flashinfer":
        return None
    heads = kernel_heads(compat.attention_layers(model_runner), model_runner.dtype, kv_dtype)
    if wanted == "own" and heads is None:
        raise ConfigError("--adrenaline-decode-attention own: our kernel does not serve this model's attention")
    shared = heads is not None and heads.num_qo_heads > heads.kv_heads
    return heads if shared or wanted == "own" else None
