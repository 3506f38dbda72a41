"""What both ends of the control plane need: a queue into the I/O thread, logging that floods cannot flood, limits."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from typing import Any

from sglang_adrenaline.messages import MAX_MESSAGE_BYTES

MAX_QUEUE = 20_000
"""Most messages that wait for the I/O thread, and most that ZMQ queues for one peer."""
MAX_BURST = 256
"""Most messages taken off a socket before timers and other sockets get their turn."""
MAX_WIRE_BYTES = 4 * MAX_MESSAGE_BYTES
"""ZMQ itself cuts off a peer that announces more; up to this, what is too long is logged and dropped."""
LINGER_MS = 200
"""How long a closing socket tries to get its last messages (Bye) out."""
JOIN_S = 5.0


class Outbox:
    """A bounded queue from any thread to one I/O thread, which can poll `fd`."""

    def __init__(self, limit: int = MAX_QUEUE) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._items: deque[Any] = deque()
        self._closed = False
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def put(self, item: Any) -> bool:
        """False if the queue is full or closed. Never blocks."""
        with self._lock:
            if self._closed or len(self._items) >= self._limit:
                return False
            self._items.append(item)
            os.eventfd_write(self.fd, 1)
            return True

    def wake(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self.fd, 1)

    def take_all(self) -> list[Any]:
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
            items = list(self._items)
            self._items.clear()
            return items

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._items.clear()
                os.close(self.fd)


class LimitedLog:
    """Warnings, of each kind at most one in `interval_s`; the next one tells how many were left out."""

    def __init__(self, logger: logging.Logger, interval_s: float = 5.0) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._kinds: dict[str, tuple[float, int]] = {}

    def warning(self, kind: str, text: str, *args: object, exc_info: bool = False) -> None:
        """`kind` is one of a fixed set of words: one entry is kept per kind."""
        now = time.monotonic()
        written, left_out = self._kinds.get(kind, (float("-inf"), 0))
        if now - written < self._interval_s:
            self._kinds[kind] = (written, left_out + 1)
            return
        self._kinds[kind] = (now, 0)
        more = f" ({left_out} more like this)" if left_out else ""
        self._logger.warning(text + "%s", *args, more, exc_info=exc_info)


def milliseconds_until(deadline: float) -> int:
    """For poll(): from now to a time of time.monotonic(), rounded up, at least 0."""
    return max(0, math.ceil((deadline - time.monotonic()) * 1000))
