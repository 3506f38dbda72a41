"""Bookkeeping of offloaded requests on the prefill side: reservations, pins, lanes and the cap on pinned tokens.

Knows nothing of SGLang or sockets, but is safe to call from two threads: the control thread (offer, end, peer_left)
and the scheduler thread (claim, pin, collect). What has to be done to the radix tree and to the executor is returned to
the scheduler thread, which alone may touch them.

A room's life:

    offer -> RESERVED -- claim --> CLAIMED -- pin --> PINNED -- end --> ENDING -- collect --> gone
                 |                    `------------- end ------------>--'
                 `-- end --> CANCELLED -- claim refuses, or time-out --> gone

CANCELLED is the tombstone of an END that overtook the pin: prefill may still be computing a prompt nobody waits for.
Between claim and pin the scheduler thread locks the radix tree; all tensor-parallel ranks do, or none. So from a claim
on an END only marks the room, and the lock is undone with all others, in `collect`.
"""

from __future__ import annotations

import enum
import heapq
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]


class PinState(enum.Enum):
    RESERVED = "reserved"
    CLAIMED = "claimed"
    PINNED = "pinned"
    ENDING = "ending"
    CANCELLED = "cancelled"


class NackReason(enum.StrEnum):
    """Why an offer was refused; the values travel in messages and are metric labels."""

    NO_LANE = "no_lane"
    POOL_FULL = "pool_full"
    DUPLICATE_ROOM = "duplicate_room"
    BAD_OFFER = "bad_offer"
    UNKNOWN_PEER = "unknown_peer"
    NOT_CACHED = "not_cached"
    EXECUTOR_DOWN = "executor_down"


@dataclass
class Pin:
    """One offloaded request. `slots` and `handle` are set from `pin` on: then the tree is locked."""

    room: int
    peer: str
    remote_prefix_len: int
    lane: int
    prompt_digest: str = ""
    state: PinState = PinState.RESERVED
    slots: Slots | None = None
    handle: Any = None
    """What the radix tree needs to unlock; opaque here."""
    last_step: int = 0
    cancelled_at: float = 0.0


@dataclass
class _Peer:
    free_lanes: list[int]
    """A heap: the lowest lane goes first, since an executor's work goes by the highest one in use."""
    alive: bool = True


@dataclass
class PinCounts:
    """pinned_tokens counts each KV slot once, however many requests share it; reserved_tokens are only promised."""

    reserved_requests: int
    pinned_requests: int
    reserved_tokens: int
    pinned_tokens: int
    lanes_in_use: int
    tombstones: int


@dataclass
class PinTable:
    """All pins of one prefill rank.

    pool_tokens     size of the KV pool; num_slots: rows of its tensors
    max_fraction    share of it that reservations and pins together may take
    max_tombstones, tombstone_ttl   bounds on remembered ENDs (count, seconds)
    """

    pool_tokens: int
    num_slots: int
    max_fraction: float
    max_tombstones: int = 4096
    tombstone_ttl: float = 900.0
    clock: Callable[[], float] = time.monotonic
    nacks: dict[str, int] = field(default_factory=dict)
    _pins: dict[int, Pin] = field(default_factory=dict)
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pinned_tokens: int = 0

    def __post_init__(self) -> None:
        self._slot_refs = np.zeros(self.num_slots, dtype=np.int32)  # makes shared prefixes count once

    # ---- control thread -------------------------------------------------------------------------------------------

    def peer_joined(self, peer: str, lanes: int) -> None:
        """A decode instance may use lanes 0..lanes-1 from now on."""
        with self._lock:
            self._peers[peer] = _Peer(free_lanes=list(range(lanes)))

    def offer(
        self, peer: str, room: int, remote_prefix_len: int, prompt_len: int, prompt_digest: str = ""
    ) -> NackReason | None:
        """Reserve a lane and tokens for a request that prefill has not computed yet. None means accepted."""
        with self._lock:
            reason = self._refusal(peer, room, remote_prefix_len, prompt_len)
            if reason is not None:
                self.nacks[reason.value] = self.nacks.get(reason.value, 0) + 1
                return reason
            lane = heapq.heappop(self._peers[peer].free_lanes)
            self._pins[room] = Pin(room, peer, remote_prefix_len, lane, prompt_digest)
            return None

    def _refusal(self, peer: str, room: int, remote_prefix_len: int, prompt_len: int) -> NackReason | None:
        state = self._peers.get(peer)
        if state is None or not state.alive:
            return NackReason.UNKNOWN_PEER
        if not 0 < remote_prefix_len <= prompt_len:
            return NackReason.BAD_OFFER
        if room in self._pins:
            return NackReason.DUPLICATE_ROOM
        if not state.free_lanes:
            return NackReason.NO_LANE
        promised = self._reserved_tokens() + self._pinned_tokens + remote_prefix_len
        if promised > self.max_fraction * self.pool_tokens:
            return NackReason.POOL_FULL
        return None

    def end(self, peer: str, room: int, last_step: int) -> bool:
        """The request is over; its last step is `last_step`. False if the peer has no such room (a replay, say)."""
        with self._lock:
            pin = self._pins.get(room)
            if pin is None or pin.peer != peer or pin.state in (PinState.ENDING, PinState.CANCELLED):
                return False
            self._end(pin, last_step)
            return True

    def peer_left(self, peer: str) -> int:
        """End everything the peer holds and return how many requests that were. Its executor has been stopped."""
        with self._lock:
            state = self._peers.get(peer)
            if state is not None:
                state.alive = False
            held = [p for p in self._pins.values() if p.peer == peer and p.state is not PinState.CANCELLED]
            for pin in held:
                self._end(pin, last_step=0)
            return len(held)

    def _end(self, pin: Pin, last_step: int) -> None:
        if pin.state is PinState.RESERVED:
            pin.state = PinState.CANCELLED
            pin.cancelled_at = self.clock()
            self._free_lane(pin)
            self._drop_old_tombstones()
        else:
            pin.state = PinState.ENDING
            pin.last_step = last_step

    def _drop_old_tombstones(self) -> None:
        tombs = [p for p in self._pins.values() if p.state is PinState.CANCELLED]  # in order of offer, near enough
        expired = [p for p in tombs if self.clock() - p.cancelled_at > self.tombstone_ttl]
        for pin in expired + tombs[: max(0, len(tombs) - len(expired) - self.max_tombstones)]:
            self._pins.pop(pin.room, None)

    # ---- scheduler thread -----------------------------------------------------------------------------------------

    def lookup(self, room: int) -> Pin | None:
        """The reservation, pin or tombstone of a room."""
        with self._lock:
            return self._pins.get(room)

    def claim(self, room: int, digest: Callable[[], str]) -> Pin | None:
        """The reservation of the request that was computed, for `pin` or `refuse`; None if it has none.

        digest  names its prompt: a second request of a room is not taken for the first (a client chose the number)
        """
        with self._lock:
            pin = self._pins.get(room)
            if pin is None or pin.state not in (PinState.RESERVED, PinState.CANCELLED):
                return None
            if pin.prompt_digest != digest():
                return None
            if pin.state is PinState.CANCELLED:
                del self._pins[room]
                return None
            pin.state = PinState.CLAIMED
            return pin

    def pin(self, pin: Pin, slots: Slots, handle: Any) -> None:
        """Turn a claim into a pin of `slots` [remote_prefix_len]; the tree is locked by `handle` already.

        If the request ended since it was claimed, it stays ENDING, and is collected as others are.
        """
        with self._lock:
            assert pin.slots is None and len(slots) == pin.remote_prefix_len, (pin, len(slots))
            self._slot_refs[slots] += 1
            self._pinned_tokens += int((self._slot_refs[slots] == 1).sum())
            pin.slots, pin.handle = slots, handle
            if pin.state is PinState.CLAIMED:
                pin.state = PinState.PINNED

    def refuse(self, pin: Pin, reason: NackReason) -> bool:
        """Give up a claim that cannot be pinned. False if it ended already: then nobody waits for a word of it."""
        with self._lock:
            del self._pins[pin.room]
            self._free_lane(pin)
            if pin.state is not PinState.CLAIMED:
                return False
            self.nacks[reason.value] = self.nacks.get(reason.value, 0) + 1
            return True

    def pinned_rooms(self) -> list[int]:
        """Rooms for which the tree is locked, ascending: an order that all ranks share."""
        with self._lock:
            return sorted(pin.room for pin in self._pins.values() if pin.slots is not None)

    def are_over(self, rooms: Sequence[int], steps_done: Callable[[str], int]) -> list[bool]:
        """Of each pinned room whether its END has come and its last step was answered.

        `steps_done(peer)` is the last step the peer's executor answered.
        """
        with self._lock:
            return [self._is_over(self._pins[room], steps_done) for room in rooms]

    def _is_over(self, pin: Pin, steps_done: Callable[[str], int]) -> bool:
        if pin.state is not PinState.ENDING:
            return False
        return pin.last_step == 0 or not self._peers[pin.peer].alive or steps_done(pin.peer) >= pin.last_step

    def collect(self, rooms: Iterable[int]) -> list[Pin]:
        """Take out pinned rooms that are over (on all ranks).

        The caller detaches each pin's lane *before* it unlocks the slots, and calls `release_lane` after, so that a
        lane never names two requests.
        """
        with self._lock:
            done = [self._pins.pop(room) for room in rooms]
            for pin in done:
                assert pin.slots is not None
                self._slot_refs[pin.slots] -= 1
                self._pinned_tokens -= int((self._slot_refs[pin.slots] == 0).sum())
            return done

    def release_lane(self, pin: Pin) -> None:
        with self._lock:
            self._free_lane(pin)

    def _free_lane(self, pin: Pin) -> None:
        heapq.heappush(self._peers[pin.peer].free_lanes, pin.lane)

    def forget_peer(self, peer: str) -> bool:
        """Drop the lanes and tombstones of a peer that left, once nothing of it is held; whether that is so."""
        with self._lock:
            state = self._peers.get(peer)
            if state is None:
                return True
            if state.alive or any(p.peer == peer for p in self._live()):
                return False
            del self._peers[peer]
            for pin in [p for p in self._pins.values() if p.peer == peer]:
                del self._pins[pin.room]
            return True

    def has_ending(self) -> bool:
        with self._lock:
            return any(pin.state is PinState.ENDING for pin in self._pins.values())

    def held(self) -> list[Pin]:
        """Reservations and pins that are not over."""
        with self._lock:
            over = (PinState.ENDING, PinState.CANCELLED)
            return [p for p in self._pins.values() if p.state not in over]

    def lanes_in_use(self, peer: str) -> int:
        with self._lock:
            return sum(pin.peer == peer for pin in self._live())

    def counts(self) -> PinCounts:
        with self._lock:
            live = self._live()
            return PinCounts(
                reserved_requests=sum(p.slots is None for p in live),
                pinned_requests=sum(p.slots is not None for p in live),
                reserved_tokens=self._reserved_tokens(),
                pinned_tokens=self._pinned_tokens,
                lanes_in_use=len(live),
                tombstones=len(self._pins) - len(live),
            )

    def _live(self) -> list[Pin]:
        return [p for p in self._pins.values() if p.state is not PinState.CANCELLED]

    def _reserved_tokens(self) -> int:
        return sum(p.remote_prefix_len for p in self._live() if p.slots is None)
