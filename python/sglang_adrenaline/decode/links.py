"""Connections of a decode rank to prefill ranks.

A `Peer` is a prefill instance by its bootstrap address and keeps one control client, which reconnects by itself. Each
time the peer welcomes us a new `Link` begins: the channel and the lanes of that incarnation of it. Requests belong to
links, so that nothing of a dead incarnation can be mistaken for something of the next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang_adrenaline import messages
from sglang_adrenaline.channel.base import ChannelSpec, DecodeEnd
from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.control import ControlClient
from sglang_adrenaline.decode.restarts import Address, RestartedPrefill
from sglang_adrenaline.errors import ChannelError
from sglang_adrenaline.keys import ControlKeys

logger = logging.getLogger(__name__)

OnMessage = Callable[["Link", Any], None]
OnLost = Callable[["Link", str], None]
OpenChannel = Callable[[ChannelSpec, "Peer"], DecodeEnd]
"""Decode's end of the channel that a welcome of this peer offers. Raises ChannelError."""


@dataclass
class Link:
    """One welcome. `index` never repeats within a process."""

    index: int
    peer: Peer
    channel: DecodeEnd
    lanes: int
    instance: str
    lost: str = ""
    closed: bool = False
    """Its channel was given back; scheduler thread."""

    @property
    def alive(self) -> bool:
        return not self.lost

    def send(self, message: Any) -> None:
        if self.alive:
            self.peer.client.send(message)

    def close(self, reason: str) -> None:
        """Wake every wait of this link. The mapping goes when the last reference does, so late reads are harmless."""
        self.lost = self.lost or reason
        self.channel.abort(self.lost)


class Peer:
    """One prefill instance. Callbacks run in the control client's thread."""

    def __init__(
        self,
        address: Address,
        port: int,
        config: AdrenalineConfig,
        keys: ControlKeys,
        hello: Callable[[], messages.Hello],
        open_channel: OpenChannel,
        new_index: Callable[[], int],
        on_message: OnMessage,
        on_lost: OnLost,
        restarted: RestartedPrefill,
    ) -> None:
        self.address = address
        self.link: Link | None = None
        self.lost: deque[Link] = deque()
        """Links that ended, until the scheduler thread, which may still be using one, takes them to close them."""
        self.refused = ""
        self.since = time.monotonic()
        """When it was asked first or lost last; seconds, monotonic."""
        self.stats: messages.Stats | None = None
        """The newest of this link, None before the first."""
        self.stats_at = 0.0
        """When they came; seconds, monotonic."""
        self._new_index = new_index
        self._on_message = on_message
        self._on_lost = on_lost
        self._open_channel = open_channel
        self._restarted = restarted
        self.client = ControlClient(
            address[0],
            port,
            keys,
            hello,
            handler=self,
            heartbeat_interval=config.heartbeat_interval,
            heartbeat_timeout=config.heartbeat_timeout,
        )

    def on_welcome(self, welcome: messages.Welcome) -> str | None:
        try:
            channel = self._open_channel(welcome.channel, self)
        except (ChannelError, OSError) as error:
            return f"its channel cannot be opened: {error}"
        self.refused = ""
        self.stats = None
        self._restarted.welcomed(self.address, welcome.instance)
        self.link = Link(self._new_index(), self, channel, welcome.channel.shape.lanes, welcome.instance)
        kind = welcome.channel.kind
        logger.info("attention offloading to %s is up (instance %s, channel %s)", self.name, welcome.instance[:8], kind)
        return None

    def on_refused(self, reason: str) -> None:
        if reason != self.refused:
            logger.error("%s is not offloaded to: %s", self.name, reason)
        self.refused = reason

    def on_message(self, message: Any) -> None:
        if isinstance(message, messages.Stats):
            self.stats = message
            self.stats_at = time.monotonic()  # after it, so that who reads it first never takes old stats for new ones
        elif self.link is not None:
            self._on_message(self.link, message)

    def on_lost(self, reason: str) -> None:
        link, self.link = self.link, None
        self.since = time.monotonic()
        if link is not None:
            logger.warning("attention offloading to %s is down: %s", self.name, reason)
            link.close(reason)
            self.lost.append(link)
            self._restarted.lost(self.address, link.instance)
            self._on_lost(link, reason)

    @property
    def name(self) -> str:
        return f"prefill {self.address[0]}:{self.address[1]}"

    def status(self) -> dict[str, Any]:
        link = self.link
        stats = self.stats if link is not None else None
        return {
            "role": "prefill",
            "address": f"{self.address[0]}:{self.address[1]}",
            "connected": link is not None,
            "refused": self.refused,
            "steps": link.channel.steps if link is not None else 0,
            "free_tokens": stats.free_tokens if stats else None,
            "pinned_tokens": stats.pinned_tokens if stats else None,
        }

    def close(self) -> None:
        self.client.close()
        if self.link is not None:
            self.link.close("decode server stops")


@dataclass
class LinkIndex:
    """Hands out link indices; one of it a process."""

    next: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self) -> int:
        with self.lock:
            self.next += 1
            return self.next - 1
