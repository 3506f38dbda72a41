"""Bootstrap rooms of parallel samples (n > 1), in the front end of prefill and decode servers.

SGLang sends a request with n samples n + 1 times to its scheduler (once to cache the prompt), all with one bootstrap
room, but a room is the name of one KV transfer. Both servers send them in the same order, so that each can derive the
same room of its own for every sample without talking to the other.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

SAMPLE_SHIFT = 40
"""Room of sample k = room + (k << SAMPLE_SHIFT). Batches count up from the room, so the low bits are theirs; the router
draws rooms below 2**62, so that all stay below 2**63."""
MAX_OPEN = 4096
"""Requests under way that are remembered; one that was aborted half-way is forgotten after this many others."""


class SampleRooms:
    """Counts how often each room was used. One per front end, whose event loop is the only caller."""

    def __init__(self) -> None:
        self._sent: OrderedDict[int, int] = OrderedDict()

    def assign(self, manager: Any, tokenized: Any) -> None:
        """Before SGLang's TokenizerManager._send_one_request: each copy of a request gets its own room."""
        sampling_params = getattr(tokenized, "sampling_params", None)
        room = getattr(tokenized, "bootstrap_room", None)
        if sampling_params is None or room is None or sampling_params.n <= 1:
            return
        sample = self._sent.pop(room, 0)
        tokenized.bootstrap_room = room + (sample << SAMPLE_SHIFT)
        if sample < sampling_params.n:
            self._sent[room] = sample + 1
            if len(self._sent) > MAX_OPEN:
                self._sent.popitem(last=False)
