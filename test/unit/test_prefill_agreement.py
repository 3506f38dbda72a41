"""Ranks of a prefill server lock and unlock the same prefixes in the same loops, whatever reaches each of them when."""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_adrenaline.prefill.agreement import agreed_length, ended_everywhere
from sglang_adrenaline.prefill.pins import NackReason, PinTable
from sglang_adrenaline.ranks import Ranks

LOOPS, ROOMS, SPLIT = 12, 8, 5
WAIT_S = 20.0


class Meeting:
    """In place of the collective, between threads: a rank that comes alone, or with other numbers, breaks it."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=WAIT_S)
        self._said: list[list[int]] = [[] for _ in range(size)]

    def lowest(self, rank: int, values: Sequence[int]) -> list[int]:
        self._said[rank] = list(values)
        self._barrier.wait()
        result = [min(column) for column in zip(*self._said, strict=True)]
        self._barrier.wait()
        return result


@dataclass(frozen=True)
class MetRanks(Ranks):
    def lowest(self, values: Sequence[int]) -> list[int]:
        return self.cpu_group.lowest(self.tp_rank, values) if values else []


@dataclass
class Rank:
    """One rank of a server; messages reach it at random. `locked` is what its tree has locked, by loop."""

    ranks: Ranks
    seed: int
    peer_dies: bool
    pins: PinTable = field(default_factory=lambda: PinTable(pool_tokens=1000, num_slots=1001, max_fraction=1.0))
    tree: set[int] = field(default_factory=set)
    locked: list[frozenset[int]] = field(default_factory=list)

    def run(self, computed_at: dict[int, int]) -> None:
        """`computed_at`: loop in which a room's prompt is computed, equal on all ranks."""
        rng = random.Random(self.seed)
        self.pins.peer_joined("decode", ROOMS)
        offers = {room: rng.randrange(LOOPS) for room in range(ROOMS)}
        ends = {room: rng.randrange(LOOPS) for room in range(ROOMS)}
        steps = 0
        for loop in range(LOOPS + 1):
            for room in range(ROOMS):
                if offers[room] == loop:
                    self.pins.offer("decode", room, SPLIT, SPLIT)
            for room in range(ROOMS):
                if ends[room] == loop or loop == LOOPS:
                    self.pins.end("decode", room, rng.choice([0, steps + 1]))
            if loop == LOOPS or (self.peer_dies and rng.random() < 0.1):
                self.pins.peer_left("decode")
            for room in range(ROOMS):
                if computed_at[room] == loop:
                    self._computed(room)
            steps += rng.randrange(2)
            self._pump(steps)
            self.locked.append(frozenset(self.tree))

    def _computed(self, room: int) -> None:
        claim = self.pins.claim(room, lambda: "")
        length = agreed_length(self.ranks, claim)
        if length:
            self.tree.add(room)
            self.pins.pin(claim, np.arange(1 + room, 1 + room + length), room)
        elif claim is not None:
            self.pins.refuse(claim, NackReason.NOT_CACHED)

    def _pump(self, steps: int) -> None:
        for pin in self.pins.collect(ended_everywhere(self.ranks, self.pins, lambda peer: steps)):
            self.tree.remove(pin.handle)
            self.pins.release_lane(pin)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(0, 2**32), st.booleans())
def test_trees_are_locked_alike_in_every_loop_and_all_is_given_back(size, seed, peer_dies):
    rng = random.Random(seed)
    computed_at = {room: rng.randrange(LOOPS) for room in range(ROOMS)}
    meeting = Meeting(size)
    ranks = [Rank(MetRanks(r, size, meeting), rng.randrange(2**32), peer_dies) for r in range(size)]
    threads = [threading.Thread(target=rank.run, args=(computed_at,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    assert all(len(rank.locked) == LOOPS + 1 for rank in ranks), "a rank was left alone"
    assert len({tuple(rank.locked) for rank in ranks}) == 1
    for rank in ranks:
        counts = rank.pins.counts()
        assert (rank.tree, counts.pinned_tokens, counts.lanes_in_use) == (set(), 0, 0)


def test_prefixes_do_get_locked():
    """Else the test above would show nothing."""
    meeting, everywhere = Meeting(1), dict.fromkeys(range(ROOMS), 2)
    rank = Rank(MetRanks(0, 1, meeting), 3, peer_dies=False)
    rank.run(everywhere)
    assert any(rank.locked)


def test_reservations_of_different_length_are_not_locked():
    class Other(Ranks):
        def lowest(self, values):
            return [min(values[0], 7), min(values[1], -7)]

    pins = PinTable(pool_tokens=100, num_slots=101, max_fraction=1.0)
    pins.peer_joined("a", 1)
    pins.offer("a", 1, 5, 10)
    assert agreed_length(Other(0, 2), pins.claim(1, lambda: "")) is None
    assert agreed_length(Ranks(0, 1), None) == 0
