"""KV transfer engine for GPUs of one host: the prefill scheduler writes into decode's memory through CUDA IPC.

Decode publishes what SGLang registers, with the IPC handles of the allocations that hold it (`published.py`). Prefill
opens them once, on its own GPU, and one kernel copies (`copier.py`). Metadata, which SGLang keeps in ordinary memory,
goes by `process_vm`. No SGLang import.

One lock serialises all that a sender does with peers: two copies at a time would share the same link. Mappings keep a
dead process's GPU memory alive, so a thread closes them as soon as their process ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from sglang_adrenaline.channel.ipc_memory import PeerMemory
from sglang_adrenaline.channel.memfd import has_ended
from sglang_adrenaline.errors import ChannelError, ConfigError
from sglang_adrenaline.transfer import copy_kernel, cuda_memory
from sglang_adrenaline.transfer.copier import Copier
from sglang_adrenaline.transfer.process_vm import ProcessVmEngine, Session, check_alive, open_process
from sglang_adrenaline.transfer.published import PublishedSession, TableReader, TableWriter
from sglang_adrenaline.transfer.regions import HOST, Allocation, Region, RegionIndex, Regions, int64

logger = logging.getLogger(__name__)

TRANSFER_TIMEOUT_S = 60.0
"""For one call, waiting for its turn included."""

_REAP_S = 0.5  # until the reaping thread sees a new peer, or its own end
_REMEDY = (
    "the KV pool must come from plain cudaMalloc: start without --enable-memory-saver, expandable segments "
    "(PYTORCH_CUDA_ALLOC_CONF) and SGLANG_MOONCAKE_CUSTOM_MEM_POOL, or use --disaggregation-transfer-backend nixl"
)


class Peer:
    """A receiver as the sender sees it. Owns: pidfd, descriptor of its table, mappings of its GPU memory."""

    def __init__(self, session: PublishedSession, device: int | None) -> None:
        """Raises OSError, ValueError if its process is gone, or a stranger. `device`: ours, which copies."""
        self.session = session
        self._device = device
        self._generation = -1
        self._mapped: dict[bytes, PeerMemory] = {}
        self.pidfd = open_process(session.process)
        try:
            self._reader = TableReader(session)
        except BaseException:
            os.close(self.pidfd)
            raise

    def refresh(self) -> None:
        """Read the table if it has changed, and map what it names. Raises OSError, ValueError, ChannelError."""
        if self._reader.generation() == self._generation:
            return
        generation, table = self._reader.read()
        index = RegionIndex.of(table)
        for allocation in table.allocations:
            if allocation.handle not in self._mapped:
                if self._device is None:
                    raise ValueError("the decode server keeps KV on a GPU, this prefill server does not")
                self._mapped[allocation.handle] = PeerMemory(self._device, allocation.handle)
        wanted = {allocation.handle for allocation in table.allocations}
        for handle in [handle for handle in self._mapped if handle not in wanted]:
            self._mapped.pop(handle).free()
        shifts = [self._mapped[allocation.handle].address - allocation.base for allocation in table.allocations]
        self.index, self._shift = index, np.array([*shifts, 0], dtype=np.int64)  # [HOST] is the last: no shift
        self._generation = generation

    def local(self, addresses: np.ndarray, allocations: np.ndarray) -> np.ndarray:
        """Where our device sees these addresses of the peer."""
        return addresses + self._shift[allocations]

    def check_alive(self) -> None:
        """Raises ProcessLookupError."""
        check_alive(self.session.process.pid, self.pidfd)

    def close(self) -> None:
        for memory in self._mapped.values():
            try:
                memory.free()
            except ChannelError as error:
                logger.warning("memory of decode process %d stays mapped: %s", self.session.process.pid, error)
        self._mapped.clear()
        self._reader.close()
        os.close(self.pidfd)


class CudaIpcEngine:
    """See `local.TransferEngine`. A sender copies from registered memory into registered memory of a receiver only."""

    def __init__(self, *, receives: bool) -> None:
        """`receives`: this process is written to (decode). Raises ConfigError where the kernel forbids that."""
        self._host = ProcessVmEngine(receives=receives)
        self._writer = TableWriter() if receives else None
        self._table = Regions()
        self._index = RegionIndex.of(self._table)
        self._device: int | None = None
        self._copier: Copier | None = None
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}
        self._stop = threading.Event()
        self._reaper: threading.Thread | None = None

    def get_session_id(self) -> str:
        return str(Session.of_this_process() if self._writer is None else self._writer.session)

    # ---- registration -----------------------------------------------------------------------------------------------

    def batch_register(self, ptrs: Sequence[int], lengths: Sequence[int]) -> int:
        """Returns 0. Raises ConfigError for memory that other processes cannot map, or of two GPUs."""
        allocations, regions = list(self._table.allocations), list(self._table.regions)
        try:
            for address, num_bytes in zip(ptrs, lengths, strict=True):
                if num_bytes:
                    regions.append(self._region(int(address), int(num_bytes), allocations))
            self._replace(Regions(tuple(allocations), tuple(regions)))
        except (ChannelError, ValueError) as error:
            raise ConfigError(f"transfer backend 'local' cannot take this memory: {error}; {_REMEDY}") from None
        if self._writer is None and self._device is not None and self._copier is None:
            self._copier = Copier(self._device)
        return 0

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        """Forget the regions at `ptrs`. Does not wait for senders: stop them before the memory is freed. Returns 0."""
        gone = set(ptrs)
        regions = tuple(region for region in self._table.regions if region.address not in gone)
        self._replace(Regions(self._table.allocations, regions))
        return 0

    def _region(self, address: int, num_bytes: int, allocations: list[Allocation]) -> Region:
        device = cuda_memory.device_of(address)
        if device is None:
            return Region(address, num_bytes, HOST)
        if self._device not in (None, device):
            raise ChannelError(f"it lies on GPU {self._device} and on GPU {device}")
        self._device = device
        base, size = cuda_memory.allocation_of(device, address)
        for number, known in enumerate(allocations):
            if (known.base, known.num_bytes) == (base, size):
                return Region(address, num_bytes, number)
        allocations.append(Allocation(base, size, cuda_memory.export(device, base) if self._writer else b""))
        return Region(address, num_bytes, len(allocations) - 1)

    def _replace(self, table: Regions) -> None:
        index = RegionIndex.of(table)
        if self._writer is not None:
            self._writer.write(table)
        self._table, self._index = table, index

    # ---- sending ----------------------------------------------------------------------------------------------------

    def batch_transfer_sync(
        self, session_id: str, src_addrs: Sequence[int], dst_addrs: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """Copy `lengths[i]` bytes from `src_addrs[i]` here to `dst_addrs[i]` in the process of `session_id`.

        Returns 0 when all bytes are there, or -1 after one log line; then an unknown part of them was written.
        """
        with self._reported(session_id) as outcome:
            src, dst, sizes = int64(src_addrs, "source"), int64(dst_addrs, "target"), int64(lengths, "lengths")
            if not len(src) == len(dst) == len(sizes):
                raise ValueError(f"{len(src)} sources, {len(dst)} targets, {len(sizes)} lengths")
            src, dst, sizes = (column[sizes != 0] for column in (src, dst, sizes))
            with self._peer(session_id) as peer:
                on_host = self._index.locate(src, sizes, "source") == HOST
                dst_in = peer.index.locate(dst, sizes, "target")
                if not np.array_equal(on_host, dst_in == HOST):
                    raise ValueError("from ordinary memory to a GPU, or the other way round")
                dst = peer.local(dst, dst_in)
                pieces = np.stack([src, dst, sizes], axis=1)
                self._copy(peer, np.zeros((1, 2), dtype=np.int64), pieces[~on_host])
                if on_host.any():
                    columns = (column.tolist() for column in pieces[on_host].T)
                    if self._host.batch_transfer_sync(str(peer.session.process), *columns) != 0:
                        raise OSError("metadata did not arrive")
            outcome.append(0)
        return outcome[-1]

    def transfer_slots(
        self,
        session_id: str,
        src_ptrs: Sequence[int],
        dst_ptrs: Sequence[int],
        item_lens: Sequence[int],
        src_slots: np.ndarray,
        dst_slots: np.ndarray,
    ) -> int:
        """Copy slots of many buffers: item `src_slots[i]` of buffer b here to item `dst_slots[i]` of its buffer b.

        src_ptrs, dst_ptrs, item_lens   [num_buffers]: start of each buffer here and there, bytes of one item
        src_slots, dst_slots            int [n], any order

        As `batch_transfer_sync`, without a list entry for each of num_buffers x n ranges.
        """
        with self._reported(session_id) as outcome:
            src, dst, items = int64(src_ptrs, "source"), int64(dst_ptrs, "target"), int64(item_lens, "item lengths")
            ours, theirs = int64(src_slots, "source slots"), int64(dst_slots, "target slots")
            if not len(src) == len(dst) == len(items) or len(ours) != len(theirs):
                raise ValueError(
                    f"{len(src)} source and {len(dst)} target buffers, {len(items)} item lengths; "
                    f"{len(ours)} and {len(theirs)} slots"
                )
            with self._peer(session_id) as peer:
                if len(ours):
                    # Regions are intervals: if the lowest and the highest slot are inside one, all between them are.
                    src_in = self._index.locate(*_hull(src, items, ours), "source")
                    dst_in = peer.index.locate(*_hull(dst, items, theirs), "target")
                    if (src_in == HOST).any() or (dst_in == HOST).any():
                        raise ValueError("slots are not on a GPU")
                    bases = np.stack([src, peer.local(dst, dst_in)], axis=1)
                    for item in np.unique(items):
                        self._copy(peer, bases[items == item], copy_kernel.runs(ours, theirs, int(item)))
            outcome.append(0)
        return outcome[-1]

    def send_probe(self, session_id: str) -> int:
        """0 if the process of `session_id` lives, else -1."""
        try:
            return self._host.send_probe(str(PublishedSession.parse(session_id).process))
        except ValueError:
            return -1

    def _copy(self, peer: Peer, bases: np.ndarray, pieces: np.ndarray) -> None:
        if not len(pieces) or not len(bases):
            return
        if self._copier is None:
            raise ValueError("no GPU memory is registered here")
        self._copier.copy(bases, pieces, TRANSFER_TIMEOUT_S)
        peer.check_alive()  # its memory outlives it while we map it, so that the copy itself does not tell

    @contextlib.contextmanager
    def _reported(self, session_id: str) -> Iterator[list[int]]:
        """A list that says -1 last unless the block ends well. SGLang's threads do not survive an exception."""
        outcome = [-1]
        try:
            with cuda_memory.while_others_capture():
                yield outcome
        except Exception as error:
            logger.error("local KV transfer to %s failed: %s", session_id, str(error).partition("\n")[0] or repr(error))

    @contextlib.contextmanager
    def _peer(self, session_id: str) -> Iterator[Peer]:
        """The live receiver of that session, its table up to date, for this thread alone."""
        if not self._lock.acquire(timeout=TRANSFER_TIMEOUT_S):
            raise TimeoutError("earlier transfers did not finish in time")
        try:
            if self._stop.is_set():
                raise ValueError("the engine is closed")
            peer = self._peers.get(session_id)
            if peer is None:
                peer = Peer(_parse(session_id), self._device)
                self._peers[session_id] = peer
                self._start_reaper()
            peer.check_alive()
            peer.refresh()
            yield peer
        finally:
            self._lock.release()

    # ---- the end of peers -------------------------------------------------------------------------------------------

    def _start_reaper(self) -> None:
        if self._reaper is None:
            self._reaper = threading.Thread(target=self._reap, name="kv-transfer-reaper", daemon=True)
            self._reaper.start()

    def _reap(self) -> None:
        """Close peers whose process has ended; until `close`. Nobody else closes one before."""
        with cuda_memory.while_others_capture():
            while not self._stop.is_set():
                poller = select.poll()
                for peer in list(self._peers.values()):
                    poller.register(peer.pidfd, select.POLLIN)
                if poller.poll(_REAP_S * 1e3) and not self._close_ended():
                    self._stop.wait(_REAP_S)

    def _close_ended(self) -> bool:
        """False if that has to wait: for a transfer that is going on, or a copy that was given up."""
        if not self._lock.acquire(timeout=_REAP_S):
            return False
        try:
            if self._copier is not None and not self._copier.idle():
                return False
            for session_id in [key for key, peer in self._peers.items() if has_ended(peer.pidfd)]:
                self._peers.pop(session_id).close()
            return True
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the thread and unmap everything. Waits for a transfer that is going on, up to its time limit."""
        self._stop.set()
        if self._reaper is not None:
            self._reaper.join(TRANSFER_TIMEOUT_S)
        deadline = time.monotonic() + TRANSFER_TIMEOUT_S
        if self._lock.acquire(timeout=TRANSFER_TIMEOUT_S):
            try:
                while self._copier is not None and not self._copier.idle() and time.monotonic() < deadline:
                    time.sleep(0.01)
                for peer in self._peers.values():
                    peer.close()
                self._peers.clear()
            finally:
                self._lock.release()
        self._host.close()
        if self._writer is not None:
            self._writer.close()


def _hull(ptrs: np.ndarray, items: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(address, bytes) of the span from the lowest to the highest slot, for each buffer."""
    low, high = int(slots.min()), int(slots.max())
    if low < 0 or high >= 1 << 31 or items.min(initial=1) < 1 or items.max(initial=1) > 1 << 30:
        raise ValueError(f"slots {low} to {high} of {items.tolist()} bytes")  # what follows could pass int64
    return ptrs + low * items, (high + 1 - low) * items


def _parse(session_id: str) -> PublishedSession:
    try:
        return PublishedSession.parse(session_id)
    except ValueError:
        raise ValueError(f"not a session of transfer backend 'local' on GPUs: {session_id!r}") from None
