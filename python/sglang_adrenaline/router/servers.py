"""The servers a router knows, which of them are down, and the choice of a pair for a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from sglang_adrenaline.errors import ConfigError

logger = logging.getLogger(__name__)

Role = Literal["prefill", "decode"]

PROBE_S = 1.0
"""How often a server that is down is asked whether it is back."""
ASK_S = 2.5
"""How often a server that somebody waits for is asked whether it is alive."""
MISSES = 2
"""So many times in a row without an answer: it hangs."""

MAX_ROOM = 2**62
"""Rooms are drawn below this; SGLang counts up from there for batches, and all must stay below 2**63."""


class HungError(TimeoutError):
    """The server does not answer anything any more, though its connections stand."""


_HANGS = "it does not answer any more"


@dataclass(eq=False)
class Server:
    url: str
    bootstrap_port: int | None = None
    """Of a prefill server, else None."""
    in_flight: int = 0
    down: bool = False
    """It refused or broke a connection, or hangs, and has not answered since."""
    hangs: bool = False
    """Also down: a request that is sent there would not even fail."""
    misses: int = 0
    _waits: set[asyncio.Timeout] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def awaited(self) -> AsyncIterator[None]:
        """Around each wait for this server. Raises HungError if it hangs, or is found to meanwhile."""
        if self.hangs:
            raise HungError(_HANGS)
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if wait.expired():
                raise HungError(_HANGS) from None
            raise

    @property
    def is_awaited(self) -> bool:
        return bool(self._waits)

    def give_up(self) -> None:
        """End every wait for it."""
        while self._waits:
            self._waits.pop().reschedule(0.0)  # a time that has been

    @property
    def role(self) -> Role:
        return "decode" if self.bootstrap_port is None else "prefill"

    @property
    def burden(self) -> tuple[bool, int]:
        """The least one gets the next request."""
        return self.down, self.in_flight

    @property
    def host(self) -> str:
        host = urlsplit(self.url).hostname or ""
        return f"[{host}]" if ":" in host else host


def make_server(url: str, bootstrap_port: int | None = None) -> Server:
    """Raises ConfigError on what is no URL of a server."""
    url = url.rstrip("/")
    server = Server(url, bootstrap_port)
    if not url.startswith(("http://", "https://")) or not server.host:
        raise ConfigError(f"{url!r} is not the URL of a server")
    return server


@dataclass(frozen=True)
class Pair:
    prefill: Server
    decode: Server

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Counts one request in flight on both."""
        for server in (self.prefill, self.decode):
            server.in_flight += 1
        try:
            yield
        finally:
            for server in (self.prefill, self.decode):
                server.in_flight -= 1

    def bootstrap_fields(self) -> dict[str, Any]:
        """What SGLang's PD protocol adds to a body. One room: SGLang itself numbers the members of a batch from it."""
        return {
            "bootstrap_host": self.prefill.host,
            "bootstrap_port": self.prefill.bootstrap_port,
            "bootstrap_room": secrets.randbelow(MAX_ROOM),
        }


class Fleet:
    """All servers, by role. Event loop of the router only."""

    def __init__(self, prefill: Sequence[Server] = (), decode: Sequence[Server] = ()) -> None:
        self._of: dict[Role, list[Server]] = {"prefill": list(prefill), "decode": list(decode)}
        self._left: list[Server] = []
        """Servers that are none of these any more; some have requests."""
        self._suspicion = asyncio.Event()

    @property
    def prefill(self) -> Sequence[Server]:
        return self._of["prefill"]

    @property
    def decode(self) -> Sequence[Server]:
        return self._of["decode"]

    @property
    def servers(self) -> list[Server]:
        return [*self.prefill, *self.decode]

    def choose(self, role: Role) -> Server | None:
        """Fewest requests in flight, chance among equals; one that is down only if all are, and none that hangs."""
        servers = [server for server in self._of[role] if not server.hangs]
        least = min((server.burden for server in servers), default=None)
        best = [server for server in servers if server.burden == least]
        return random.choice(best) if best else None  # in turn, pairs would repeat: same prefill, same decode

    def others_are_up(self, server: Server) -> bool:
        """Whether a request that `server` did not take can go to another one of its role."""
        return any(other is not server and not other.down for other in self._of[server.role])

    def suspect(self, server: Server, why: str) -> None:
        """It refused or broke a connection, or hangs: pass it over until it answers a probe."""
        if not server.down:
            logger.warning("%s is passed over until it answers: %s", server.url, why)
            server.down = True
        self._suspicion.set()

    def replace(self, prefill: Sequence[Server], decode: Sequence[Server]) -> None:
        """From now on these are the servers; those that stay keep their state. Requests of others go on."""
        wanted: dict[Role, Sequence[Server]] = {"prefill": prefill, "decode": decode}
        for role, servers in wanted.items():
            known = {(server.url, server.bootstrap_port): server for server in self._of[role]}
            new = {(server.url, server.bootstrap_port): server for server in servers}
            for url, _ in new.keys() - known.keys():
                logger.info("%s server %s joins", role, url)
            for url, _ in known.keys() - new.keys():
                logger.info("%s server %s leaves", role, url)
            self._left += [known[name] for name in known.keys() - new.keys()]
            self._of[role] = [known.get(name, server) for name, server in new.items()]

    async def watch(self, is_up: Callable[[Server], Awaitable[bool]]) -> None:
        """Ask servers that are down until they answer. Never returns; sleeps while none is down."""
        while True:
            await self._suspicion.wait()
            self._suspicion.clear()
            while down := [server for server in self.servers if server.down]:
                answers = await asyncio.gather(*map(is_up, down))
                for server, up in zip(down, answers, strict=True):
                    if up:
                        logger.info("%s answers again", server.url)
                        server.down = server.hangs = False
                if not all(answers):
                    await asyncio.sleep(PROBE_S)

    async def notice_hangs(self, is_alive: Callable[[Server], Awaitable[bool]]) -> None:
        """Ask servers that somebody waits for, and give up those that do not answer. Never returns."""
        while True:
            await asyncio.sleep(ASK_S)
            self._left = [server for server in self._left if server.is_awaited]
            asked = [server for server in [*self.servers, *self._left] if server.is_awaited and not server.hangs]
            answers = await asyncio.gather(*map(is_alive, asked))
            for server, answered in zip(asked, answers, strict=True):
                server.misses = 0 if answered else server.misses + 1
                if server.misses >= MISSES:
                    server.hangs, server.misses = True, 0
                    self.suspect(server, "it hangs")
                    server.give_up()
