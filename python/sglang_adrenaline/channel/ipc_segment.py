"""What the hosts of an `ipc` channel tell each other: a memfd with handles, step announcements and reasons to end.

Created by prefill and opened by decode through /proc/PID/fd/FD, as in `segment.py`; no data of a step passes here.

    offset  size         what                                                      written by
    0       <= 128       header: magic, version, sizes, dtype, token               prefill, once
    256     64           CUDA IPC handle of q and its flag, on the executor's GPU  prefill, before the spec is sent
    512     u64          DECODE_PID: who opened the channel, 0 = nobody            decode, once, after its handle
    576     64           CUDA IPC handle of o, lse and their flag                  decode, once
    768     u32          BELL: low bits of the newest announced step, a futex      decode
    896     u64          EXECUTOR_UNMAPPED: executor holds no mapping of decode's memory any more
    904     u64          DECODE_UNMAPPED: the same, the other way round
    1024    u32 u32 248  decode's abort word, length and text of the reason        decode, once
    1280    u32 u32 248  executor's abort word, ...                                executor, once
    4096    RING entries of step, rows, halves, time (u64 each), i32[lanes], aligned to 64 decode

An announcement is written as step 0, all the rest, then the step, then BELL; its reader takes it only if the step
is the one it looks for before and after. x86-64 keeps that order; elsewhere `futex.make_fence` is between. *halves* is
0, or 1 + the number of lanes in the first half.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import struct
import time
from dataclasses import dataclass

from sglang_adrenaline.channel import memfd
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.channel.futex import Futex, make_fence
from sglang_adrenaline.channel.ipc_memory import HANDLE_BYTES
from sglang_adrenaline.channel.memfd import OwnedFd, WatchedProcess
from sglang_adrenaline.errors import ChannelError

EXECUTOR_HANDLE, DECODE_HANDLE = 256, 576
EXECUTOR_UNMAPPED, DECODE_UNMAPPED = 896, 904
DECODE_ABORT, EXECUTOR_ABORT = 1024, 1280
RING = 16
"""Decode is at most a few steps ahead of the executor: its own next step but one needs the answers of this one."""

_MAGIC = b"ADRIPC\x00\x01"
_HEADER = struct.Struct("=8sI16s5I16s")
_VERSION = 2
_DECODE_PID, _BELL = 512, 768
_ENTRY_HEAD = 32
_RING_AT = 4096
_ABORT_TEXT = 248
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Announced:
    """A step. first: so many of the lanes are in its first half; None if it runs as a whole."""

    lanes: tuple[int, ...]
    first: int | None = None


class IpcSegment:
    """One mapping; released with the last reference."""

    def __init__(self, fd: int, shape: ChannelShape, owned: OwnedFd | None) -> None:
        self.shape = shape
        self._owned = owned  # the creator keeps it: its number is the channel's address
        self._peer: WatchedProcess | None = None
        self._mapping = mmap.mmap(fd, _total_bytes(shape))
        self._anchor = ctypes.c_char.from_buffer(self._mapping)
        self._u32 = memoryview(self._mapping).cast("I")
        self._u64 = memoryview(self._mapping).cast("Q")
        self._bell = Futex(ctypes.addressof(self._anchor) + _BELL)
        self._fence = make_fence() or (lambda: None)

    def write_handle(self, where: int, handle: bytes) -> None:
        self._mapping[where : where + HANDLE_BYTES] = handle

    def read_handle(self, where: int) -> bytes:
        return bytes(self._mapping[where : where + HANDLE_BYTES])

    # ---- steps ------------------------------------------------------------------------------------------------------

    def announce(self, step: int, announced: Announced) -> None:
        lanes, first = announced.lanes, announced.first
        at = self._entry(step)
        self._u64[at // 8] = 0
        self._fence()
        self._u64[at // 8 + 1] = len(lanes)
        self._u64[at // 8 + 2] = 0 if first is None else 1 + first
        self._u64[at // 8 + 3] = time.monotonic_ns()
        lanes_at = at + _ENTRY_HEAD
        memoryview(self._mapping)[lanes_at : lanes_at + 4 * len(lanes)].cast("i")[:] = _int32(lanes)
        self._fence()
        self._u64[at // 8] = step
        self._fence()
        self._u32[_BELL // 4] = step & _MASK
        self._bell.wake()

    def announced(self, step: int) -> Announced | None:
        """None if the step is not announced. Raises ChannelError if it was and is lost."""
        at = self._entry(step)
        found = self._u64[at // 8]
        if found < step:
            return None
        self._fence()
        rows = min(self._u64[at // 8 + 1], self.shape.lanes)
        lanes_at = at + _ENTRY_HEAD
        lanes = tuple(memoryview(self._mapping)[lanes_at : lanes_at + 4 * rows].cast("i"))
        halves = self._u64[at // 8 + 2]
        self._fence()
        if found != step or self._u64[at // 8] != step:
            raise ChannelError(f"decode is more than {RING} steps ahead of the executor, which looks for step {step}")
        return Announced(lanes, min(halves - 1, rows) if halves else None)

    def since_announced_s(self, step: int) -> float:
        """Seconds since decode's host announced the step, which was found to be announced."""
        return (time.monotonic_ns() - self._u64[self._entry(step) // 8 + 3]) * 1e-9

    def wait_bell(self, step: int, timeout_s: float) -> None:
        """Sleep until a step from `step` on may have been announced, or the end is woken."""
        seen = self._u32[_BELL // 4]
        if (seen - step) & _MASK >= 1 << 31:  # seen < step, modulo 2**32
            self._bell.wait(seen, timeout_s)

    def wake(self) -> None:
        self._bell.wake()

    def _entry(self, step: int) -> int:
        return _RING_AT + (step % RING) * _entry_bytes(self.shape)

    # ---- the peer ---------------------------------------------------------------------------------------------------

    def abort(self, where: int, reason: str) -> None:
        """Leave the reason and then raise the abort word at `where`."""
        text = reason.encode()[:_ABORT_TEXT]
        self._mapping[where + 8 : where + 8 + len(text)] = text
        self._u32[where // 4 + 1] = len(text)
        self._fence()
        self._u32[where // 4] = 1
        self._bell.wake()

    def aborted(self, where: int) -> str | None:
        if not self._u32[where // 4]:
            return None
        length = min(self._u32[where // 4 + 1], _ABORT_TEXT)
        return bytes(self._mapping[where + 8 : where + 8 + length]).decode(errors="replace") or "no reason given"

    def mark(self, where: int) -> None:
        self._u64[where // 8] = 1

    def marked(self, where: int) -> bool:
        return self._u64[where // 8] != 0

    def decode_is_there(self) -> bool:
        """Whether decode has opened the channel and left its handle; from then on its process is watched."""
        pid = self._u64[_DECODE_PID // 8]
        if pid and self._peer is None:
            self._peer = WatchedProcess(pid)
        return bool(pid)

    def peer_died(self) -> bool:
        return self._peer is not None and self._peer.has_ended()

    def claim(self, handle: bytes) -> None:
        """Decode's last act of opening: leave the handle and the process id."""
        self.write_handle(DECODE_HANDLE, handle)
        self._fence()
        self._u64[_DECODE_PID // 8] = os.getpid()


def create(shape: ChannelShape) -> tuple[IpcSegment, ChannelSpec]:
    """Make a segment of zeros with its header, and the spec by which decode opens it. Raises ChannelError."""
    token = secrets.token_hex(16)
    owned = memfd.create("sglang-adrenaline-ipc", _total_bytes(shape))
    try:
        segment = IpcSegment(owned.fd, shape, owned)
    except OSError as error:
        raise ChannelError(f"cannot map {_total_bytes(shape)} bytes of shared memory: {error}") from None
    segment._mapping[: _HEADER.size] = _header(shape, token)
    return segment, ChannelSpec(kind="ipc", address=memfd.address(owned), token=token, shape=shape)


def open_(spec: ChannelSpec) -> IpcSegment:
    """Map the segment that prefill created; `claim` it next. Raises ChannelError."""
    with memfd.opened(spec.address, _total_bytes(spec.shape)) as (fd, creator):
        segment = IpcSegment(fd, spec.shape, None)
    if segment._mapping[: _HEADER.size] != _header(spec.shape, spec.token):
        raise ChannelError(f"{spec.address} is another channel than the one offered (stale or another version)")
    if segment._u64[_DECODE_PID // 8]:
        raise ChannelError(f"the channel is in use by process {segment._u64[_DECODE_PID // 8]} already")
    segment._peer = creator
    return segment


def _header(shape: ChannelShape, token: str) -> bytes:
    sizes = (shape.lanes, shape.num_layers, shape.num_qo_heads, shape.head_dim, shape.v_head_dim)
    return _HEADER.pack(_MAGIC, _VERSION, bytes.fromhex(token), *sizes, shape.dtype.encode())


def _entry_bytes(shape: ChannelShape) -> int:
    return -(-(_ENTRY_HEAD + 4 * shape.lanes) // 64) * 64


def _total_bytes(shape: ChannelShape) -> int:
    return _RING_AT + RING * _entry_bytes(shape)


def _int32(values: tuple[int, ...]) -> memoryview:
    return memoryview(struct.pack(f"={len(values)}i", *values)).cast("i")
