"""One offloaded request as the decode side sees it, and the states it goes through."""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_adrenaline.decode.links import Link


class OffloadState(enum.Enum):
    CONNECTING = "connecting"
    """The prefill side's control plane is not up yet; the request waits a little before it is served locally."""
    OFFERED = "offered"
    """Prefill was asked to keep the prefix."""
    ACCEPTED = "accepted"
    """Prefill will keep it: KV of the prefix is neither transferred nor allocated here."""
    READY = "ready"
    """Prefill computed and pinned it; the lane is known."""
    LOCAL = "local"
    """Not offloaded after all: stock behaviour from here on."""
    FAILED = "failed"
    """Accepted, then lost: the request ends with `failure`."""


@dataclass
class Offload:
    """`state` changes under a lock, by the control thread (with lane, failure) or the scheduler thread (the rest)."""

    req: Any
    room: int
    address: tuple[str, int]
    """Bootstrap host and port of the prefill instance."""
    remote_prefix_len: int
    prompt_len: int
    created_at: float
    """Seconds, monotonic."""
    forced: bool
    """The request itself asked for the split."""
    by_load: bool = False
    """`remote_prefix_len` is decided when the request's turn comes; 0 until then."""
    state: OffloadState = OffloadState.CONNECTING
    link: Link | None = None
    """The connection that the offer went over; a reconnected peer is another link."""
    lane: int = -1
    failure: str = ""
    transferred_at: float = 0.0
    """When the KV transfer was first seen to be done; seconds, monotonic, 0 = not yet."""
    ready_at: float = 0.0
    """When READY came; seconds, monotonic, 0 = not yet."""
    retracting: bool = False
    """The row is released for a retraction, not for good."""

    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def undecided(self) -> bool:
        return self.state in (OffloadState.CONNECTING, OffloadState.OFFERED)

    @property
    def is_remote(self) -> bool:
        return self.state in (OffloadState.ACCEPTED, OffloadState.READY, OffloadState.FAILED)

    @property
    def holds_prefix(self) -> bool:
        """Prefill keeps the prefix, or was asked to."""
        return self.state in (OffloadState.OFFERED, OffloadState.ACCEPTED, OffloadState.READY)

    def move(self, expected: OffloadState, new: OffloadState) -> bool:
        """Change the state if it still is the expected one; whether it did."""
        with self._lock:
            if self.state is not expected:
                return False
            self.state = new
            return True

    def ready(self, lane: int) -> bool:
        """The prefix is pinned, the executor answers on `lane`. False if the word comes too late."""
        with self._lock:
            if self.state is not OffloadState.ACCEPTED:
                return False
            self.lane = lane
            self.ready_at = time.monotonic()
            self.state = OffloadState.READY
            return True

    def fail(self, reason: str) -> None:
        """Before the decision the request can still be served locally; after it, its KV is gone."""
        with self._lock:
            if self.undecided:
                self.state = OffloadState.LOCAL
            elif self.state in (OffloadState.ACCEPTED, OffloadState.READY):
                self.failure = reason
                self.state = OffloadState.FAILED
