"""The offload bounds of the paper (arXiv 2503.20552, load-aware scheduling), as ratios offloaded : local.

They say what a deployment can bear on the whole; `auto.py` applies them request by request: OB_mem's memory term as the
cap on pinned tokens, its bandwidth term as "remote time hides under local time", OB_comp as the largest batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sglang_adrenaline.policy.views import DecodeView, LoadSettings, PrefillView, pin_room


class Bounds(msgspec.Struct, frozen=True):
    """Ratios offloaded : local, >= 0."""

    memory: float
    bandwidth: float
    compute: float

    @property
    def mem(self) -> float:
        """OB_mem = min(sum of free memory_i / memory_d, sum of bandwidth_i / bandwidth_d)."""
        return min(self.memory, self.bandwidth)

    @property
    def bound(self) -> float:
        """OB = min(OB_mem, OB_comp)."""
        return min(self.mem, self.compute)


def offload_bounds(
    decode: DecodeView, prefill: Iterable[PrefillView], settings: LoadSettings, *, rows_max: int, rows_slo: int
) -> Bounds:
    """Bounds of a decode instance with these prefill instances.

    rows_max  B_max, the batch at which the work without attention becomes compute-bound
    rows_slo  B_TPOT, the largest batch that is within the TPOT SLO, and within decode's memory, without offloading
    """
    peers = list(prefill)
    return Bounds(
        memory=sum(pin_room(peer, settings) + peer.pinned_tokens for peer in peers) / decode.pool_tokens,
        bandwidth=sum(peer.attention_rate for peer in peers) / decode.attention_rate,
        compute=max(rows_max - rows_slo, 0) / max(rows_slo, 1),
    )
