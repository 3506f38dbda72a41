"""Prefill servers that were restarted: SGLang must not go on with what it knows of the dead process.

SGLang caches the ports of a prefill server's ranks by bootstrap address and drops them after two missed heartbeats, 5 s
apart. A server that is back sooner keeps its address and has other ports: requests would be sent to the dead ones and
wait for minutes. The control plane knows each process by its instance, so it tells.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from sglang_adrenaline import compat

logger = logging.getLogger(__name__)

Address = tuple[str, int]


class RestartedPrefill:
    """One a decode scheduler. Called in control threads, one for each prefill instance."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._lost: dict[Address, tuple[str, Any]] = {}
        """Instance that was lost at a bootstrap address, and what SGLang knew of it."""

    def lost(self, address: Address, instance: str) -> None:
        with self._lock:
            self._lost.setdefault(address, (instance, compat.known_prefill(self._scheduler, address)))

    def welcomed(self, address: Address, instance: str) -> None:
        with self._lock:
            before, known = self._lost.pop(address, (instance, None))
        # What SGLang has learned since the loss is about the new process.
        if before != instance and known is not None and compat.known_prefill(self._scheduler, address) is known:
            logger.info("prefill %s:%d was restarted: SGLang's connection to it begins anew", *address)
            compat.forget_prefill(self._scheduler, address)
