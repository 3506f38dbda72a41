"""One offloaded request as the decode side sees it: what this rank knows of it, and what all ranks agreed on.

Every tensor-parallel rank asks its own prefill rank, so answers differ in time and may differ in kind. A rank's `word`
changes when something happens here; `state` changes only when all ranks compare their words (`agreement.py`), and it
alone decides what SGLang's scheduler gets to see, which must do the same on all ranks.
"""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_adrenaline.decode.links import Link


class Word(enum.IntEnum):
    """What one rank says of a request; it rises, or becomes NO for good. Over all ranks the lowest counts."""

    NO = 0
    """Refused, unreachable, too late or lost."""
    WAITING = 1
    """Not asked yet, or not answered."""
    ACCEPTED = 2
    """Prefill will keep the prefix."""
    READY = 3
    """Prefill computed and pinned it; the lane is known."""


class OffloadState(enum.Enum):
    UNDECIDED = "undecided"
    ACCEPTED = "accepted"
    """KV of the prefix is neither transferred nor allocated here."""
    READY = "ready"
    LOCAL = "local"
    """Not offloaded after all: stock behaviour from here on."""
    FAILED = "failed"
    """Accepted, then lost: the request ends with `failure`."""


@dataclass
class Offload:
    """`word` changes under a lock, by the control thread (with lane, failure) or the scheduler thread; the rest by the
    scheduler thread."""

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
    split_open: bool = False
    """`remote_prefix_len` is decided by load, on the first rank, when the request's turn comes; not agreed on yet."""
    shared_tokens: int = 0
    """Of the remote prefix: kept for other requests already when this one was offered. Known where ratio is auto."""
    block_names: list[int] | None = None
    """Of the prompt (`prefixes.py`); None before anybody asked."""
    state: OffloadState = OffloadState.UNDECIDED
    word: Word = Word.WAITING
    link: Link | None = None
    """The connection that the offer went over, None before it; a reconnected peer is another link."""
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
    def to_be_offered(self) -> bool:
        return self.word is Word.WAITING and self.link is None

    @property
    def undecided(self) -> bool:
        return self.state is OffloadState.UNDECIDED

    @property
    def is_remote(self) -> bool:
        return self.state in (OffloadState.ACCEPTED, OffloadState.READY, OffloadState.FAILED)

    @property
    def holds_prefix(self) -> bool:
        """Our prefill rank keeps the prefix, or was asked to."""
        return self.link is not None and self.word is not Word.NO

    # ---- this rank's word -------------------------------------------------------------------------------------------

    def accept(self) -> None:
        with self._lock:
            if self.word is Word.WAITING:
                self.word = Word.ACCEPTED

    def ready(self, lane: int) -> None:
        """The prefix is pinned, the executor answers on `lane`."""
        with self._lock:
            if self.word is Word.ACCEPTED:
                self.lane = lane
                self.ready_at = time.monotonic()
                self.word = Word.READY

    def decline(self) -> bool:
        """Give up waiting for an answer. False if one came at the last moment."""
        with self._lock:
            if self.word is not Word.WAITING:
                return False
            self.word = Word.NO
            return True

    def lose(self, reason: str) -> None:
        """Prefill will not keep the prefix, or keeps it no more. `reason` is for the client if it is too late."""
        with self._lock:
            if self.word is not Word.NO:
                self.failure = reason
                self.word = Word.NO

    # ---- what all ranks agreed on -----------------------------------------------------------------------------------

    def settle(self, lowest: Word) -> None:
        """Take over the lowest word of all ranks. Before prefill has accepted on all of them the request can still be
        served locally; after that its KV is given up."""
        if self.state in (OffloadState.LOCAL, OffloadState.FAILED):
            return
        if lowest is Word.NO:
            self.state = OffloadState.LOCAL if self.undecided else OffloadState.FAILED
            self.failure = self.failure or (
                f"prefill {self.address[0]}:{self.address[1]} held the prompt's KV and was lost by another rank"
            )
        elif lowest is Word.READY:
            self.state = OffloadState.READY
        elif lowest is Word.ACCEPTED:
            self.state = OffloadState.ACCEPTED
