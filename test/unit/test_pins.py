"""Pins, lanes and the cap: random request mixes against a model of what must hold, and single rules."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from sglang_adrenaline import policy
from sglang_adrenaline.prefill.pins import NackReason, PinTable

POOL = 400
FRACTION = 0.8
LANES = 4


def table(**kwargs) -> PinTable:
    return PinTable(pool_tokens=POOL, num_slots=POOL + 1, max_fraction=FRACTION, **kwargs)


def collect(pins, steps_done):
    rooms = pins.pinned_rooms()
    over = pins.are_over(rooms, steps_done)
    return pins.collect([room for room, ended in zip(rooms, over, strict=True) if ended])


def pin(pins, room, slots, handle):
    claim = pins.claim(room, lambda: "")
    assert claim is not None
    pins.pin(claim, slots, handle)
    return claim


@dataclass
class Tree:
    """A radix tree reduced to its locks: lock counts per slot."""

    locks: np.ndarray = field(default_factory=lambda: np.zeros(POOL + 1, dtype=int))

    def lock(self, slots):
        self.locks[slots] += 1
        return slots

    def unlock(self, slots):
        self.locks[slots] -= 1


@dataclass
class Request:
    room: int
    peer: str
    split: int


class Mix(RuleBasedStateMachine):
    """Decode instances come and go; requests with any split end in any phase; steps are answered late."""

    requests = Bundle("requests")
    peers = Bundle("peers")

    def __init__(self) -> None:
        super().__init__()
        self.table = table(max_tombstones=3)
        self.tree = Tree()
        self.policy = policy.State()
        self.num_peers = 0
        self.num_rooms = 0
        self.alive: set[str] = set()
        self.steps_begun: dict[str, int] = {}
        self.steps_done: dict[str, int] = {}
        self.reserved: set[int] = set()
        self.pinned: dict[int, Request] = {}
        self.attached: dict[tuple[str, int], int] = {}

    @rule(target=peers)
    def join(self):
        self.num_peers += 1
        peer = f"decode#{self.num_peers}"
        self.table.peer_joined(peer, LANES)
        self.alive.add(peer)
        self.steps_begun[peer] = self.steps_done[peer] = 0
        return peer

    @rule(target=requests, peer=peers, length=st.integers(1, 300), wish=st.none() | st.integers(-1, 300))
    def offer(self, peer, length, wish):
        wish = wish if wish is None or wish <= length else length
        rules = policy.Settings(ratio=0.7, min_tokens=1, page_size=1)
        split, self.policy = policy.decide(self.policy, length, wish, rules)
        self.num_rooms += 1
        request = Request(self.num_rooms, peer, split)
        before = self.table.counts()
        reason = self.table.offer(peer, request.room, split, length)
        if reason is None:
            self.reserved.add(request.room)
        elif reason is NackReason.POOL_FULL:
            assert before.pinned_tokens + before.reserved_tokens + split > FRACTION * POOL
        elif reason is NackReason.NO_LANE:
            assert sum(p == peer for p, _ in self.attached) <= LANES
        elif reason is NackReason.UNKNOWN_PEER:
            assert peer not in self.alive
        else:
            assert reason is NackReason.BAD_OFFER and split == 0
        return request

    @rule(request=requests, shared=st.booleans(), start=st.integers(1, 100), ends_meanwhile=st.booleans())
    def prefill(self, request, shared, start, ends_meanwhile):
        """Prefill is done; a shared prompt has the slots of another, others get any."""
        start = 1 if shared else start
        slots = np.arange(start, start + request.split)
        claim = self.claim(request)
        if claim is None:
            return
        if ends_meanwhile:
            assert self.table.end(request.peer, request.room, 0)
        self.table.pin(claim, slots, self.tree.lock(slots))
        self.pinned[request.room] = request
        assert (claim.peer, claim.lane) not in self.attached
        self.attached[claim.peer, claim.lane] = request.room

    def claim(self, request):
        claim = self.table.claim(request.room, lambda: "")
        assert (claim is not None) == (request.room in self.reserved)
        assert self.table.claim(request.room, lambda: "") is None
        self.reserved.discard(request.room)
        return claim

    @rule(request=requests)
    def lost_from_cache(self, request):
        claim = self.claim(request)
        if claim is not None:
            assert self.table.refuse(claim, NackReason.NOT_CACHED)

    @rule(peer=peers)
    def begin_step(self, peer):
        self.steps_begun[peer] += 1

    @rule(peer=peers)
    def answer_steps(self, peer):
        self.steps_done[peer] = self.steps_begun[peer]

    @rule(request=consumes(requests))
    def end(self, request):
        known = self.table.end(request.peer, request.room, self.steps_begun[request.peer])
        again = self.table.end(request.peer, request.room, self.steps_begun[request.peer])
        assert not again
        if request.room in self.reserved:
            assert known
            self.reserved.discard(request.room)

    @rule(request=requests, peer=peers)
    def end_of_a_stranger(self, request, peer):
        if peer != request.peer:
            assert not self.table.end(peer, request.room, 0)

    @rule(peer=consumes(peers))
    def lose(self, peer):
        promised = {p.room for p in self.table.held() if p.peer == peer and p.room not in self.pinned}
        self.table.peer_left(peer)
        self.alive.discard(peer)
        self.reserved -= promised

    @rule()
    def pump(self):
        for pin in collect(self.table, lambda peer: self.steps_done[peer]):
            assert pin.peer not in self.alive or self.steps_done[pin.peer] >= pin.last_step
            del self.attached[pin.peer, pin.lane]
            del self.pinned[pin.room]
            self.tree.unlock(pin.handle)
            self.table.release_lane(pin)

    @invariant()
    def holds(self):
        counts = self.table.counts()
        assert counts.pinned_tokens == (self.tree.locks > 0).sum()
        assert counts.pinned_tokens + counts.reserved_tokens <= FRACTION * POOL
        assert counts.reserved_requests == len(self.reserved)
        assert counts.pinned_requests == len(self.pinned)
        assert counts.lanes_in_use == len(self.reserved) + len(self.pinned)
        assert counts.tombstones <= 3
        assert (self.tree.locks >= 0).all()

    def teardown(self):
        for peer in list(self.alive):
            self.table.peer_left(peer)
        self.alive.clear()
        self.reserved.clear()
        self.pump()
        counts = self.table.counts()
        assert (counts.pinned_tokens, counts.reserved_tokens, counts.lanes_in_use) == (0, 0, 0)
        assert (self.tree.locks == 0).all()
        for number in range(1, self.num_peers + 1):
            assert self.table.forget_peer(f"decode#{number}")
        assert not self.table._pins


Mix.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestRandomMix = Mix.TestCase


def test_offer_peer_never_joined_is_refused():
    assert table().offer("nobody", 1, 5, 10) is NackReason.UNKNOWN_PEER


@pytest.mark.parametrize(("split", "length"), [(0, 10), (-1, 10), (11, 10)])
def test_offer_impossible_split_is_refused(split, length):
    pins = table()
    pins.peer_joined("a", 1)
    assert pins.offer("a", 1, split, length) is NackReason.BAD_OFFER


def test_offer_room_twice_is_refused_and_counted():
    pins = table()
    pins.peer_joined("a", 2)
    assert pins.offer("a", 1, 5, 10) is None
    assert pins.offer("a", 1, 5, 10) is NackReason.DUPLICATE_ROOM
    assert pins.nacks == {"duplicate_room": 1}


def test_tombstone_expires_by_time():
    now = [0.0]
    pins = table(tombstone_ttl=10.0, clock=lambda: now[0])
    pins.peer_joined("a", 2)
    for room in (1, 2):
        assert pins.offer("a", room, 5, 10) is None
        assert pins.end("a", room, 0)
        now[0] += 11.0
    assert pins.lookup(1) is None and pins.lookup(2) is not None


def test_collect_waits_for_the_last_step():
    pins = table()
    pins.peer_joined("a", 1)
    pins.offer("a", 1, 5, 10)
    pin(pins, 1, np.arange(1, 6), "lock")
    pins.end("a", 1, last_step=3)
    assert collect(pins, lambda _: 2) == []
    assert [done.room for done in collect(pins, lambda _: 3)] == [1]


def test_claim_of_a_pinned_room_is_none():
    """A second request of the room, whose prompt the tree may not hold, must not take the first one's pin away."""
    pins = table()
    pins.peer_joined("a", 1)
    pins.offer("a", 1, 5, 10)
    pin(pins, 1, np.arange(1, 6), "lock")
    assert pins.claim(1, lambda: "") is None
    assert pins.counts().pinned_tokens == 5
    assert pins.end("a", 1, 0) and [done.handle for done in collect(pins, lambda _: 0)] == ["lock"]


def test_claim_for_another_prompt_is_none_and_leaves_the_reservation():
    pins = table()
    pins.peer_joined("a", 1)
    pins.offer("a", 1, 5, 10, "this prompt")
    assert pins.claim(1, lambda: "another") is None
    assert pins.claim(1, lambda: "this prompt") is not None


def test_end_between_claim_and_refusal_gives_all_back():
    pins = table()
    pins.peer_joined("a", 1)
    pins.offer("a", 1, 5, 10)
    claim = pins.claim(1, lambda: "")
    assert claim is not None and pins.end("a", 1, 0)
    assert not pins.refuse(claim, NackReason.NOT_CACHED)
    assert pins.counts().lanes_in_use == 0 and pins.nacks == {}
    assert pins.offer("a", 2, 5, 10) is None


def test_lanes_lowest_free_one_is_given():
    pins = table()
    pins.peer_joined("a", LANES)
    for room in range(LANES):
        assert pins.offer("a", room, 1, 1) is None
    for room in (2, 0):
        pins.end("a", room, 0)  # a reservation: its lane is free at once
    for room in (10, 11):
        assert pins.offer("a", room, 1, 1) is None
    assert [pins.lookup(room).lane for room in (1, 3, 10, 11)] == [1, 3, 0, 2]
