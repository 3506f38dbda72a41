"""The memory of a shm channel: layout, creation, opening. No waiting, no protocol.

A segment is an anonymous memfd that prefill creates and decode opens through /proc/PID/fd/FD. It has no name in any
file system, so nothing is left behind however the processes die: the kernel frees it with the last descriptor and
mapping. Its size is sealed, so that no peer can truncate it under the other's feet.

Layout, native byte order; u32 words are futexes, each writer has cache lines of its own:

    offset  size        what                                              written by
    0       <= 512      header: magic, version, sizes, dtype, token       prefill, once
    512     u32         Q_FLAG: the newest call whose q is complete       decode
    640     u32         A_FLAG: the newest call that is answered          executor
    768     u64         STEP: number of the step that the lane table is for   decode
    776     u64         ROWS: entries of the lane table                   decode
    784     u64         CLOSED: no q of a step up to this will come       decode
    896     u64         DECODE_PID: who opened the segment, 0 = nobody    decode, once
    1024    u32 u32 248 decode's abort word, length and text of the reason    decode, once
    1280    u32 u32 248 executor's abort word, ...                        executor, once
    4096    i32[lanes]  lane table                                        decode
    then, aligned to 128 bytes: q[2, lanes, Hq, D]  o[2, lanes, Hq, Dv]  lse[2, lanes, Hq]

q, o: the shape's dtype, lse float32; first index is the layer's parity, rows are dense in the order of the lane table.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import struct

import torch

from sglang_adrenaline.channel import memfd
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.channel.memfd import OwnedFd, WatchedProcess
from sglang_adrenaline.channel.tensors import DTYPES
from sglang_adrenaline.errors import ChannelError

Q_FLAG, A_FLAG = 512, 640
STEP, ROWS, CLOSED = 768, 776, 784
DECODE_PID = 896
DECODE_ABORT, EXECUTOR_ABORT = 1024, 1280
LANE_TABLE = 4096

_MAGIC = b"ADRSHM\x00\x01"
_VERSION = 1
_HEADER = struct.Struct("=8sI16s5I16sQ")
_ALIGN = 128
_ABORT_TEXT = 248


class Segment:
    """One mapping of a segment. Released with the last reference to it and to the tensors it handed out.

    q [2, lanes, Hq, D], o [2, lanes, Hq, Dv], lse [2, lanes, Hq]: views of the mapping.
    u32, u64: the mapping's words, indexed by byte offset // 4 and // 8; lane_table: int32 view.
    """

    def __init__(self, fd: int, shape: ChannelShape, owned: OwnedFd | None) -> None:
        self.shape = shape
        self._owned = owned  # the creator keeps it: its number is the channel's address
        self._peer: WatchedProcess | None = None
        self.mapping = mmap.mmap(fd, _total_bytes(shape))
        self._anchor = ctypes.c_char.from_buffer(self.mapping)
        self.address = ctypes.addressof(self._anchor)
        self.u32 = memoryview(self.mapping).cast("I")
        self.u64 = memoryview(self.mapping).cast("Q")
        self.lane_table = memoryview(self.mapping)[LANE_TABLE : LANE_TABLE + 4 * shape.lanes].cast("i")
        q_at, o_at, lse_at, _ = _offsets(shape)
        dtype = DTYPES[shape.dtype]
        self.q = self._tensor(q_at, dtype, shape.num_qo_heads, shape.head_dim)
        self.o = self._tensor(o_at, dtype, shape.num_qo_heads, shape.v_head_dim)
        self.lse = self._tensor(lse_at, torch.float32, shape.num_qo_heads)

    def _tensor(self, offset: int, dtype: torch.dtype, *row: int) -> torch.Tensor:
        full = (2, self.shape.lanes, *row)
        count = torch.Size(full).numel()
        return torch.frombuffer(self.mapping, dtype=dtype, count=count, offset=offset).view(full)

    def write_abort(self, where: int, reason: str) -> None:
        """Leave the reason and then raise the abort word at `where`."""
        text = reason.encode()[:_ABORT_TEXT]
        at = where + 8
        self.mapping[at : at + len(text)] = text
        self.u32[where // 4 + 1] = len(text)
        self.u32[where // 4] = 1

    def read_abort(self, where: int) -> str:
        length = min(self.u32[where // 4 + 1], _ABORT_TEXT)
        return bytes(self.mapping[where + 8 : where + 8 + length]).decode(errors="replace")

    def watch(self, peer: WatchedProcess) -> None:
        """From now on `peer_died` tells about that process."""
        self._peer = peer

    def peer_died(self) -> bool:
        """Whether the watched process has ended (or decode opened the segment and has ended since)."""
        if self._peer is None:
            pid = self.u64[DECODE_PID // 8]
            if pid == 0:
                return False
            try:
                self.watch(WatchedProcess(pid))
            except ChannelError:
                return True
        assert self._peer is not None
        return self._peer.has_ended()


def create(shape: ChannelShape) -> tuple[Segment, ChannelSpec]:
    """Make a segment of zeros with its header, and the spec by which another process opens it. Raises ChannelError."""
    token = secrets.token_hex(16)
    owned = memfd.create("sglang-adrenaline", _total_bytes(shape))
    try:
        segment = Segment(owned.fd, shape, owned)
    except OSError as error:
        raise ChannelError(f"cannot map {_total_bytes(shape)} bytes of shared memory: {error}") from None
    segment.mapping[: _HEADER.size] = _header(shape, token)
    return segment, ChannelSpec(kind="shm", address=memfd.address(owned), token=token, shape=shape)


def open_(spec: ChannelSpec) -> Segment:
    """Map the segment that another process of this user on this host created. Raises ChannelError."""
    with memfd.opened(spec.address, _total_bytes(spec.shape)) as (fd, creator):
        segment = Segment(fd, spec.shape, None)
    if segment.mapping[: _HEADER.size] != _header(spec.shape, spec.token):
        raise ChannelError(f"{spec.address} is another channel than the one offered (stale or another version)")
    if segment.u64[DECODE_PID // 8]:
        raise ChannelError(f"the channel is in use by process {segment.u64[DECODE_PID // 8]} already")
    segment.watch(creator)
    segment.u64[DECODE_PID // 8] = os.getpid()
    return segment


def _header(shape: ChannelShape, token: str) -> bytes:
    sizes = (shape.lanes, shape.num_layers, shape.num_qo_heads, shape.head_dim, shape.v_head_dim)
    dtype = shape.dtype.encode()
    return _HEADER.pack(_MAGIC, _VERSION, bytes.fromhex(token), *sizes, dtype, _total_bytes(shape))


def _offsets(shape: ChannelShape) -> tuple[int, int, int, int]:
    """Where q, o, lse and the end are, in bytes."""
    rows = 2 * shape.lanes * shape.num_qo_heads
    itemsize = DTYPES[shape.dtype].itemsize
    q_at = _aligned(LANE_TABLE + 4 * shape.lanes)
    o_at = _aligned(q_at + rows * shape.head_dim * itemsize)
    lse_at = _aligned(o_at + rows * shape.v_head_dim * itemsize)
    return q_at, o_at, lse_at, _aligned(lse_at + rows * 4)


def _total_bytes(shape: ChannelShape) -> int:
    return _offsets(shape)[3]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
