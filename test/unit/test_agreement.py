"""Ranks of a decode server agree on every request, whatever each of them hears, and when."""

import random
import threading
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.decode.agreement import NOT_MINE, hear, say
from sglang_adrenaline.decode.offload import Offload, OffloadState, Word
from sglang_adrenaline.ranks import Ranks

OVER = (OffloadState.LOCAL, OffloadState.FAILED)
LINK = object()


def offload(room: int, *, split_open: bool = False) -> Offload:
    split = 0 if split_open else 100
    return Offload(None, room, ("host", 1), split, 200, 0.0, forced=False, split_open=split_open)


@dataclass
class Server:
    """`ranks[r]` holds rank r's requests, in order of arrival. Nothing but `loop` goes from rank to rank."""

    size: int
    ranks: list[dict[int, Offload]] = field(default_factory=list)
    said_no: set[int] = field(default_factory=set)
    over: dict[int, OffloadState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = [{} for _ in range(self.size)]

    def arrive(self, room: int, split_open: bool) -> None:
        for requests in self.ranks:
            requests[room] = offload(room, split_open=split_open)

    def loop(self) -> None:
        """As every rank's scheduler does it: say, take the lowest, hear; requests that are over leave on all."""
        said = [say(list(r.values()), decides=rank == 0) for rank, r in enumerate(self.ranks)]
        assert len({len(values) for values in said}) == 1, "the ranks' requests differ"
        lowest = [min(values) for values in zip(*said, strict=True)]
        for requests in self.ranks:
            hear(list(requests.values()), lowest)
        for room in list(self.ranks[0]):
            states = {requests[room].state for requests in self.ranks}
            assert len(states) == 1, f"request {room}: {states}"
            assert len({(requests[room].split_open, requests[room].remote_prefix_len) for requests in self.ranks}) == 1
            state = states.pop()
            if state is OffloadState.READY:
                assert all(requests[room].lane >= 0 for requests in self.ranks), "READY, but not on all ranks"
            if state in OVER:
                assert room in self.said_no
                self.over[room] = state
                for requests in self.ranks:
                    del requests[room]

    def hears(self, rank: int, room: int, what: str) -> None:
        """A message, a timer or a loss on one rank, as `DecodeRuntime` handles it."""
        request = self.ranks[rank].get(room)
        if request is None:
            return
        if what == "split" and rank == 0 and request.split_open:
            request.remote_prefix_len, request.link = 100, LINK
        elif what == "offer" and not request.split_open:
            request.link = LINK
        elif what == "accept" and request.link is not None:
            request.accept()
        elif what == "ready":
            request.ready(lane=rank)
        elif what == "time-out":
            request.decline()
        elif what == "lost":
            request.lose("lost")
        if request.word is Word.NO:
            self.said_no.add(room)


EVENTS = ("split", "offer", "accept", "ready", "time-out", "lost")


@given(st.integers(2, 4), st.integers(0, 2**32), st.sampled_from([0.0, 0.02, 0.3]))
def test_ranks_never_differ_whatever_they_hear(size, seed, trouble):
    rng = random.Random(seed)
    weights = [1.0, 1.0, 1.0, 1.0, trouble, trouble]
    server = Server(size)
    for room in range(6):
        server.arrive(room, split_open=rng.random() < 0.5)
        for _ in range(rng.randrange(12)):
            for _ in range(rng.randrange(5)):
                what = rng.choices(EVENTS, weights)[0]
                server.hears(rng.randrange(size), rng.randrange(room + 1), what)
            server.loop()
    accepted = {room for room, request in server.ranks[0].items() if request.is_remote}
    for room in accepted:  # whoever is the last to hear of a loss
        server.hears(size - 1, room, "lost")
    server.loop()
    assert all(server.over[room] is OffloadState.FAILED for room in accepted)


@given(st.integers(2, 4), st.permutations(range(8)), st.integers(0, 2**32))
def test_without_trouble_every_request_gets_ready_on_all_ranks(size, order, seed):
    rng = random.Random(seed)
    server = Server(size)
    for room in order:
        server.arrive(room, split_open=bool(room % 2))
    for _ in range(4):  # each loop at least one more word is known everywhere
        todo = [(rank, room, what) for what in EVENTS[:4] for rank in range(size) for room in order]
        rng.shuffle(todo)
        for rank, room, what in todo:
            server.hears(rank, room, what)
        server.loop()
    for what in EVENTS[:4]:
        for rank in range(size):
            for room in order:
                server.hears(rank, room, what)
        server.loop()
    assert Counter(r.state for requests in server.ranks for r in requests.values()) == {OffloadState.READY: 8 * size}


def test_one_refusal_before_all_accepted_makes_it_local_after_that_it_fails():
    early, late = Server(2), Server(2)
    for server in (early, late):
        server.arrive(1, split_open=False)
        for rank in (0, 1):
            server.hears(rank, 1, "offer")
        server.hears(0, 1, "accept")
        server.loop()
        assert server.ranks[0][1].undecided
    early.hears(1, 1, "lost")
    late.hears(1, 1, "accept")
    late.loop()
    late.hears(1, 1, "lost")
    other = late.ranks[0][1]
    for server in (early, late):
        server.loop()
    assert (early.over[1], late.over[1]) == (OffloadState.LOCAL, OffloadState.FAILED)
    assert "prefill host:1 held the prompt's KV" in other.failure


def test_split_is_the_first_ranks_alone():
    first, second = offload(1, split_open=True), offload(1, split_open=True)
    second.remote_prefix_len = 7  # not to be asked
    assert say([second], decides=False) == [Word.WAITING, NOT_MINE]
    first.remote_prefix_len = 120
    hear([second], say([first], decides=True))
    assert second.remote_prefix_len == 120 and not second.split_open


@pytest.mark.parametrize("size", [1, 3])
def test_lowest_over_gloo(size, tmp_path):
    """The real collective, between threads that each have a process group of their own."""
    store = dist.FileStore(str(tmp_path / "store"), size)
    answers: dict[int, list[int]] = {}

    def run(rank: int) -> None:
        group = None if size == 1 else dist.ProcessGroupGloo(dist.PrefixStore("t", store), rank, size)
        ranks = Ranks(rank, size, group)
        assert ranks.lowest([]) == []
        answers[rank] = ranks.lowest([rank, 2**62 if rank else 5, -rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {rank: [0, 5, 1 - size] for rank in range(size)}
