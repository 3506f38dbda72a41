"""Data plane between a decode rank and one prefill rank: what both ends promise, whatever carries the bytes.

Job: the interfaces and the shape of a channel. Not here: any transport (`shm.py`, `net.py`, `ipc.py`), the control
plane (`control`).

One channel serves one (decode rank, prefill rank) pair. Per decode step and per layer:

    decode                                          executor (prefill side)
    begin_step(lanes)      -- once a step -->
    send_q(layer, q)       -- q, flag -->           call = wait_call(...)
    local attention over the suffix                 attention of call.q over each lane's pinned prefix
    o, lse = recv(layer)   <-- o, lse, flag --      answer(call, o, lse)

Conventions, stated once for the whole package:
- A *lane* is an offloaded request's fixed place in a channel, given with READY, kept until END. A call names the
  lanes of its rows in row order, so decode may reorder its batch freely.
- `lse` is float32, BASE 2: lse = log2(sum_j exp(score_j)), as FlashInfer's decode kernels return it; -inf marks an
  empty prefix (then o is 0). Natural logarithms are named `lse_ln` and never cross a channel.
- q and o have the channel's dtype, lse always float32.
- At most one call is under way. Buffers come in two sets by layer parity, so what `recv(l)` returned may be read
  while layer l + 1 is under way.
- Layers of a step are sent in rising order. A step that is given up in the middle leaves nothing behind: the next
  `begin_step` opens a new sequence, late answers of the old one are ignored, and the executor skips to it.
- Steps count 1, 2, ... per channel; 0 means "before the first step".

How `ipc` (CUDA) fits: q rows are stored straight at their lane of a fixed q[lanes, Hq, D] on the
executor's GPU, the answers come back to o[lanes, Hq, Dv], lse[lanes, Hq] on the decode GPU. `send_q` and `recv` then
only launch kernels (put-and-signal, wait-and-merge) on the current stream and return tensors that later kernels of
this stream may read; both can be captured in a CUDA graph, since the flags hold sequence numbers that live in device
memory. `begin_step` writes the lane table ahead of the graph's launch. `abort` sets a word that the waiting kernels
read. Nothing in these interfaces blocks on the device, so the executor may launch the graph of a whole step ahead of
its first q (`wait_call` is then only used to follow the steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import msgspec

if TYPE_CHECKING:  # the control plane imports ChannelSpec and has no use for torch
    from torch import Tensor

MAX_LANES = 4096

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
DType = Literal["float32", "bfloat16", "float16"]
Kind = Literal["shm", "ipc", "zmq"]


class ChannelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends must agree on: sizes of the buffers and the dtype of q and o."""

    lanes: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)]
    num_layers: _Size
    """Calls of a step: one a layer, or twice as many (see `calls.py`)."""
    num_qo_heads: _Size
    head_dim: _Size
    v_head_dim: _Size
    dtype: DType

    def difference(self, other: ChannelShape) -> str | None:
        """The fields in which `other` differs, as "head_dim 64, not 128", or None if there are none."""
        parts = [
            f"{name} {getattr(other, name)}, not {getattr(self, name)}"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        ]
        return "; ".join(parts) or None


class ChannelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How decode opens the channel that prefill made for it; sent with Welcome."""

    kind: Kind
    address: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    """Where the channel is, in the kind's own words. shm, ipc: "PID:FD" of the creator; zmq: its TCP port, on the
    host of the control connection."""
    token: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    """Random. shm, ipc: also stands in the channel's memory, so that a wrong or stale address is noticed. zmq: the
    secret that the connection's keys are made of."""
    shape: ChannelShape


def check_lanes(lanes: tuple[int, ...], num_lanes: int) -> None:
    """Raises ValueError unless these can be the lanes of a step."""
    if not lanes or min(lanes) < 0 or max(lanes) >= num_lanes or len(set(lanes)) != len(lanes):
        raise ValueError(f"lanes must be distinct numbers in 0..{num_lanes - 1}, at least one, not {lanes}")


@dataclass(frozen=True)
class Call:
    """One layer of one decode step, to be answered by the executor."""

    step: int
    layer: int
    lanes: tuple[int, ...]
    """Lane of each row of q. The same tuple object for all layers of a step."""
    q: Tensor
    """[len(lanes), num_qo_heads, head_dim], the channel's dtype; valid until the call is answered."""


class DecodeEnd(Protocol):
    """The decode rank's side. All methods but `abort` and `close` are called by one thread."""

    @property
    def exposed_wait_s(self) -> float:
        """Time spent waiting for answers since the channel was opened, by the thread or by the GPU's stream."""

    @property
    def local_span_s(self) -> float:
        """Time from a layer's queries having been sent to the beginning of the wait for their answers, over all layers
        since the channel was opened: what attention here took beside the executor's. 0.0 where it is not measured."""

    steps: int
    """Number of the newest step, 0 before the first."""

    def begin_step(self, lanes: Sequence[int]) -> int:
        """Publish the lanes of the step's offloaded rows (distinct, at least one) and return the step's number.

        Gives up an unfinished step. Raises ValueError on a bad lane, PeerLostError once the channel is aborted.
        """

    def send_q(self, layer: int, q: Tensor) -> None:
        """Copy q [len(lanes), num_qo_heads, head_dim] into the channel, rows in the order of `begin_step`'s lanes.

        q: the channel's dtype, any strides. Raises ValueError on another shape or dtype, ChannelError out of order,
        PeerLostError once the channel is aborted.
        """

    def recv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Wait for the answer to `send_q(layer, ...)`.

        Returns o [len(lanes), num_qo_heads, v_head_dim] (the channel's dtype) and lse [len(lanes), num_qo_heads]
        (float32, base 2), valid until the next `recv` of a layer of the same parity. Raises PeerLostError when the
        deadline passes or the peer is gone or aborted; the step is then given up, the channel is not: whether
        to go on is the caller's decision.
        """

    def abandon_step(self) -> None:
        """Say that no more q of the current step will come, so that the executor lets go of it (see `steps_done`)."""

    def check(self) -> None:
        """Raises PeerLostError once the channel has ended. Cheap, from any thread."""

    def abort(self, reason: str) -> None:
        """From any thread: wake and fail every wait on both ends, now and later. Idempotent."""

    def close(self) -> bool | None:
        """Abort, then release memory and file descriptors. From any thread, idempotent."""


class ExecutorEnd(Protocol):
    """The prefill side's end. `wait_call` and `answer` are called by one thread."""

    @property
    def spec(self) -> ChannelSpec:
        """What to send to the decode rank."""

    @property
    def steps_done(self) -> int:
        """No call of a step up to this one is under way, nor will one come: its lanes' prefixes can be unpinned.

        From any thread. Rises when a step's last layer is answered, when decode gives a step up, and when it begins
        the next one.
        """

    def wait_call(self, timeout_s: float) -> Call | None:
        """The next call, or None after `timeout_s`. Raises PeerLostError once the peer is gone or aborted.

        The previous call must have been answered or is taken to be dropped.
        """

    def answer(self, call: Call, o: Tensor, lse: Tensor) -> None:
        """Hand back o [len(call.lanes), num_qo_heads, v_head_dim] and lse [len(call.lanes), num_qo_heads] float32.

        Both are copied. Raises ValueError on another shape or dtype, PeerLostError once the channel is aborted.
        """

    def abort(self, reason: str) -> None:
        """As `DecodeEnd.abort`."""

    def close(self) -> bool | None:
        """As `DecodeEnd.close`."""
