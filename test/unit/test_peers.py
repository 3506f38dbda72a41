"""Which prefill instances a decode rank keeps asking, and what stays of links that died."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_adrenaline.decode.peers import FORGET_S, MAX_PEERS, Peers


@dataclass
class FakeChannel:
    steps: int
    exposed_wait_s: float
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLink:
    index: int
    channel: FakeChannel
    alive: bool = True
    closed: bool = False


@dataclass
class FakePeer:
    link: Any = None
    since: float = field(default_factory=time.monotonic)
    closed: bool = False
    lost: deque = field(default_factory=deque)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made() -> dict:
    return {}


@pytest.fixture
def peers(made) -> Peers:
    def connect(address):
        if address[1] == 0:
            return None
        made[address] = FakePeer()
        return made[address]

    return Peers(connect)


def none() -> set:
    return set()


def test_an_instance_is_connected_to_once(peers, made):
    assert peers.ask(("p", 1), none)
    first = made["p", 1]
    assert peers.ask(("p", 1), none)
    assert peers["p", 1] is first
    assert not peers.ask(("p", 0), none)
    assert list(peers) == [first]


def test_one_that_has_left_is_forgotten_unless_a_request_names_it(peers, made):
    left, away, connected, named = (("p", port) for port in range(1, 5))
    for address in (left, away, connected, named):
        peers.ask(address, none)
        made[address].since = time.monotonic() - FORGET_S - 1
    made[away].since = time.monotonic()
    made[connected].link = FakeLink(0, FakeChannel(0, 0.0))
    peers.tidy(lambda: {named}, none)
    assert [address for address, peer in made.items() if peer.closed] == [left]
    assert list(peers) == [made[address] for address in (away, connected, named)]


def test_their_number_is_bounded_and_idle_strangers_make_room(peers, made):
    addresses = [("p", port) for port in range(1, MAX_PEERS + 1)]
    assert all(peers.ask(address, none) for address in addresses)
    assert not peers.ask(("new", 1), lambda: set(addresses))
    assert ("new", 1) not in made
    assert peers.ask(("new", 1), lambda: set(addresses[1:]))
    assert made[addresses[0]].closed and len(list(peers)) == MAX_PEERS
    assert not peers.ask(("p", 0), none)  # what cannot be connected to takes nobody's place
    assert len(list(peers)) == MAX_PEERS


def test_dead_links_stay_while_requests_belong_to_them_and_their_figures_for_good(peers):
    dead, alive = FakeLink(0, FakeChannel(7, 0.5), alive=False), FakeLink(1, FakeChannel(3, 0.25))
    peers.use(dead)
    peers.use(alive)
    peers.tidy(none, lambda: {0})
    assert peers.links == [dead, alive] and not dead.channel.closed
    peers.tidy(none, none)
    assert peers.links == [alive] and dead.channel.closed
    assert (peers.steps, peers.exposed_wait_s) == (10, 0.75)
    with pytest.raises(KeyError):
        peers.link(0)


def test_a_link_that_is_lost_before_a_request_belongs_to_it_is_closed(peers, made):
    peers.ask(("p", 1), none)
    unused, used = FakeLink(0, FakeChannel(0, 0.0), alive=False), FakeLink(1, FakeChannel(2, 0.0), alive=False)
    peers.use(used)
    made["p", 1].lost.extend([unused, used])
    peers.tidy(none, lambda: {1})
    assert unused.channel.closed and not used.channel.closed and peers.links == [used]
    peers.tidy(none, none)
    assert used.channel.closed and peers.links == [] and peers.steps == 2
    made["p", 1].lost.append(used)  # its session ends after a step has failed with it
    peers.tidy(none, none)
    assert peers.links == [] and peers.steps == 2 and not made["p", 1].lost
