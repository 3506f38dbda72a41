"""How prefill and the attention executor share a GPU's SMs: the executor gets what the TTFT objective leaves."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

MARGIN = 0.8
"""The predicted mean TTFT may use this share of the objective: the tail needs the rest."""
MAX_UTILISATION = 0.9
HYSTERESIS = 0.1
"""A larger share is taken only if the objective is also met with so much more load."""


class SharePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a profile: what both reach while both run."""

    executor_share: float
    """Of the SMs, 0..1."""
    attention_rate: float
    """Tokens per second."""
    prefill_factor: float
    """Prefill's speed, as share of what it reaches alone."""


class PrefillLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What arrives at a prefill instance, cached tokens not counted."""

    requests_s: float
    prompt_s: float
    """What a prompt takes on the device alone, on the mean; seconds."""


def predicted_ttft_s(load: PrefillLoad, prefill_factor: float) -> float:
    """Mean time to first token of an M/D/1 queue, in seconds; infinite above MAX_UTILISATION."""
    service_s = load.prompt_s / prefill_factor
    utilisation = load.requests_s * service_s
    if utilisation >= MAX_UTILISATION:
        return float("inf")
    return service_s * (1.0 + utilisation / (2.0 * (1.0 - utilisation)))


def choose_share(
    points: Sequence[SharePoint], load: PrefillLoad, slo_ttft_s: float, current: float | None = None
) -> SharePoint:
    """The point with the fastest executor whose predicted TTFT meets the objective; the smallest share if none does.

    `current`: the executor's share now; a larger one has to bear HYSTERESIS more load. Raises ValueError on no points.
    """
    if not points:
        raise ValueError("no SM shares were measured")
    best = min(points, key=lambda point: point.executor_share)
    for point in sorted(points, key=lambda point: point.executor_share):
        more = HYSTERESIS if current is not None and point.executor_share > current else 0.0
        heavier = PrefillLoad(requests_s=load.requests_s * (1.0 + more), prompt_s=load.prompt_s)
        met = predicted_ttft_s(heavier, point.prefill_factor) <= MARGIN * slo_ttft_s
        if met and point.attention_rate > best.attention_rate:
            best = point
    return best
