"""Which share of the SMs the executor should have, as prefill's load shifts. Knows nothing of GPUs; scheduler thread.

    control = ShareControl(points_at(cost, shares), slo_ttft_s)
    control.computed(now, new_tokens)     for each prompt that prefill has computed
    share = control.share(now)            before a batch is launched: place it off that share of the SMs

A change needs DWELL_S since the last one, and a larger share room to spare
(`policy.choose_share`), so a share does not flap with single prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.policy import PrefillLoad, SharePoint, choose_share

WINDOW_S = 10.0
DWELL_S = 2.0


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
    """`slo_ttft_s`: objective for the mean time to first token, seconds. Raises ValueError on no points."""

    def __init__(self, points: Sequence[SharePoint], slo_ttft_s: float) -> None:
        self._points, self._slo_ttft_s = tuple(points), slo_ttft_s
        self._current = choose_share(self._points, PrefillLoad(requests_s=0.0, prompt_tokens=1.0), slo_ttft_s)
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
            best = choose_share(self._points, self._load(), self._slo_ttft_s, self._current.executor_share)
            if best is not self._current:
                self._current, self._changed_at = best, now
        return self._current.executor_share

    def _load(self) -> PrefillLoad:
        mean = self._tokens / self._prompts if self._prompts > 0.0 else 1.0
        return PrefillLoad(requests_s=self._prompts / WINDOW_S, prompt_tokens=max(mean, 1.0))

    def _fade(self, now: float) -> None:
        left = math.exp(min(self._at - now, 0.0) / WINDOW_S) if self._at else 1.0
        self._prompts, self._tokens, self._at = self._prompts * left, self._tokens * left, now
