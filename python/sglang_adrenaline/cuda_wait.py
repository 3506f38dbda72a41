"""Waits for a CUDA event by polling, with a deadline.

While a thread blocks in CUDA, other threads of the process may not be able to launch (docs/gpu-results.md, "Launches
that waited"), and its waits have no limit.
"""

from __future__ import annotations

import time

import torch


def await_event(event: torch.cuda.Event, timeout_s: float, nap_s: float = 20e-6) -> bool:
    """Whether the event is over, at once or within the time; one that was never recorded is."""
    if event.query():
        return True
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        time.sleep(nap_s)
        if event.query():
            return True
    return False
