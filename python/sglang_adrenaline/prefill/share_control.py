"""Which share of the SMs the executor should have, as prefill's load shifts. Knows nothing of GPUs; scheduler thread.

    control = ShareControl(points_at(cost, shares), slo_ttft_s)
    control.computed(alone_s)             for each prompt that prefill has computed
    share = control.share(now, load)      before a batch is launched: place it off that share of the SMs

`load` is `LoadMeter.lasting_load`: it counts what comes, and what has waited too long on top. What is computed would
not do: beside an executor with too large a share prefill computes less, and that would seem to be all there is.

A change needs DWELL_S since the last one, and a larger share room to spare (`policy.choose_share`), so a share does not
flap with single prompts. Where prefill could not keep up even beside the smallest share it gets everything: then it is
what bounds the deployment, and the policy, which sees its load, offloads little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from sglang_adrenaline.cost_model import WHOLE_DEVICE, CostModel
from sglang_adrenaline.policy import PrefillLoad, SharePoint, choose_share
from sglang_adrenaline.policy.sm_share import HYSTERESIS, predicted_ttft_s

PROMPT_WEIGHT = 0.05
"""Of the newest prompt in the mean of their times."""
DWELL_S = 2.0
FIRST_PROMPT_S = 1e-3
"""Taken for a prompt's time before there was one."""
NO_OBJECTIVE_S = 1e6
"""An objective that any load meets under which prefill's queue does not grow."""


def points_at(cost: CostModel, shares: Sequence[float]) -> list[SharePoint]:
    """What the profile says about each of these shares: its nearest point's figures."""
    known = cost.share_points()
    return [
        msgspec.structs.replace(
            min(known, key=lambda point: (abs(point.executor_share - share), point.executor_share)),
            executor_share=share,
        )
        for share in shares
    ]


class ShareControl:
    """`slo_ttft_s`: objective for the mean time to first token, seconds, or None. Raises ValueError on no points."""

    def __init__(self, points: Sequence[SharePoint], slo_ttft_s: float | None) -> None:
        self._points = tuple(points)
        self._slo_ttft_s = slo_ttft_s if slo_ttft_s is not None else NO_OBJECTIVE_S
        self._prompt_s = 0.0
        self._current = self._best(0.0, None)
        self._changed_at = -math.inf

    def computed(self, alone_s: float) -> None:
        """A prompt is done that takes so long on the device alone."""
        self._prompt_s += PROMPT_WEIGHT * (alone_s - self._prompt_s) if self._prompt_s else alone_s

    def share(self, now: float, load: float) -> float:
        """The executor's share of the SMs from now on (seconds, monotonic).

        load: prefill work that comes, in seconds of the device alone a second.
        """
        if now - self._changed_at >= DWELL_S:
            best = self._best(load, self._current)
            if best != self._current:
                self._current, self._changed_at = best, now
        return self._current

    def _best(self, load: float, current: float | None) -> float:
        prompt_s = self._prompt_s or FIRST_PROMPT_S
        coming = PrefillLoad(requests_s=load / prompt_s, prompt_s=prompt_s)
        point = choose_share(self._points, coming, self._slo_ttft_s, current)
        more = 1.0 + HYSTERESIS if current == WHOLE_DEVICE else 1.0
        heavier = PrefillLoad(requests_s=coming.requests_s * more, prompt_s=prompt_s)
        sustained = math.isfinite(predicted_ttft_s(heavier, point.prefill_factor))
        return point.executor_share if sustained else WHOLE_DEVICE
