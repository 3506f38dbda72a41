"""Channel over CUDA IPC, for two GPUs of one host (or one): stores over NVLink, flags in device memory.

The promises are in `base.py`, the kernels in `kernels.py`, the memory in `ipc_memory.py`. Each buffer stands on the GPU
of the side that reads it: q [2, lanes, Hq, D] on the executor's, o [2, lanes, Hq, Dv] and lse [2, lanes, Hq] on
decode's, first index the layer's parity; a flag is at the start of either. Nothing here waits on the device.

There are two ways to use an end. The methods of `base` work with any caller, a launch each. A caller that replays CUDA
graphs captures `kernels.put_queries`, `wait_and_merge_`, `wait_step`, `wait_layer` and `put_answers` over
`end.endpoint.words`, and around a replay calls only `begin_step(lanes)` (decode) or `launching()` (executor). In both
every step begun on decode must send its layer 0, or the channel be aborted: both GPUs count steps themselves.

What fails on the device, fails there silently: rows stay unmerged, later kernels do nothing. `failure` tells, and is
right for a step once the host has seen that step's work complete.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.channel import ipc_segment as seg
from sglang_adrenaline.channel.base import Call, ChannelShape, ChannelSpec, check_lanes
from sglang_adrenaline.channel.ipc_end import (
    DTYPES,
    FLAG_BYTES,
    IpcEnd,
    check_shape,
    lse_bytes,
    o_bytes,
    q_bytes,
)
from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint
from sglang_adrenaline.channel.ipc_memory import DeviceBuffer, HostWords, PeerMemory, freed_on_error
from sglang_adrenaline.channel.ipc_segment import IpcSegment
from sglang_adrenaline.errors import ChannelError, PeerLostError

_CONNECT_POLL_S = 0.002


def create_executor_end(
    shape: ChannelShape,
    *,
    device: int,
    wait_timeout: float,
    endpoint: IpcEndpoint | None = None,
    peer: str = "decode",
) -> IpcExecutorEnd:
    """Prefill's side, on GPU `device`. `wait_timeout`: longest wait for a layer, in seconds. Raises ChannelError."""
    check_shape(shape)
    kernels.module()
    own = DeviceBuffer(device, FLAG_BYTES + q_bytes(shape))
    with freed_on_error(own):
        host = HostWords(device)
    with freed_on_error(own, host):
        segment, spec = seg.create(shape)
        segment.write_handle(seg.EXECUTOR_HANDLE, own.export())
        end = IpcExecutorEnd(segment, own, host, endpoint, wait_timeout, peer, spec)
    end.start_watchdog()
    return end


def open_decode_end(
    spec: ChannelSpec,
    *,
    device: int,
    wait_timeout: float,
    endpoint: IpcEndpoint | None = None,
    expected: ChannelShape | None = None,
    peer: str = "prefill",
) -> IpcDecodeEnd:
    """Decode's side, on GPU `device`.

    Raises ChannelError if the memory cannot be opened, is not the one offered, or is not of the `expected` shape.
    """
    if spec.kind != "ipc":
        raise ChannelError(f"{peer} offers a channel of kind {spec.kind!r}, not ipc")
    if expected is not None and (difference := expected.difference(spec.shape)):
        raise ChannelError(f"{peer} offers a channel of another shape: {difference}")
    check_shape(spec.shape)
    kernels.module()
    segment = seg.open_(spec)
    own = DeviceBuffer(device, FLAG_BYTES + o_bytes(spec.shape) + lse_bytes(spec.shape))
    with freed_on_error(own):
        host = HostWords(device)
    with freed_on_error(own, host):
        peer_memory = PeerMemory(device, segment.read_handle(seg.EXECUTOR_HANDLE))
    with freed_on_error(own, host, peer_memory):
        end = IpcDecodeEnd(segment, own, host, endpoint, wait_timeout, peer, peer_memory)
        segment.claim(own.export())
    end.start_watchdog()
    return end


class IpcDecodeEnd(IpcEnd):
    """See `base.DecodeEnd`. `begin_step`, `send_q` and `recv` belong to the thread and the stream of the model."""

    own_abort, peer_abort = seg.DECODE_ABORT, seg.EXECUTOR_ABORT
    own_unmapped, peer_unmapped = seg.DECODE_UNMAPPED, seg.EXECUTOR_UNMAPPED

    def __init__(
        self,
        segment: IpcSegment,
        own: DeviceBuffer,
        host: HostWords,
        endpoint: IpcEndpoint | None,
        wait_timeout: float,
        peer: str,
        peer_memory: PeerMemory,
    ) -> None:
        super().__init__(segment, own, host, endpoint, wait_timeout, peer)
        self._peer_memory = peer_memory
        self.steps = 0
        shape = self.shape
        self._dtype = DTYPES[shape.dtype]
        full = (2, shape.lanes, shape.num_qo_heads)
        self._o: torch.Tensor | None = own.tensor(FLAG_BYTES, self._dtype, (*full, shape.v_head_dim))
        self._lse: torch.Tensor | None = own.tensor(FLAG_BYTES + o_bytes(shape), torch.float32, full)
        self._lanes: tuple[int, ...] = ()
        self._table_is_old = False
        self._lane_table = torch.zeros(shape.lanes, dtype=torch.int32, device=own.device)
        self._rows = torch.arange(shape.lanes, dtype=torch.int32, device=own.device)
        torch.cuda.current_stream(own.device).synchronize()  # the tables are used on other streams

    def _addresses(self, own: int, peer: int) -> dict[str, int]:
        shape = self.shape
        return self._common() | {
            "send_row_bytes": shape.num_qo_heads * shape.head_dim * 2,
            "recv_row_bytes": shape.num_qo_heads * shape.v_head_dim * 2,
            "peer_flag": peer,
            "peer_rows": peer + FLAG_BYTES,
            "own_flag": own,
            "own_rows": own + FLAG_BYTES,
            "own_lse": own + FLAG_BYTES + o_bytes(shape),
        }

    def begin_step(self, lanes: Sequence[int], first: int | None = None) -> int:
        """See `base.DecodeEnd`. first: the step runs as two halves, with so many of the lanes in the first one."""
        self.bind()
        lanes = tuple(lanes)
        if lanes != self._lanes or not lanes:
            check_lanes(lanes, self.shape.lanes)
            self._lanes = lanes
            self._table_is_old = True
        self.steps += 1
        self._segment.announce(self.steps, seg.Announced(lanes, first))
        return self.steps

    def places(self, lanes: Sequence[int]) -> list[int]:
        """The lanes as kernels name them that serve all links of a decode rank (`IpcEndpoints`)."""
        return self.endpoint.places(lanes)

    def send_q(self, layer: int, q: torch.Tensor) -> None:
        rows = len(self._lanes)
        expected = (rows, self.shape.num_qo_heads, self.shape.head_dim)
        if tuple(q.shape) != expected or q.dtype != self._dtype:
            raise ValueError(f"q must be {expected} {self._dtype}, not {tuple(q.shape)} {q.dtype}")
        self.check()
        if self._table_is_old:  # users of graphs have a table of their own
            pinned = torch.tensor(self._lanes, dtype=torch.int32).pin_memory()
            self._lane_table[:rows].copy_(pinned, non_blocking=True)
            self._table_is_old = False
        kernels.put_queries(self.endpoint.words, q.contiguous(), self._rows[:rows], self._lane_table[:rows], layer)

    def recv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.check()
        assert self._o is not None and self._lse is not None
        kernels.wait_layer(self.endpoint.words, layer)
        lanes = self._lane_table[: len(self._lanes)]
        return self._o[layer & 1].index_select(0, lanes), self._lse[layer & 1].index_select(0, lanes)

    def abandon_step(self) -> None:
        """Send the last layer without rows, so that the executor runs to the end of the step, and wait for that."""
        if self.steps and self._bound and not self._aborted:
            q = torch.empty(1, self.shape.num_qo_heads, self.shape.head_dim, dtype=self._dtype, device=self.device)
            nothing = self._rows[:0]
            kernels.put_queries(self.endpoint.words, q, nothing, nothing, self.shape.num_layers - 1)
            kernels.wait_layer(self.endpoint.words, self.shape.num_layers - 1)

    @property
    def exposed_wait_s(self) -> float:
        """Of the steps that are done, as the GPU measured it."""
        return self._host.status.wait_ns * 1e-9

    @property
    def local_span_s(self) -> float:
        """See `base.DecodeEnd`. Of the steps that are done, as the GPU measured it."""
        return self._host.status.work_ns * 1e-9

    @property
    def waits(self) -> int:
        """How many waits that time is the sum of."""
        return self._host.status.waits

    def _drop_views(self) -> None:
        self._o = self._lse = None


class IpcExecutorEnd(IpcEnd):
    """See `base.ExecutorEnd`. `connect`, `wait_call`, `answer` and graph launches belong to one thread and stream."""

    own_abort, peer_abort = seg.EXECUTOR_ABORT, seg.DECODE_ABORT
    own_unmapped, peer_unmapped = seg.EXECUTOR_UNMAPPED, seg.DECODE_UNMAPPED

    def __init__(
        self,
        segment: IpcSegment,
        own: DeviceBuffer,
        host: HostWords,
        endpoint: IpcEndpoint | None,
        wait_timeout: float,
        peer: str,
        spec: ChannelSpec,
    ) -> None:
        super().__init__(segment, own, host, endpoint, wait_timeout, peer)
        self.spec = spec
        shape = self.shape
        rows = (2, shape.lanes, shape.num_qo_heads, shape.head_dim)
        self.q: torch.Tensor | None = own.tensor(FLAG_BYTES, DTYPES[shape.dtype], rows)
        """[2, lanes, num_qo_heads, head_dim] by parity of the layer; what a graph of its own attends with."""
        self._lane_table = torch.zeros(shape.lanes, dtype=torch.int32, device=own.device)
        torch.cuda.current_stream(own.device).synchronize()
        self._lanes: tuple[int, ...] = ()
        self._step = 0
        self._layer = shape.num_layers - 1
        self._launches = 0

    def _addresses(self, own: int, peer: int) -> dict[str, int]:
        shape = self.shape
        return self._common() | {
            "send_row_bytes": shape.num_qo_heads * shape.v_head_dim * 2,
            "recv_row_bytes": shape.num_qo_heads * shape.head_dim * 2,
            "peer_flag": peer,
            "peer_rows": peer + FLAG_BYTES,
            "peer_lse": peer + FLAG_BYTES + o_bytes(shape),
            "own_flag": own,
            "own_rows": own + FLAG_BYTES,
        }

    def connect(self, timeout_s: float) -> bool:
        """Map decode's memory once decode has opened the channel, and bind; False if it has not within the time."""
        deadline = time.monotonic() + timeout_s
        while self._peer_memory is None:
            self.check()
            if self._segment.decode_is_there():
                self._peer_memory = PeerMemory(self.device, self._segment.read_handle(seg.DECODE_HANDLE))
            elif time.monotonic() >= deadline:
                return False
            else:
                time.sleep(_CONNECT_POLL_S)
        self.bind()
        return True

    # ---- graphs -----------------------------------------------------------------------------------------------------

    def launching(self) -> None:
        """Call before each launch of a graph that begins with `kernels.wait_step`. Raises PeerLostError."""
        self.check()
        self._launches += 1

    def since_announced_s(self, step: int) -> float:
        """Seconds since decode's host announced the step, for which `step_announced` has returned."""
        return self._segment.since_announced_s(step)

    def cancel_launches(self) -> None:
        """Let launches so far that still wait for a step end without one; those that have one are not touched.

        Whether a step was caught shows in `steps_opened` once `launches_over` has reached the launch's number.
        """
        self._host.control.cancelled_launches = self._launches

    def set_idle_limit(self, seconds: float) -> None:
        """How long a launch waits for a step before it ends without one (default: the wait timeout)."""
        self._host.control.open_limit_ns = int(seconds * 1e9)

    @property
    def launches_over(self) -> int:
        """Launches whose wait for a step has ended, one way or the other."""
        return self._host.status.launches

    @property
    def steps_opened(self) -> int:
        return self._host.status.steps_opened

    def step_announced(self, step: int, timeout_s: float) -> seg.Announced | None:
        """The step once decode's host has begun it, ahead of its first q; None after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.check()
            announced = self._segment.announced(step)
            remaining = deadline - time.monotonic()
            if announced is not None or remaining <= 0:
                return announced
            self._segment.wait_bell(step, min(remaining, 0.1))

    # ---- base.ExecutorEnd -------------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> int:
        return self._host.status.steps_done

    @property
    def waited_s(self) -> float:
        """For the queries of steps that are done, their first layers excepted, as the GPU measured it."""
        return self._host.status.wait_ns * 1e-9

    @property
    def busy_s(self) -> float:
        """From the arrival of queries to their answers, over all layers of the steps that are done, likewise."""
        return self._host.status.work_ns * 1e-9

    def wait_call(self, timeout_s: float) -> Call | None:
        """As in `base`, but returns when the call can be enqueued for: its q is complete when the stream gets there."""
        deadline = time.monotonic() + timeout_s
        if not self._bound and not self.connect(timeout_s):
            return None
        if self._layer + 1 < self.shape.num_layers:
            self._layer += 1
            self.check()
            kernels.wait_layer(self.endpoint.words, self._layer)
        else:
            announced = self.step_announced(self._step + 1, deadline - time.monotonic())
            if announced is None:
                return None
            lanes = announced.lanes
            self.launching()
            if lanes != self._lanes:
                pinned = torch.tensor(lanes, dtype=torch.int32).pin_memory()
                self._lane_table[: len(lanes)].copy_(pinned, non_blocking=True)
                self._lanes = lanes
            self._step, self._layer = self._step + 1, 0
            kernels.wait_step(self.endpoint.words)
        if self.q is None:
            raise PeerLostError(f"channel to {self.peer} was closed")
        q = self.q[self._layer & 1].index_select(0, self._lane_table[: len(self._lanes)])
        return Call(self._step, self._layer, self._lanes, q)

    def answer(self, call: Call, o: torch.Tensor, lse: torch.Tensor) -> None:
        self.check()
        if (call.step, call.layer) != (self._step, self._layer):
            raise ChannelError(f"step {call.step}, layer {call.layer} is not the call under way")
        lanes = self._lane_table[: len(self._lanes)]
        kernels.put_answers(self.endpoint.words, o.contiguous(), lse.contiguous(), call.layer, lanes)

    def _shared(self) -> bool:
        return self._segment.decode_is_there()

    def _drop_views(self) -> None:
        self.q = None
