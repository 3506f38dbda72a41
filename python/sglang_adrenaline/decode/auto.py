"""`--adrenaline-offload-ratio auto` in the decode scheduler: from the figures of the moment to a request's split.

Keeps what decisions by load need from one to the next (state of the policy, lengths of answers, who takes decode's
memory) and turns numbers into the policy's views. Knows nothing of SGLang, links or clocks; scheduler thread only.

A request is decided when its turn has come: in order of arrival, and only if decode could take in at once what the
decision leaves here. Otherwise it waits undecided, as it would wait for memory in stock SGLang, and is looked at anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from sglang_adrenaline import policy
from sglang_adrenaline.cost_model import WHOLE_DEVICE, CostModel
from sglang_adrenaline.policy.sm_share import MARGIN

CACHE_RESERVE_TOKENS = 8192
"""Head-room left to a prefill instance: a chunk of prefill, but no more than a tenth of its pool."""
MIN_UTILISATION = 0.05
PROMPT_WEIGHT = 0.02
"""Of the newest prompt in the mean of their lengths."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """The decode instance now. Tokens; what is `Admission`'s to know is not in it."""

    pool_tokens: int
    budget_tokens: int
    """What admission would give to new requests now, the reserve of admitted ones taken off; may be negative."""
    used_tokens: int
    """Slots of requests that have a row."""
    rows: int
    """Requests that have a row."""


@dataclass(frozen=True, kw_only=True)
class There:
    """A prefill instance now, as this decode instance knows it."""

    pool_tokens: int
    pinned_tokens: int
    """Pinned by its last report, and promised to us since."""
    attended_tokens: int
    """Prefixes of our requests that it keeps or was asked to keep."""
    lanes: int
    lanes_in_use: int
    prefill_load: float
    """Share of its time that computing prompts takes."""
    executor_share: float = WHOLE_DEVICE
    """SMs that are the executor's, as share of the device; WHOLE_DEVICE: shared with prefill."""


class Admission:
    """What requests take, or are about to take, of decode's pool: tokens of the prompt that are here, by request."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        """Decided, but without a row yet: not in `Here`."""
        self._placed: dict[str, int] = {}
        self.placed_prompts = 0
        """Prompt tokens here of requests with a row."""

    def decided(self, rid: str, local_tokens: int) -> None:
        self.waiting[rid] = local_tokens

    def placed(self, rid: str, local_tokens: int) -> None:
        """The request has its row, for the first time or again."""
        self.waiting.pop(rid, None)
        self.placed_prompts += local_tokens - self._placed.get(rid, 0)
        self._placed[rid] = local_tokens

    def gone(self, rid: str) -> None:
        """Its row is freed, or it never got one. Idempotent."""
        self.waiting.pop(rid, None)
        self.placed_prompts -= self._placed.pop(rid, 0)


class LoadDecider:
    """Decides by load. One a decode scheduler; `slo_ttft_s` None: no such objective."""

    def __init__(
        self,
        cost: CostModel,
        settings: policy.LoadSettings,
        admission: Admission,
        *,
        reserve_tokens: int,
        slo_ttft_s: float | None = None,
    ) -> None:
        self.cost, self.settings, self.admission = cost, settings, admission
        self.state = policy.LoadState()
        self.decisions: Counter[str] = Counter()
        self._reserve = reserve_tokens
        """Room that admission asks for beside each prompt."""
        self._slo_ttft_s = slo_ttft_s
        self._outputs = policy.OutputLengths()
        self._prompt_tokens = 0.0

    def decide(
        self, rid: str, prompt_len: int, target: str, here: Here, there: Mapping[str, There]
    ) -> policy.Decision | None:
        """Where to split a prompt that `target` computes; None while decode has no room for what would stay here.

        A decision counts as taken: its tokens are kept for the request until `Admission` hears of it.
        """
        waiting = self.admission.waiting
        claimed = sum(waiting.values())
        free = here.budget_tokens - claimed - self._reserve * len(waiting)
        rows = here.rows + len(waiting)
        linear_s = self.cost.linear_s(rows)
        local = here.used_tokens + claimed
        view = policy.DecodeView(
            pool_tokens=here.pool_tokens,
            free_tokens=max(free, 0),
            local_tokens=local,
            rows=rows,
            attention_rate=self.cost.attention_rate,
            expected_tokens=self._outputs.expected_tokens(local, self.admission.placed_prompts + claimed, rows),
            linear_s=linear_s,
            linear_row_s=self.cost.linear_s(rows + 1) - linear_s if rows else 0.0,
            growth_tokens=self._reserve,
        )
        views = {name: self._view(peer) for name, peer in there.items()}
        request = policy.Request(prompt_len=prompt_len)
        decision, state = policy.decide_by_load(
            self.state, request, target, view, views, self._settings_for(prompt_len)
        )
        stays = prompt_len - decision.split
        if stays + self._reserve > free and rows:  # with no row there is nothing to wait for
            return None
        self.state = state
        self._prompt_tokens = self._mean_prompt(prompt_len)
        self.decisions[decision.reason.value] += 1
        self.admission.decided(rid, stays)
        return decision

    def answered(self, output_tokens: int) -> None:
        """A request ended after so many tokens."""
        if output_tokens > 0:
            self._outputs = self._outputs.add(output_tokens)

    def predicted_step_s(self, here: Here, there: Mapping[str, There]) -> float:
        """A decode step of the requests that have rows; `there`: with the lanes and prefixes that it reads."""
        remote = [
            (peer.attended_tokens, self._rate(peer) * self.state.rates.get(name, 1.0), self._trip_s(peer.lanes_in_use))
            for name, peer in there.items()
            if peer.attended_tokens
        ]
        return self.cost.step_s(here.rows, here.used_tokens, remote)

    def observe(self, seen: policy.Observation) -> None:
        self.state = policy.observe(self.state, seen, self.settings)

    def _view(self, peer: There) -> policy.PrefillView:
        return policy.PrefillView(
            pool_tokens=peer.pool_tokens,
            pinned_tokens=peer.pinned_tokens,
            attended_tokens=peer.attended_tokens,
            lanes_free=max(peer.lanes - peer.lanes_in_use, 0),
            attention_rate=self._rate(peer),
            round_trip_s=self._trip_s(peer.lanes_in_use + 1),
            overhead_s=self.cost.overhead_s,
            cache_reserve_tokens=min(CACHE_RESERVE_TOKENS, peer.pool_tokens // 10),
            prefill_load=peer.prefill_load if peer.executor_share == WHOLE_DEVICE else 0.0,
        )

    def _rate(self, peer: There) -> float:
        if peer.executor_share == WHOLE_DEVICE:
            return self.cost.attention_rate
        return self.cost.share_figures(peer.executor_share).attention_bytes_s / self.cost.kv_token_bytes

    def _trip_s(self, rows: int) -> float:
        return self.cost.round_trip_s(max(rows, 1))

    def _settings_for(self, prompt_len: int) -> policy.LoadSettings:
        if self._slo_ttft_s is None:
            return self.settings
        mean = self._mean_prompt(prompt_len)
        service_s = self.cost.profile.prefill_fixed_s + self.cost.prefill_s(int(mean))
        most = min(most_utilisation(service_s, self._slo_ttft_s), self.settings.prefill_utilisation)
        return msgspec.structs.replace(self.settings, prefill_utilisation=max(most, MIN_UTILISATION))

    def _mean_prompt(self, newest: int) -> float:
        return self._prompt_tokens + PROMPT_WEIGHT * (newest - self._prompt_tokens) if self._prompt_tokens else newest


def most_utilisation(service_s: float, slo_ttft_s: float) -> float:
    """The load under which prompts of `service_s` each wait so little that their mean TTFT meets the objective.

    `policy.sm_share.predicted_ttft_s` solved for the load: service * (1 + u / (2 (1 - u))) <= MARGIN * SLO. 0..1.
    """
    times = MARGIN * slo_ttft_s / service_s
    return 2.0 * (times - 1.0) / (2.0 * times - 1.0) if times > 1.0 else 0.0
