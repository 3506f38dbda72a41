"""Times of decode steps and prefill from a profile; what the policy and the simulator compute with. Pure.

    step(rows, local, remote_i) = fixed + linear(rows) + max(local / rate, round_trip + remote_i / rate_i) + overhead
    in halves                   = max(fixed + linear of both + local / rate, round_trip + remote_i / rate_i) + overhead

`linear` interpolates the profile's points; rates are KV tokens per second (bytes per second / bytes of a token). Each
layer waits for its own slowest part; since all layers read alike, the maximum over a step's sums is the same.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from sglang_adrenaline.policy.prefill_load import bounded_by_prefill
from sglang_adrenaline.policy.sm_share import SharePoint
from sglang_adrenaline.profile_data import Profile, ShareFigures

HALVES_LAYER_S = 95e-6
"""What a layer of two halves takes beyond the linear work of both: twice the small kernels. Estimated from steps of the
7B shape on an H200 that waited for nobody: without local attention 10.4 ms with 200 rows, 13 with 389, 16 with 455
(halves), 5.8 with 176 (whole)."""
WHOLE_DEVICE = 0.0
"""As a share: no partition; executor and prefill use all SMs and get in each other's way."""


class CostModel:
    """The times of one instance. Immutable."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.kv_token_bytes = profile.model.kv_token_bytes / profile.tp_size
        self.attention_rate = profile.attention_bytes_s / self.kv_token_bytes
        self.layers = profile.model.num_layers
        self._rows = [point.rows for point in profile.linear]
        self._seconds = [point.seconds for point in profile.linear]
        self._cache: dict[int, float] = {}

    def linear_s(self, rows: int) -> float:
        """A step's work without attention, fixed part included; 0 rows take no step."""
        if rows <= 0:
            return 0.0
        cached = self._cache.get(rows)
        if cached is None:
            line = _interpolate(self._rows, self._seconds, rows)
            cached = self._cache[rows] = self.profile.step_fixed_s + line
        return cached

    def halves_linear_s(self, rows: int) -> float:
        """The same of a batch that runs as two halves, each of which reads the weights."""
        both_s = self.linear_s(rows // 2) + self.linear_s(rows - rows // 2) - self.profile.step_fixed_s
        return both_s + self.layers * HALVES_LAYER_S

    def round_trip_s(self, rows: int) -> float:
        """All layers' round trips for so many offloaded rows."""
        points = self.profile.round_trip
        if len(points) == 1:
            return self.layers * points[0].seconds
        return self.layers * _interpolate([p.rows for p in points], [p.seconds for p in points], rows)

    @property
    def overhead_s(self) -> float:
        return self.layers * self.profile.overhead_layer_s

    def step_s(
        self,
        rows: int,
        local_tokens: float,
        remote: Sequence[tuple[float, float, float]] = (),
        *,
        halves: bool = False,
    ) -> float:
        """remote: (tokens, rate, round trip) for each prefill instance that has a part in the step; halves: the batch
        runs as two in turn, if any has."""
        local_s = local_tokens / self.attention_rate
        if not remote:
            return self.linear_s(rows) + local_s
        slowest = max(trip_s + tokens / rate for tokens, rate, trip_s in remote)
        if halves:
            return max(self.halves_linear_s(rows) + local_s, slowest) + self.overhead_s
        return self.linear_s(rows) + max(local_s, slowest) + self.overhead_s

    def halves_pay(self, rows: int, local_tokens: float, remote: Sequence[tuple[float, float, float]]) -> bool:
        """Whether the step is faster in halves; arguments as for `step_s`."""
        return self.step_s(rows, local_tokens, remote, halves=True) < self.step_s(rows, local_tokens, remote)

    def prefill_bounds(
        self, waiting: int, prompt: float, output: float, *, pool_tokens: int, pace: float, peers: int
    ) -> bool:
        """`prefill_load.bounded_by_prefill` for requests of these lengths, beside a decode pool full of such ones.

        pace: of attention here, as share of the profile's; peers: prefill instances.
        """
        rows = max(int(pool_tokens / (prompt + output / 2)), 1)
        return bounded_by_prefill(
            waiting,
            prefill_s=self.prefill_s(int(prompt)) / max(peers, 1),
            decode_s=output * self.step_s(rows, pool_tokens / pace) / rows,
        )

    def life_s(
        self,
        output: float,
        prompt: float,
        *,
        rows: int,
        local_tokens: float,
        waiting: int,
        free_tokens: int,
        growth_tokens: int,
        pace: float,
    ) -> float:
        """How long a request decodes on the mean, in a batch of `rows` that it and the `waiting` will join.

        As many as fit into free_tokens, with such a prompt and growth_tokens each. local_tokens: that the batch attends
        to here; pace: of that, as share of the profile's.
        """
        joining = min(waiting + 1, int(max(free_tokens, 0) // (prompt + growth_tokens)))
        tokens = local_tokens + joining * (prompt + output / 2)
        return output * self.step_s(max(rows + joining, 1), tokens / pace)

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        """One prompt's own part of a batch (the batch's fixed time excluded)."""
        pairs = new_tokens * (cached_tokens + new_tokens / 2)
        return new_tokens * self.profile.prefill_token_s + pairs * self.profile.prefill_pair_s

    def transfer_s(self, tokens: int) -> float:
        return tokens * self.kv_token_bytes / self.profile.transfer_bytes_s

    def pool_tokens(self, memory_fraction: float = 0.85) -> int:
        """KV tokens that fit beside the weights (1 % of the memory left to activations)."""
        weights = self.profile.model.weight_bytes / self.profile.tp_size
        return max(int(((memory_fraction - 0.01) * self.profile.memory_bytes - weights) / self.kv_token_bytes), 0)

    def share_figures(self, share: float) -> ShareFigures:
        """The profile's point nearest to a share of the device."""
        return min(self.profile.shares, key=lambda point: (abs(point.share - share), point.share))

    def share_points(self) -> list[SharePoint]:
        """For `policy.choose_share`."""
        return [
            SharePoint(
                executor_share=point.share,
                attention_rate=point.attention_bytes_s / self.kv_token_bytes,
                prefill_factor=point.prefill_factor,
            )
            for point in self.profile.shares
        ]

    def rows_max(self) -> int:
        """B_max: where the linear work turns compute-bound: its flat beginning meets the slope of its end."""
        slope = (self._seconds[-1] - self._seconds[-2]) / (self._rows[-1] - self._rows[-2])
        return max(int(self._seconds[0] / slope), 1) if slope > 0 else self._rows[-1]

    def rows_within(self, slo_tpot_s: float | None, tokens_per_row: float, pool_tokens: int) -> int:
        """B_TPOT: the largest batch of such requests that is within the SLO and the pool without offloading."""
        low, high = 0, max(int(pool_tokens / max(tokens_per_row, 1.0)), 0)
        if slo_tpot_s is None:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            if self.step_s(middle, middle * tokens_per_row) <= slo_tpot_s:
                low = middle
            else:
                high = middle - 1
        return low


def _interpolate(xs: list[int], ys: list[float], x: float) -> float:
    """Piecewise linear; flat before the first point, the last piece's slope after the last."""
    if x <= xs[0] or len(xs) == 1:
        return ys[0]
    right = min(bisect.bisect_left(xs, x), len(xs) - 1)
    left = right - 1
    return ys[left] + (ys[right] - ys[left]) * (x - xs[left]) / (xs[right] - xs[left])
