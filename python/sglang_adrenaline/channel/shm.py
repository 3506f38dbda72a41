"""Channel over shared memory, for two processes of one host: tensors in a memfd, futexes for wake-ups.

The memory and its layout are in `segment.py`, the promises in `base.py`. No thread is started here: the decode end
belongs to the thread that runs the model, the executor end to the executor's thread; `abort` and `close` may come
from any.

Flags. Call (step, layer) has the number `step * num_layers + layer`; its low 32 bits are the call's flag. Decode
writes q and then Q_FLAG, the executor writes (o, lse) and then A_FLAG. A flag is compared for equality with the one
call that is expected, so whatever an abandoned call leaves behind is ignored.

Memory order. The writer of a flag has written the data before; whoever has seen the flag reads the data after. x86-64
keeps both orders by itself; elsewhere a fence stands between data and flag on either side (`_fence`). The lane table
is guarded by STEP as in a seqlock: decode stores STEP, then the table, then a flag of that step; the executor takes
the table only if STEP is the flag's step before and after it was read.

Waits sleep in slices of SLICE_S, so that an abort that was raised just before going to sleep, or the death of the
peer process (its pidfd), is noticed within that time.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Sequence

import torch

from sglang_adrenaline.channel import segment as seg
from sglang_adrenaline.channel.base import Call, ChannelShape, ChannelSpec, check_lanes
from sglang_adrenaline.channel.futex import Futex, make_fence
from sglang_adrenaline.channel.segment import Segment
from sglang_adrenaline.channel.tensors import Room
from sglang_adrenaline.errors import ChannelError, PeerLostError

SLICE_S = 0.1

_MASK = 0xFFFFFFFF
_Q, _A = seg.Q_FLAG // 4, seg.A_FLAG // 4
_STEP, _ROWS, _CLOSED = seg.STEP // 8, seg.ROWS // 8, seg.CLOSED // 8


def create_executor_end(shape: ChannelShape, peer: str = "decode") -> ShmExecutorEnd:
    """Prefill's side: make the memory. `peer` names the other side in errors. Raises ChannelError."""
    segment, spec = seg.create(shape)
    return ShmExecutorEnd(segment, spec, peer)


def open_decode_end(
    spec: ChannelSpec, *, wait_timeout: float, expected: ChannelShape | None = None, peer: str = "prefill"
) -> ShmDecodeEnd:
    """Decode's side: open what prefill made. `wait_timeout`: longest `recv`, in seconds.

    Raises ChannelError if the memory cannot be opened, is not the one offered, or is not of the `expected` shape.
    """
    if spec.kind != "shm":
        raise ChannelError(f"{peer} offers a channel of kind {spec.kind!r}, not shm")
    if expected is not None and (difference := expected.difference(spec.shape)):
        raise ChannelError(f"{peer} offers a channel of another shape: {difference}")
    return ShmDecodeEnd(seg.open_(spec), wait_timeout, peer)


class _End:
    """What both ends share: abort, close, and the check for them."""

    def __init__(self, segment: Segment, own_abort: int, peer_abort: int, peer: str) -> None:
        self.peer = peer
        self._segment: Segment | None = segment
        self._num_layers = segment.shape.num_layers
        self._own_abort = own_abort
        self._peer_abort = peer_abort
        self._aborted = ""
        self._abort_lock = threading.Lock()
        self._q_futex = Futex(segment.address + seg.Q_FLAG)
        self._a_futex = Futex(segment.address + seg.A_FLAG)
        self._fence = make_fence()
        self._views: dict[int, list[tuple[Room, Room, Room]]] = {}

    def check(self) -> None:
        self._live()

    def abort(self, reason: str) -> None:
        with self._abort_lock:
            if self._aborted:
                return
            self._aborted = reason or "no reason given"
            segment = self._segment
        if segment is not None:
            segment.write_abort(self._own_abort, self._aborted)
            self._q_futex.wake()
            self._a_futex.wake()

    def close(self) -> None:
        self.abort("closed")
        # A thread that is inside a wait holds its own reference; memory and descriptors go when it leaves.
        self._segment = None
        self._views = {}

    def _live(self) -> Segment:
        """The mapping, or PeerLostError if the channel has ended."""
        segment = self._segment
        if segment is None or self._aborted:
            raise PeerLostError(f"channel to {self.peer} was closed on this side: {self._aborted}")
        if segment.u32[self._peer_abort // 4]:
            raise PeerLostError(f"{self.peer} closed the channel: {segment.read_abort(self._peer_abort)}")
        return segment

    def _sleep(self, segment: Segment, futex: Futex, seen: int, timeout_s: float) -> None:
        """Sleep a slice while the futex's word is `seen`. Raises PeerLostError if the peer's process has ended."""
        if futex.wait(seen, min(timeout_s, SLICE_S)) and segment.peer_died():
            raise PeerLostError(f"{self.peer} is gone: its process has ended")

    def _rows(self, segment: Segment, rows: int) -> list[tuple[Room, Room, Room]]:
        """The first `rows` rows of q, o and lse, per parity; made once per number of rows."""
        views = self._views.get(rows)
        if views is None:
            views = [
                (Room(segment.q[p, :rows]), Room(segment.o[p, :rows]), Room(segment.lse[p, :rows])) for p in (0, 1)
            ]
            self._views[rows] = views
        return views


class ShmDecodeEnd(_End):
    """See `base.DecodeEnd`."""

    def __init__(self, segment: Segment, wait_timeout: float, peer: str) -> None:
        super().__init__(segment, seg.DECODE_ABORT, seg.EXECUTOR_ABORT, peer)
        self.exposed_wait_s = 0.0
        self.local_span_s = 0.0
        self.steps = 0
        self._wait_timeout = wait_timeout
        self._lanes: tuple[int, ...] | None = None
        self._step_views: list[tuple[Room, Room, Room]] = []
        self._sent = -1
        self._sent_at = 0.0
        self._open = False

    def begin_step(self, lanes: Sequence[int]) -> int:
        segment = self._live()
        lanes = tuple(lanes)
        changed = lanes != self._lanes
        if changed:
            check_lanes(lanes, segment.shape.lanes)
        u64 = segment.u64
        u64[_CLOSED] = self.steps
        self.steps += 1
        u64[_STEP] = self.steps
        if changed:
            if self._fence:
                self._fence()
            u64[_ROWS] = len(lanes)
            segment.lane_table[: len(lanes)] = memoryview(array("i", lanes))
            self._lanes = lanes
            self._step_views = self._rows(segment, len(lanes))
        self._sent = -1
        self._open = True
        return self.steps

    def send_q(self, layer: int, q: torch.Tensor) -> None:
        segment = self._live()
        if not self._open or not self._sent < layer < self._num_layers:
            raise ChannelError(
                f"q of layer {layer} of {self._num_layers} is out of order: the last sent was {self._sent}"
                if self._open
                else f"q of layer {layer} outside of a step"
            )
        self._step_views[layer & 1][0].fill("q", q)
        if self._fence:
            self._fence()
        self._sent = layer
        segment.u32[_Q] = (self.steps * self._num_layers + layer) & _MASK
        self._q_futex.wake()
        self._sent_at = time.perf_counter()

    def recv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        segment = self._live()
        if not self._open or layer != self._sent:
            raise ChannelError(f"no q of layer {layer} is under way (last sent: {self._sent}, step {self.steps})")
        self.local_span_s += time.perf_counter() - self._sent_at
        if segment.u32[_A] != (self.steps * self._num_layers + layer) & _MASK:
            self._wait(segment, layer)
        if self._fence:
            self._fence()
        if layer == self._num_layers - 1:
            self._open = False
        _, o, lse = self._step_views[layer & 1]
        return o.tensor, lse.tensor

    def _wait(self, segment: Segment, layer: int) -> None:
        flag = (self.steps * self._num_layers + layer) & _MASK
        u32, start = segment.u32, time.perf_counter()
        remaining = self._wait_timeout
        try:
            while (seen := u32[_A]) != flag:
                self._live()
                if remaining <= 0:
                    raise PeerLostError(f"no answer within {self._wait_timeout:g} s")
                self._sleep(segment, self._a_futex, seen, remaining)
                remaining = start + self._wait_timeout - time.perf_counter()
        except PeerLostError as error:
            self.abandon_step()
            raise PeerLostError(f"{self.peer}, step {self.steps}, layer {layer}: {error}") from None
        finally:
            self.exposed_wait_s += time.perf_counter() - start

    def abandon_step(self) -> None:
        self._open = False
        segment = self._segment
        if segment is not None:
            segment.u64[_CLOSED] = self.steps

    def close(self) -> None:
        super().close()
        self._step_views = []


class ShmExecutorEnd(_End):
    """See `base.ExecutorEnd`."""

    def __init__(self, segment: Segment, spec: ChannelSpec, peer: str) -> None:
        super().__init__(segment, seg.EXECUTOR_ABORT, seg.DECODE_ABORT, peer)
        self.spec = spec
        self._taken = 0  # flag of the newest call that was looked at; step 0 has no calls, so 0 is never one
        self._step = 0  # the step that _lanes is for
        self._lanes: tuple[int, ...] = ()
        self._current = 0  # step of the call that is being answered, 0 = none
        self._done = 0

    @property
    def steps_done(self) -> int:
        segment = self._segment
        if segment is None:
            return self._done
        # CLOSED is read before _current, and _take writes _current before it reads CLOSED: either this sees the call
        # that is under way, or _take sees that its step is closed and drops it.
        closed = segment.u64[_CLOSED]
        current = self._current
        if current and current <= closed:
            closed = current - 1
        return max(self._done, closed)

    def wait_call(self, timeout_s: float) -> Call | None:
        segment = self._live()
        self._current = 0
        u32 = segment.u32
        deadline = time.perf_counter() + timeout_s
        while True:
            flag = u32[_Q]
            if flag != self._taken:
                self._taken = flag
                call = self._take(segment, flag)
                if call is not None:
                    return call
                continue
            self._live()
            remaining = deadline - time.perf_counter()
            if remaining <= 0:
                return None
            self._sleep(segment, self._q_futex, flag, remaining)

    def _take(self, segment: Segment, flag: int) -> Call | None:
        """The call that `flag` stands for, or None if decode has given it up meanwhile."""
        if self._fence:
            self._fence()
        u64 = segment.u64
        step = u64[_STEP]
        layer = (flag - step * self._num_layers) & _MASK
        if layer >= self._num_layers:
            return None
        if step != self._step:
            lanes = self._read_lanes(segment, step)
            if lanes is None:
                return None
            if lanes != self._lanes:  # else keep the object: users compare it by identity first
                self._lanes = lanes
            self._step = step
            self._done = max(self._done, step - 1)
        self._current = step
        if u64[_CLOSED] >= step:
            self._current = 0
            return None
        return Call(step, layer, self._lanes, self._rows(segment, len(self._lanes))[layer & 1][0].tensor)

    def _read_lanes(self, segment: Segment, step: int) -> tuple[int, ...] | None:
        rows = segment.u64[_ROWS]
        lanes = tuple(segment.lane_table[: min(rows, segment.shape.lanes)])
        if self._fence:
            self._fence()
        if segment.u64[_STEP] != step:
            return None
        try:
            check_lanes(lanes, segment.shape.lanes)
        except ValueError as error:
            raise ChannelError(f"{self.peer} wrote a broken lane table: {error}") from None
        return lanes

    def answer(self, call: Call, o: torch.Tensor, lse: torch.Tensor) -> None:
        segment = self._live()
        _, o_room, lse_room = self._rows(segment, len(call.lanes))[call.layer & 1]
        o_room.fill("o", o)
        lse_room.fill("lse", lse)
        if self._fence:
            self._fence()
        segment.u32[_A] = (call.step * self._num_layers + call.layer) & _MASK
        self._a_futex.wake()
        if call.layer == self._num_layers - 1:
            self._done = max(self._done, call.step)
        self._current = 0
