"""The servers a router knows, and the choice of a pair for a request."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

AVOID_S = 2.0
"""How long a server that refused a connection is passed over, if there is another one."""

MAX_ROOM = 2**62
"""Rooms are drawn below this; SGLang counts up from there for batches, and all must stay below 2**63."""


@dataclass
class Server:
    url: str
    bootstrap_port: int | None = None
    """Of a prefill server, else None."""
    in_flight: int = 0
    avoid_until: float = 0.0

    @property
    def host(self) -> str:
        host = urlsplit(self.url).hostname or ""
        return f"[{host}]" if ":" in host else host

    def refused(self) -> None:
        self.avoid_until = time.monotonic() + AVOID_S


@dataclass
class Pool:
    """Servers of one role. Least requests in flight first; equal ones take turns."""

    servers: Sequence[Server]
    _turn: int = 0

    def choose(self) -> Server:
        now = time.monotonic()
        self._turn += 1
        in_turn = [self.servers[(self._turn + i) % len(self.servers)] for i in range(len(self.servers))]
        return min(in_turn, key=lambda s: (s.avoid_until > now, s.in_flight))


@dataclass(frozen=True)
class Pair:
    prefill: Server
    decode: Server

    @contextmanager
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
