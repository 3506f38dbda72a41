"""What servers of ours still hold after their last request has ended, for tests and benchmarks: nothing, one hopes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from servers import Group, wait_until


def leftovers(group: Group, names: Sequence[str] = ("prefill", "decode")) -> list[str]:
    """Everything that is still held somewhere, in words; empty when all was given back."""
    held = []
    for name in names:
        status = group.status(name)
        tokens = status["tokens"]
        held += [f"{name} runs {n} {kind}" for kind, n in status["running"].items() if n]
        held += [f"{name} has {status['lanes_in_use']} lanes in use"] if status["lanes_in_use"] else []
        held += [
            f"{name} {kind} {tokens[kind]}" for kind in ("pinned", "reserved", "remote", "locked") if tokens.get(kind)
        ]
        held += [] if tokens["free"] == tokens["pool"] else [f"{name}: {tokens['free']} of {tokens['pool']} free"]
    return held


def wait_for_nothing_left(group: Group, timeout_s: float = 30, names: Sequence[str] = ("prefill", "decode")) -> None:
    with contextlib.suppress(Exception):
        wait_until(lambda: not leftovers(group, names), timeout_s, "everything given back")
    assert leftovers(group, names) == []
