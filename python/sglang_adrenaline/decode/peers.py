"""The prefill instances that a decode rank knows, and the links to them to which something still belongs.

Addresses come with requests, so their number is bounded. Scheduler thread, but for what control threads do to a `Peer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from sglang_adrenaline.decode.links import Address, Link, Peer

MAX_PEERS = 64
FORGET_S = 300.0
"""A prefill instance that has been away this long has left: nobody asks for it any more until a request names it."""


class Peers:
    """`connect` begins to connect to the instance at a bootstrap address; None if there can be none."""

    def __init__(self, connect: Callable[[Address], Peer | None]) -> None:
        self._connect = connect
        self._peers: dict[Address, Peer] = {}
        self._links: dict[int, Link] = {}
        self._steps_gone = 0
        self._wait_gone_s = 0.0

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def __getitem__(self, address: Address) -> Peer:
        return self._peers[address]

    def ask(self, address: Address, in_use: Callable[[], Collection[Address]]) -> bool:
        """Whether the instance at this address can be asked; a new one takes the place of one that nobody uses."""
        if address in self._peers:
            return True
        idle: list[Address] = []
        if len(self._peers) >= MAX_PEERS:
            used = in_use()
            idle = [a for a, peer in self._peers.items() if peer.link is None and a not in used]
            if not idle:
                return False
        peer = self._connect(address)
        if peer is None:
            return False
        if idle:
            self._peers.pop(idle[0]).close()
        self._peers[address] = peer
        return True

    # ---- links ------------------------------------------------------------------------------------------------------

    def use(self, link: Link) -> None:
        """A request may belong to this link from now on, until `tidy` finds it dead and that none does."""
        self._links[link.index] = link

    def link(self, index: int) -> Link:
        """One in use. Raises KeyError."""
        return self._links[index]

    @property
    def links(self) -> list[Link]:
        """Those in use, dead ones included until `tidy` finds that nothing belongs to them."""
        return list(self._links.values())

    # ---- once a loop ------------------------------------------------------------------------------------------------

    def tidy(self, in_use: Callable[[], Collection[Address]], links_in_use: Callable[[], Collection[int]]) -> None:
        """Forget instances that left, and dead links to which no request belongs."""
        for peer in self._peers.values():
            while peer.lost:
                link = peer.lost.popleft()
                if not link.closed:  # as it is if a step failed with it earlier
                    self.use(link)
        now = time.monotonic()
        absent = [a for a, peer in self._peers.items() if peer.link is None and now - peer.since > FORGET_S]
        if absent:
            for address in set(absent) - set(in_use()):
                self._peers.pop(address).close()
        dead = [link for link in self._links.values() if not link.alive]
        if dead:
            used = links_in_use()
            for link in dead:
                if link.index not in used:
                    self._drop(link)

    def _drop(self, link: Link) -> None:
        self._wait_gone_s += link.channel.exposed_wait_s
        self._steps_gone += link.channel.steps
        link.channel.close()
        link.closed = True
        del self._links[link.index]

    # ---- reports ----------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps begun on all links so far."""
        return self._steps_gone + sum(link.channel.steps for link in self._links.values())

    @property
    def exposed_wait_s(self) -> float:
        return self._wait_gone_s + sum(link.channel.exposed_wait_s for link in self._links.values())

    def status(self) -> list[dict[str, Any]]:
        return [peer.status() for peer in self]

    def close(self) -> None:
        for peer in self:
            peer.close()
