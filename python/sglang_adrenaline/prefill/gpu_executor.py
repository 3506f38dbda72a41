"""The attention executor on a GPU: a CUDA graph a decode step, launched as soon as decode's host announces the step.

Runs in a thread of the prefill scheduler's process, on a stream of its own, and reads the KV pool in place. For each
bucket of lanes one graph holds all layers of a step: wait for q, attend, put the answer; a second one does so for each
half of a step in turn, for decode servers that run steps as two halves. The thread plans only when a step names other
lanes than the last one, or a lane has other slots; otherwise a step costs one wait and one launch.
Prefixes of requests that are not in the step, because they wait for decode or were retracted, are not read.

Order that matters: a lane is attached before decode hears of it (READY), so no step names a lane that is not there,
but one whose request has ended. Nobody takes that answer, nor that of a lane which is detached while a launched step
still reads its slots; the pool's memory outlives the executor.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.lane_plan import most_rows, within_rows
from sglang_adrenaline.attention.shared_runs import Run, SharedRuns, Slots
from sglang_adrenaline.channel.calls import StepCalls
from sglang_adrenaline.channel.cuda_graph import CudaGraph
from sglang_adrenaline.channel.ipc_end import DTYPES
from sglang_adrenaline.errors import ChannelError
from sglang_adrenaline.prefill.executor import POLL_S, LayerKV
from sglang_adrenaline.prefill.lane_attention import LaneAttention, check_pool

if TYPE_CHECKING:
    from sglang_adrenaline.channel.ipc import IpcExecutorEnd
    from sglang_adrenaline.channel.ipc_segment import Announced
    from sglang_adrenaline.prefill.sm_partition import SmPartition

logger = logging.getLogger(__name__)

LATE_S = 0.01
"""A launch so long after the announcement may be what decode waits for; it announces most of a step ahead."""
TELL_EVERY_S = 1.0
DRAIN_S = 10.0
"""Longest wait for what was launched, once its waits were aborted; prefill's kernels may be ahead of it."""


class Planned(NamedTuple):
    """Which graph a step runs."""

    parts: int
    bucket: int


def lane_buckets(lanes: int) -> tuple[int, ...]:
    """Of how many lanes, from the first, answers are sent: 8, 16, 32, then multiples of 64; the last is `lanes`."""
    sizes = [size for size in (8, 16, 32, *range(64, lanes, 64)) if size < lanes]
    return (*sizes, lanes)


def bucket_of(buckets: Sequence[int], highest_lane: int) -> int:
    """The smallest bucket with that lane; -1 = no lane."""
    return next(bucket for bucket in buckets if bucket > highest_lane)


class StepGraphs:
    """Attention for the lanes of one channel, and per bucket a graph of a whole step. The executor's thread only."""

    def __init__(
        self, end: IpcExecutorEnd, layers: Sequence[LayerKV], stream: torch.cuda.Stream, capacity: int, sms: int
    ) -> None:
        """`stream`, with so many SMs, need not be current. Waits until the device can replay. Raises ChannelError."""
        shape, dtype = end.shape, DTYPES[end.shape.dtype]
        q = end.q
        assert q is not None
        self._calls = StepCalls(len(layers), shape.num_layers)
        self._buckets = lane_buckets(shape.lanes)
        self.capacity = capacity
        with torch.cuda.stream(torch.cuda.default_stream(q.device)):  # whose cached memory others can use after us
            self._attention = [
                LaneAttention(
                    layers, lanes=shape.lanes, num_qo_heads=shape.num_qo_heads, dtype=dtype, capacity=capacity, sms=sms
                )
                for _ in range(1 + self._calls.halves)
            ]
            rows = (shape.lanes, shape.num_qo_heads)
            self._o = torch.zeros(*rows, shape.v_head_dim, dtype=dtype, device=q.device)
            self._lse = torch.zeros(rows, dtype=torch.float32, device=q.device)
            torch.cuda.current_stream().synchronize()
        self._graphs: dict[tuple[int, int], CudaGraph] = {}
        """By number of parts (1: whole, 2: halves) and bucket."""
        with torch.cuda.stream(stream):
            for part in self._attention:
                part.run(0, q[0], self._o, self._lse)
            for bucket in self._buckets:
                for parts in range(1, len(self._attention) + 1):
                    graph = CudaGraph(stream)
                    with graph.capture():
                        self._step(end.endpoint.words, q, bucket, parts)
                    self._graphs[parts, bucket] = graph
            stream.synchronize()

    def _step(self, words: torch.Tensor, q: torch.Tensor, bucket: int, parts: int) -> None:
        o, lse = self._o[:bucket], self._lse[:bucket]
        for layer in range(self._calls.layers):
            for part in range(parts):
                call = self._calls.whole(layer) if parts == 1 else self._calls.half(layer, part)
                if (layer, part) == (0, 0):
                    kernels.wait_step(words)
                else:
                    kernels.wait_layer(words, call)
                # Answers of lanes that are not in this half go nowhere: decode reads those of its rows.
                self._attention[part].run(layer, q[call & 1, :bucket], o, lse)
                kernels.put_answers(words, o, lse, call)

    def plan(self, parts: Sequence[Sequence[Run]], slots: Mapping[int, torch.Tensor]) -> Planned:
        """What the lanes of a step, or of each of its halves, attend to. See `LaneAttention.plan`."""
        for attention, runs in zip(self._attention, parts, strict=False):
            attention.plan(runs, slots)
        return Planned(len(parts), bucket_of(self._buckets, max(slots, default=-1)))

    def launch(self, planned: Planned) -> None:
        self._graphs[planned.parts, planned.bucket].launch()

    def free(self) -> None:
        """The graphs, which do not run any more; memory goes with the last reference."""
        for graph in self._graphs.values():
            graph.free()


@dataclass
class LaunchLag:
    """How far launches lag behind the announcements of their steps by decode's host. Seconds."""

    launches: int = 0
    late: int = 0
    """Launches that came LATE_S or more after the announcement."""
    total_s: float = 0.0
    _told_at: float = 0.0

    @property
    def mean_s(self) -> float:
        return self.total_s / self.launches if self.launches else 0.0

    def add(self, step: int, woken_s: float, planned_s: float, launched_s: float) -> None:
        """A launch, by the times since the announcement; tells of late ones, one line in TELL_EVERY_S at most."""
        self.launches += 1
        self.total_s += launched_s
        if launched_s < LATE_S:
            return
        self.late += 1
        now = time.monotonic()
        if now - self._told_at >= TELL_EVERY_S:
            self._told_at = now
            logger.info(
                "step %d was launched %.1f ms after its announcement: %.1f to wake up, %.1f to plan, %.1f to launch; "
                "%d of %d launches were late so far",
                step,
                1e3 * launched_s,
                1e3 * woken_s,
                1e3 * (planned_s - woken_s),
                1e3 * (launched_s - planned_s),
                self.late,
                self.launches,
            )


class GpuExecutor:
    """See the module and `executor.AttentionExecutor`. attach/detach/stop come from other threads."""

    def __init__(
        self,
        end: IpcExecutorEnd,
        layers: Sequence[LayerKV],
        name: str,
        on_failure: Callable[[str], None],
        *,
        partition: SmPartition | None = None,
    ) -> None:
        """`partition`: SMs to stay on; without one the executor's kernels go ahead of prefill's on all of them.

        Raises ChannelError on a KV pool that it cannot read.
        """
        check_pool(layers, end.shape.num_qo_heads, DTYPES[end.shape.dtype])
        self._end = end
        self._layers = layers
        self._device: int = end.device
        self._on_failure = on_failure
        self._partition = partition
        self._lock = threading.Lock()
        self._slots: dict[int, torch.Tensor] = {}
        """By lane, int32 on the device. Under the lock, as are the next two."""
        self._shared = SharedRuns()
        self._arriving: list[torch.cuda.Event] = []
        """After these the slots that came since the last plan are there."""
        self._changed = True
        self._plans = 0
        self._planned_tokens = 0
        self._read_tokens = 0
        self._lag = LaunchLag()
        self._stopping = False
        self._drained = True
        self._stream: torch.cuda.Stream | None = None
        self._graphs: StepGraphs | None = None
        self._thread = threading.Thread(target=self._run, name=f"attention-executor-{name}", daemon=True)
        self._thread.start()

    # ---- other threads ----------------------------------------------------------------------------------------------

    def attach(self, lane: int, slots: torch.Tensor, on_host: Slots) -> None:
        """As in `AttentionExecutor`; `slots` on the GPU is ready on the current stream, and may change afterwards."""
        with torch.cuda.device(self._device):
            on_device = slots.to(device=torch.device("cuda", self._device), dtype=torch.int32, copy=True)
            ready = torch.cuda.Event()
            ready.record()
        with self._lock:
            self._slots[lane] = on_device
            self._shared.add(lane, on_host)
            self._arriving.append(ready)
            self._changed = True

    def detach(self, lane: int) -> None:
        """Forget the lane. A step that is under way may still read its slots, to an answer that is not used."""
        with self._lock:
            self._slots.pop(lane, None)
            self._shared.discard(lane)
            self._changed = True

    @property
    def steps_done(self) -> int:
        return self._end.steps_done

    @property
    def plans(self) -> int:
        return self._plans

    def stop(self, reason: str) -> None:
        self._stopping = True
        self._end.abort(reason)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * DRAIN_S)
            if self._thread.is_alive():
                logger.error("%s did not stop within %g s", self._thread.name, 2 * DRAIN_S)
                return
        if self._drained:
            self._end.close()

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failure = ""
        try:
            with torch.cuda.device(self._device), torch.no_grad():
                self._serve()
        except ChannelError as error:
            failure = str(error)
            if not self._stopping:
                logger.info("attention executor ends: %s", error)
        except Exception as error:
            failure = f"attention executor failed: {error}"
            logger.exception("attention executor failed")
        if failure:
            self._end.abort(failure)
        self._drained = self._drain()
        if self._drained:
            self._let_go()
        if failure and not self._stopping:
            self._on_failure(failure)

    def _let_go(self) -> None:
        if self._graphs is not None:
            self._graphs.free()
        if self._partition is not None and self._stream is not None:
            self._partition.give_back(self._stream)

    def _serve(self) -> None:
        layer = self._layers[0]
        if self._partition is None:
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        else:
            self._stream = self._partition.take_executor_stream()
        begun = time.monotonic()
        self._graphs = self._make_graphs(layer.k.shape[0] + self._end.shape.lanes)
        logger.info("attention executor is ready after %.1f s", time.monotonic() - begun)
        with torch.cuda.stream(self._stream):
            while not self._end.connect(POLL_S):
                if self._stopping:
                    return
            planned, step = Planned(0, 0), 0
            parts: list[frozenset[int]] = []
            while not self._stopping:
                announced = self._end.step_announced(step + 1, POLL_S)
                if announced is None:
                    continue
                step += 1
                woken_s = self._end.since_announced_s(step)
                wanted = _parts(announced)
                if self._changed or parts != wanted:
                    parts, planned = wanted, self._plan(wanted)
                planned_s = self._end.since_announced_s(step)
                self._end.launching()
                self._graphs.launch(planned)
                self._read_tokens += self._planned_tokens
                self._lag.add(step, woken_s, planned_s, self._end.since_announced_s(step))

    @property
    def launch_lag_s(self) -> float:
        return self._lag.mean_s

    @property
    def late_launches(self) -> int:
        return self._lag.late

    @property
    def waited_s(self) -> float:
        return self._end.waited_s

    @property
    def busy_s(self) -> float:
        """See `AttentionExecutor`: as the GPU measured it, of the steps that are done."""
        return self._end.busy_s

    @property
    def worked_s(self) -> float:
        """See `AttentionExecutor`: a GPU has no such clock."""
        return 0.0

    @property
    def read_tokens(self) -> int:
        """See `AttentionExecutor`: of the steps that were launched."""
        return self._read_tokens

    def _plan(self, parts: Sequence[frozenset[int]]) -> Planned:
        """For the lanes of a step, or of its halves, with the slots that they have now."""
        assert self._graphs is not None and self._stream is not None
        with self._lock:
            self._changed = False
            runs = [within_rows(self._shared.runs(part), most_rows(self._end.shape.lanes)) for part in parts]
            slots = {lane: self._slots[lane] for part in parts for lane in part if lane in self._slots}
            self._planned_tokens = self._shared.distinct_tokens([lane for part in parts for lane in part])
            arriving, self._arriving = self._arriving, []
        for ready in arriving:
            self._stream.wait_event(ready)
        capacity = max(sum(run.end - run.begin for run in part) for part in runs)
        if capacity > self._graphs.capacity:  # many lanes that share too little to be read once
            self._grow(2 * capacity)
        self._plans += 1
        return self._graphs.plan(runs, slots)

    def _grow(self, capacity: int) -> None:
        assert self._graphs is not None
        if not self._drain():
            raise ChannelError(f"the executor's GPU did not finish its steps within {DRAIN_S:g} s")
        self._graphs.free()
        self._graphs = self._make_graphs(capacity)

    def _make_graphs(self, capacity: int) -> StepGraphs:
        assert self._stream is not None
        partition = self._partition
        sms = partition.executor_sms if partition else _all_sms(self._device)
        return StepGraphs(self._end, self._layers, self._stream, capacity, sms)

    def _drain(self) -> bool:
        """Whether all that was launched is over; within DRAIN_S."""
        deadline = time.monotonic() + DRAIN_S
        try:
            while self._stream is not None and not self._stream.query():
                if time.monotonic() > deadline:
                    logger.error("%s: its GPU is not done after %g s", self._thread.name, DRAIN_S)
                    return False
                time.sleep(0.001)
        except RuntimeError as error:  # a CUDA error that stays with the process
            logger.error("%s: %s", self._thread.name, error)
            return False
        return True


def _parts(announced: Announced) -> list[frozenset[int]]:
    """Lanes of the step, or of each of its halves."""
    if announced.first is None:
        return [frozenset(announced.lanes)]
    return [frozenset(announced.lanes[: announced.first]), frozenset(announced.lanes[announced.first :])]


def warm_up(layers: Sequence[LayerKV], *, lanes: int, num_qo_heads: int) -> None:
    """Compile and load all kernels of an executor, so that none has to be waited for while decode steps run.

    Scheduler thread, before decode servers can connect; the first time on a machine this takes minutes. CUDA may also
    wait for an idle device when it loads a kernel, which a device on which a step waits for its peer is not. Raises
    ChannelError on a pool that the executor cannot read.
    """
    from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint

    k = layers[0].k
    with torch.cuda.device(k.device), torch.no_grad():
        IpcEndpoint(k.device.index)
        sms = _all_sms(k.device.index)
        attention = LaneAttention(
            layers[:1], lanes=lanes, num_qo_heads=num_qo_heads, dtype=k.dtype, capacity=lanes, sms=sms
        )
        q = torch.zeros(lanes, num_qo_heads, k.shape[2], dtype=k.dtype, device=k.device)
        o, lse = torch.empty_like(q), torch.empty(lanes, num_qo_heads, dtype=torch.float32, device=k.device)
        attention.plan([Run((0,), 0, 1)], {0: torch.zeros(1, dtype=torch.int32, device=k.device)})
        attention.run(0, q, o, lse)
        torch.cuda.current_stream().synchronize()


def _all_sms(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
