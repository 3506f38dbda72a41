"""Channel over TCP, for CPUs on different hosts: one encrypted message out and one back per layer.

The connection is in `wire.py`, the promises in `base.py`. Prefill's end listens, on the interface of its control port;
decode's end connects there. No thread of ours is started: the decode end belongs to the thread that runs the model, the
executor end to the executor's thread; `abort` and `close` may come from any.

Messages, little-endian: a header (kind u16, rows u16, layer u32, step u64) and what follows it:

    CALL     decode -> executor   lanes i32[rows], q [rows, Hq, D]
    ANSWER   executor -> decode   lse f32[rows, Hq], o [rows, Hq, Dv]
    CLOSED   decode -> executor   nothing; no call of a step up to this one will come
    ABORT    either               text: the reason

Messages keep their order, so what a CLOSED or a newer CALL makes void has been read before it. Whatever else arrives,
or in another size, ends the channel.
"""

from __future__ import annotations

import contextlib
import secrets
import struct
import threading
import time
from collections.abc import Sequence

import torch

from sglang_adrenaline.channel import wire as wires
from sglang_adrenaline.channel.base import Call, ChannelShape, ChannelSpec, check_lanes
from sglang_adrenaline.channel.tensors import DTYPES, Room
from sglang_adrenaline.channel.wire import Wire
from sglang_adrenaline.errors import ChannelError, PeerLostError

_HEADER = struct.Struct("<HHIQ")
_CALL, _ANSWER, _CLOSED, _ABORT = 1, 2, 3, 4
_MAX_REASON = 240
_SMALL = _HEADER.size + _MAX_REASON


def create_executor_end(shape: ChannelShape, *, host: str, ports: range, peer: str = "decode") -> NetExecutorEnd:
    """Prefill's side: listen on the address `host`, on one of `ports` (0: any). Raises ChannelError."""
    token = secrets.token_hex(16)
    wire, port = wires.listen(host, ports, token, _max_bytes(shape), peer)
    return NetExecutorEnd(wire, ChannelSpec(kind="zmq", address=str(port), token=token, shape=shape))


def open_decode_end(
    spec: ChannelSpec, *, host: str, wait_timeout: float, expected: ChannelShape | None = None, peer: str = "prefill"
) -> NetDecodeEnd:
    """Decode's side: connect to the prefill server at `host`. `wait_timeout`: longest `recv`, in seconds.

    Raises ChannelError if the channel is of another shape than the `expected`, or does not stand within seconds.
    """
    if expected is not None and (difference := expected.difference(spec.shape)):
        raise ChannelError(f"{peer} offers a channel of another shape: {difference}")
    if not (spec.address.isascii() and spec.address.isdecimal() and 0 < int(spec.address) < 65_536):
        raise ChannelError(f"the address of a channel is a port, not {spec.address!r}")
    wire = wires.connect(host, int(spec.address), spec.token, _max_bytes(spec.shape), peer)
    return NetDecodeEnd(wire, spec.shape, wait_timeout)


class _Layout:
    """A buffer for one message of tensors, and views of it, made once per number of rows.

    parts: (width, dtype) of the tensors [rows, *width] that follow the header, densely, in this order.
    """

    def __init__(self, max_rows: int, parts: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._parts = parts
        self._views: dict[int, tuple[Room, ...]] = {}
        self.buffer = bytearray(max(self.size(max_rows), _SMALL))

    def size(self, rows: int) -> int:
        """Bytes of a message of `rows` rows."""
        return _HEADER.size + sum(rows * torch.Size(width).numel() * dtype.itemsize for width, dtype in self._parts)

    def rooms(self, rows: int) -> tuple[Room, ...]:
        views = self._views.get(rows)
        if views is None:
            made, offset = [], _HEADER.size
            for width, dtype in self._parts:
                full = torch.Size((rows, *width))
                tensor = torch.frombuffer(self.buffer, dtype=dtype, count=full.numel(), offset=offset).view(full)
                made.append(Room(tensor))
                offset += tensor.nbytes
            views = self._views[rows] = tuple(made)
        return views

    def message(self, kind: int, rows: int, layer: int, step: int) -> memoryview:
        """The header written before what the rooms were filled with."""
        _HEADER.pack_into(self.buffer, 0, kind, rows, layer, step)
        return memoryview(self.buffer)[: self.size(rows)]


def _call_layout(shape: ChannelShape) -> _Layout:
    q_width = (shape.num_qo_heads, shape.head_dim)
    return _Layout(shape.lanes, [((), torch.int32), (q_width, DTYPES[shape.dtype])])


def _answer_layout(shape: ChannelShape) -> _Layout:
    o_width = (shape.num_qo_heads, shape.v_head_dim)
    return _Layout(shape.lanes, [((shape.num_qo_heads,), torch.float32), (o_width, DTYPES[shape.dtype])])


def _max_bytes(shape: ChannelShape) -> int:
    return max(len(_call_layout(shape).buffer), len(_answer_layout(shape).buffer))


class _End:
    """What both ends share: abort, close, and the check for them."""

    def __init__(self, wire: Wire, num_layers: int, kinds: tuple[int, ...]) -> None:
        """kinds: of messages that this end takes."""
        self.peer = wire.peer
        self._kinds = (*kinds, _ABORT)
        self._wire = wire
        self._num_layers = num_layers
        self._aborted = ""
        self._abort_lock = threading.Lock()
        self._lost = ""

    def check(self) -> None:
        self._live()
        self._wire.check()

    def abort(self, reason: str) -> None:
        with self._abort_lock:
            if self._aborted:
                return
            self._aborted = reason or "no reason given"
        with contextlib.suppress(PeerLostError):
            text = self._aborted.encode()[:_MAX_REASON]
            self._wire.send(_HEADER.pack(_ABORT, 0, 0, 0) + text)
        self._wire.wake()

    def close(self) -> None:
        self.abort("closed")
        self._wire.close()

    def _live(self) -> None:
        """Raises PeerLostError if the channel has ended, as far as is known."""
        if self._aborted:
            raise PeerLostError(f"channel to {self.peer} was closed on this side: {self._aborted}")
        if self._lost:
            raise PeerLostError(self._lost)

    def _receive(self, buffer: bytearray, timeout_s: float) -> tuple[int, int, int, int, int]:
        """(kind, rows, layer, step, size) of the next message, its kind 0 if none came so far. Raises PeerLostError."""
        self._live()
        try:
            size = self._wire.receive(buffer, timeout_s)
            if not size:
                self._live()
                return 0, 0, 0, 0, 0
            if size < _HEADER.size:
                raise self._malformed(f"a message of {size} bytes")
            header = _HEADER.unpack_from(buffer)
            if header[0] not in self._kinds:
                raise self._malformed(f"a message of kind {header[0]}")
            if header[0] == _ABORT:
                text = bytes(buffer[_HEADER.size : min(size, _SMALL)]).decode(errors="replace")
                raise PeerLostError(f"{self.peer} closed the channel: {text}")
            return *header, size
        except PeerLostError as error:
            self._live()  # an own abort says more than what follows from it
            self._lost = str(error)
            raise

    def _malformed(self, what: str) -> PeerLostError:
        """The error for a message that breaks the rules: nothing it sends is believed any more."""
        self._lost = f"{self.peer} sent {what}"
        return PeerLostError(self._lost)


class NetDecodeEnd(_End):
    """See `base.DecodeEnd`."""

    def __init__(self, wire: Wire, shape: ChannelShape, wait_timeout: float) -> None:
        super().__init__(wire, shape.num_layers, (_ANSWER,))
        self.exposed_wait_s = 0.0
        self.local_span_s = 0.0
        self.steps = 0
        self._max_lanes = shape.lanes
        self._wait_timeout = wait_timeout
        self._out = _call_layout(shape)
        self._in = (_answer_layout(shape), _answer_layout(shape))
        self._scrap = bytearray(_SMALL)
        self._lanes: tuple[int, ...] | None = None
        self._lane_table = torch.empty(0, dtype=torch.int32)
        self._sent = -1
        self._sent_at = 0.0
        self._open = False

    def begin_step(self, lanes: Sequence[int]) -> int:
        lanes = tuple(lanes)
        if lanes != self._lanes:
            check_lanes(lanes, self._max_lanes)
        while self._receive(self._scrap, 0)[0]:  # late answers; or the word that it is over
            pass
        self._tell_closed()
        if lanes != self._lanes:
            self._lanes = lanes
            self._lane_table = torch.tensor(lanes, dtype=torch.int32)
        self.steps += 1
        self._sent = -1
        self._open = True
        return self.steps

    def send_q(self, layer: int, q: torch.Tensor) -> None:
        self._live()
        if not self._open or not self._sent < layer < self._num_layers:
            raise ChannelError(
                f"q of layer {layer} of {self._num_layers} is out of order: the last sent was {self._sent}"
                if self._open
                else f"q of layer {layer} outside of a step"
            )
        rows = len(self._lane_table)
        lane_room, q_room = self._out.rooms(rows)
        q_room.fill("q", q)
        lane_room.fill("lanes", self._lane_table)
        self._sent = layer
        self._wire.send(self._out.message(_CALL, rows, layer, self.steps))
        self._sent_at = time.perf_counter()

    def recv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._live()
        if not self._open or layer != self._sent:
            raise ChannelError(f"no q of layer {layer} is under way (last sent: {self._sent}, step {self.steps})")
        layout, start = self._in[layer & 1], time.perf_counter()
        self.local_span_s += start - self._sent_at
        try:
            self._wait(layout, layer, start + self._wait_timeout)
        except PeerLostError as error:
            self.abandon_step()
            raise PeerLostError(f"{self.peer}, step {self.steps}, layer {layer}: {error}") from None
        finally:
            self.exposed_wait_s += time.perf_counter() - start
        if layer == self._num_layers - 1:
            self._open = False
        lse, o = layout.rooms(len(self._lane_table))
        return o.tensor, lse.tensor

    def _wait(self, layout: _Layout, layer: int, deadline: float) -> None:
        """Until the answer to the call under way is in the buffer."""
        while True:
            left = max(0.0, deadline - time.perf_counter())
            kind, rows, its_layer, step, size = self._receive(layout.buffer, left)
            if not kind and left <= 0:
                raise PeerLostError(f"no answer within {self._wait_timeout:g} s")
            if kind and (step, its_layer) == (self.steps, layer):
                asked = len(self._lane_table)
                if rows != asked or size != layout.size(rows):
                    raise self._malformed(f"an answer of {rows} rows in {size} bytes to a call of {asked} rows")
                return

    def abandon_step(self) -> None:
        with contextlib.suppress(PeerLostError):
            self._tell_closed()

    def _tell_closed(self) -> None:
        if self._open:
            self._open = False
            self._wire.send(_HEADER.pack(_CLOSED, 0, 0, self.steps))


class NetExecutorEnd(_End):
    """See `base.ExecutorEnd`. `steps_done` follows decode's word only while somebody is in `wait_call`."""

    def __init__(self, wire: Wire, spec: ChannelSpec) -> None:
        super().__init__(wire, spec.shape.num_layers, (_CALL, _CLOSED))
        self.spec = spec
        self.steps_done = 0
        self._out = _answer_layout(spec.shape)
        self._in = [_call_layout(spec.shape), _call_layout(spec.shape)]  # the call being answered, and a newer one
        self._lanes: tuple[int, ...] = ()

    def wait_call(self, timeout_s: float) -> Call | None:
        call: Call | None = None
        deadline = time.perf_counter() + timeout_s
        while True:
            left = 0.0 if call else max(0.0, deadline - time.perf_counter())
            kind, rows, layer, step, size = self._receive(self._in[1].buffer, left)
            if kind == _CALL:
                self._in.reverse()
                call = self._take(rows, layer, step, size)
            elif kind == _CLOSED:
                self.steps_done = max(self.steps_done, step)
            elif not kind and left <= 0:
                return call
            if call is not None and call.step <= self.steps_done:
                call = None

    def _take(self, rows: int, layer: int, step: int, size: int) -> Call:
        layout = self._in[0]
        if not 0 < rows <= self.spec.shape.lanes or size != layout.size(rows) or layer >= self._num_layers:
            raise self._malformed(f"a call of {rows} rows for layer {layer} in {size} bytes")
        lane_room, q_room = layout.rooms(rows)
        lanes = tuple(lane_room.tensor.tolist())
        if lanes != self._lanes:  # else keep the object: users compare it by identity first
            try:
                check_lanes(lanes, self.spec.shape.lanes)
            except ValueError as error:
                raise self._malformed(f"a broken lane table: {error}") from None
            self._lanes = lanes
        self.steps_done = max(self.steps_done, step - 1)
        return Call(step, layer, self._lanes, q_room.tensor)

    def answer(self, call: Call, o: torch.Tensor, lse: torch.Tensor) -> None:
        self._live()
        rows = len(call.lanes)
        lse_room, o_room = self._out.rooms(rows)
        o_room.fill("o", o)
        lse_room.fill("lse", lse)
        self._wire.send(self._out.message(_ANSWER, rows, call.layer, call.step))
        if call.layer == self._num_layers - 1:
            self.steps_done = max(self.steps_done, call.step)
