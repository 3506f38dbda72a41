"""Which share of the SMs the executor should have, as prefill's load shifts. Knows nothing of GPUs; scheduler thread.

    control = ShareControl(points_at(cost, shares), slo_ttft_s)
    control.computed(now, new_tokens)     for each prompt that prefill has computed
    share = control.share(now)            before a batch is launched: place it off that share of the SMs

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

WINDOW_S = 10.0
DWELL_S = 2.0
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
        self._current = self._best(PrefillLoad(requests_s=0.0, prompt_tokens=1.0), None)
        self._changed_at = -math.inf
        self._at = 0.0
        self._prompts = 0.0
        """Of the last WINDOW_S, fading."""
        self._tokens = 0.0

    def computed(self, now: float, new_tokens: int) -> None:
        """A prompt of so many tokens that were not cached is done at `now` (seconds, monotonic)."""
        self._fade(now)
        self._prompts += 1.0
        self._tokens += new_tokens

    def share(self, now: float) -> float:
        """The executor's share of the SMs from now on."""
        if now - self._changed_at >= DWELL_S:
            self._fade(now)
            best = self._best(self._load(), self._current)
            if best != self._current:
                self._current, self._changed_at = best, now
        return self._current

    def _best(self, load: PrefillLoad, current: float | None) -> float:
        point = choose_share(self._points, load, self._slo_ttft_s, current)
        more = 1.0 + HYSTERESIS if current == WHOLE_DEVICE else 1.0
        heavier = PrefillLoad(requests_s=load.requests_s * more, prompt_tokens=load.prompt_tokens)
        sustained = math.isfinite(predicted_ttft_s(heavier, point.prefill_rate))
        return point.executor_share if sustained else WHOLE_DEVICE

    def _load(self) -> PrefillLoad:
        mean = self._tokens / self._prompts if self._prompts > 0.0 else 1.0
        return PrefillLoad(requests_s=self._prompts / WINDOW_S, prompt_tokens=max(mean, 1.0))

    def _fade(self, now: float) -> None:
        left = math.exp(min(self._at - now, 0.0) / WINDOW_S) if self._at else 1.0
        self._prompts, self._tokens, self._at = self._prompts * left, self._tokens * left, now
