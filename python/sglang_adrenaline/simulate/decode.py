"""A decode instance of a PD deployment, stock or with offloading; the decisions are the package's own policy.

Admission is SGLang's: a request is admitted when its tokens here and what it and all active requests will grow by fit;
only then does its prefill begin. Stock SGLang takes a constant reserve for the growth of each, ours a forecast of all
(`policy/forecast.py`). When the pool runs full, the newest requests are retracted and come back later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sglang_adrenaline import policy
from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.decode.step_times import OBSERVE_STEPS
from sglang_adrenaline.policy.views import pin_room
from sglang_adrenaline.simulate.admitted import Admitted
from sglang_adrenaline.simulate.batch import Batch
from sglang_adrenaline.simulate.prefill import BATCH_TOKENS, Prefill
from sglang_adrenaline.simulate.trace import Req

RETRACT_STEPS = 20
"""A retraction frees room for so many steps, as SGLang's does."""


class Room(NamedTuple):
    """Tokens of the pool. free: that a newcomer and its growth may take; growth: its own; kept: for all growth."""

    free: int
    growth: int
    kept: int


@dataclass(frozen=True, slots=True)
class DecodeRules:
    """How requests are treated."""

    offload: float | str | None
    """None: stock PD. A number: that share of prompt tokens. "auto": by load."""
    settings: policy.LoadSettings
    lanes: int
    reserve_tokens: int = 512
    """SGLang's --num-reserved-decode-tokens."""
    halves_from: int = 0
    """Rows of a batch that runs as two halves in turn; 0: none does."""
    forecast: bool = False
    """Admit by forecast."""
    at_arrival: bool = False
    """Decide when a request arrives, before it waits for memory; what the caps refuse then stays local."""


class Decode:
    """One decode instance and its queue. `events` gets (time, action) pairs; see `fleet.Fleet`."""

    def __init__(self, index: int, cost: CostModel, pool_tokens: int, rules: DecodeRules, prefills: list[Prefill]):
        self.index, self.cost, self.pool, self.rules = index, cost, pool_tokens, rules
        self.prefills = prefills
        self.batch = Batch(token_s=1.0 / cost.attention_rate)
        self.waiting: deque[Req] = deque()
        self.arrived: list[Req] = []
        """Their KV is here; they join at the next boundary."""
        self.used = 0
        self.active = 0
        self._admitted = Admitted() if rules.forecast else None
        self.local_prompts = 0
        """Prompt tokens here of all admitted requests."""
        self.outputs = policy.OutputLengths()
        self.prompts = policy.PromptLengths()
        self.duty = policy.Duty()
        self.coming_local = 0
        """Tokens here of admitted requests that have not joined yet."""
        self.under_way = dict.fromkeys((p.index for p in prefills), 0)
        """By prefill instance, admitted requests whose prompts it computes or is to compute."""
        self.under_way_tokens = 0
        """Of the pool, for their prompts."""
        self.remote = dict.fromkeys((p.index for p in prefills), 0)
        self.remote_rows = 0
        self.retracted = 0
        self.reasons: dict[str, int] = {}
        self.version = 0
        self.now = 0.0
        """Time of the newest decision."""
        self.outstanding = 0
        self.state: Any = policy.LoadState() if rules.offload == "auto" else policy.State()
        self._order: list[Req] = []
        self._seen_steps = 0
        self._seen_exposed = 0.0
        self._seen_busy = 0.0

    # ---- admission --------------------------------------------------------------------------------------------------

    def enqueue(self, request: Req) -> None:
        self.outstanding += 1
        self.now = max(self.now, request.arrival)
        if self.rules.offload is None:
            request.split = 0
        elif self.rules.at_arrival:
            self._settle(request, *self._decide(request, self._room(request, 0)))
        self.waiting.append(request)

    def admit(self, now: float) -> Iterator[Req]:
        """Requests whose prefill begins now, one by one, so that each decision sees what those before led to.

        In order of arrival, but those whose prefill instance has enough to do are passed. Retracted ones, first in the
        queue, join the batch at once; they are only there at boundaries. In between `used` is short of what the run
        under way has added by `now`.
        """
        self.now = now
        steps = int((now - self.batch.time) / self.batch.step_s()) if self.batch.planned else 0
        while (place := self._turn()) is not None:
            request = self.waiting[place]
            room = self._room(request, steps)
            undecided = request.split < 0
            split, state, reason = self._decide(request, room) if undecided else (request.split, None, "")
            need = request.prompt - split + max(request.produced, 1)
            if self.active and (need + room.growth > room.free or reason == policy.Reason.WAIT):
                break
            del self.waiting[place]
            if undecided:
                self._settle(request, split, state, reason)
            self.used += need
            self.active += 1
            self.local_prompts += request.prompt - request.split
            self.coming_local += need
            if self._admitted is not None:
                self._admitted.add(request, max(request.produced, 1))
            if request.produced:
                self._join(request)
            else:
                self._goes_to_prefill(request, 1)
                yield request

    def _turn(self) -> int | None:
        """Place in the queue of the request whose turn it is."""
        if self.rules.offload != "auto":
            return 0 if self.waiting else None
        tokens, pool = self.under_way_tokens, self.pool
        enough = {index: policy.has_enough(count, tokens, pool) for index, count in self.under_way.items()}
        everywhere = all(enough.values())
        for place, request in enumerate(self.waiting):
            if request.split >= 0 or not enough[request.prefill]:
                return place
            if everywhere:  # retracted requests, which need no prefill, come first
                break
        return None

    def _goes_to_prefill(self, request: Req, sign: int) -> None:
        """1: it is to be computed there; -1: it was."""
        self.under_way[request.prefill] += sign
        self.under_way_tokens += sign * (request.prompt - request.split)

    def _room(self, request: Req, steps: int) -> Room:
        """For a newcomer, `steps` into the run under way."""
        free = self.pool - self.used - self.batch.rows * steps
        if self._admitted is None:
            reserve = self.rules.reserve_tokens
            return Room(free - reserve * self.active, reserve, reserve * (self.active + 1))
        growth, own = self._admitted.growth(self.batch.step + steps, request, self.rules.reserve_tokens)
        kept = growth + int(policy.HEADROOM * self.pool)
        return Room(free - kept + own, own, kept)

    def prefilled(self, request: Req, now: float) -> bool:
        """The KV that is to be here has come, with the first token; True if that was the last token as well."""
        self._goes_to_prefill(request, -1)
        request.first = now
        request.produced = 1
        if request.output > 1:
            self.arrived.append(request)
            return False
        tokens = request.prompt - request.split + 1
        self.coming_local -= tokens
        self.used -= tokens
        request.finish = now
        self._release(request)
        return True

    def _settle(self, request: Req, split: int, state: Any, reason: str) -> None:
        request.split = split
        self.state = state
        self.prompts = self.prompts.add(request.prompt)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if split:
            self.prefills[request.prefill].pin(request, split)

    def _decide(self, request: Req, room: Room) -> tuple[int, Any, str]:
        """(split, next state of the policy, why) for a request."""
        if self.rules.offload == "auto":
            return self._decide_by_load(request, room)
        settings = self.rules.settings
        fixed = policy.Settings(float(self.rules.offload or 0.0), settings.min_tokens, settings.page_size)
        split, state = policy.decide(self.state, request.prompt, None, fixed)
        peer = self.prefills[request.prefill]
        if split and (
            split - peer.cache.pinned_prefix(request.blocks) > pin_room(self._view(peer, bounds=False), settings)
            or not self._lanes(peer)
        ):
            return 0, state, "refused"
        return split, state, "ratio"

    def _decide_by_load(self, request: Req, room: Room) -> tuple[int, Any, str]:
        peer = self.prefills[request.prefill]
        shared = peer.cache.pinned_prefix(request.blocks)
        cached, coming = peer.cache.expected_prefix(request.blocks)
        rows = self.active
        behind = max(len(self.waiting) - 1, 0)
        output = self.outputs.mean or min(room.growth, request.limit)
        bounds = self.cost.prefill_bounds(
            behind + self.active - self.batch.rows,
            self.prompts.add(request.prompt).mean,
            output,
            pool_tokens=self.pool,
            pace=self.state.local_pace.rate,
            peers=len(self.prefills),
        )
        local = self.batch.local + self.coming_local
        halves = self._in_halves(rows)
        linear = self.cost.halves_linear_s(rows) if halves else self.cost.linear_s(rows)
        decision, state = policy.decide_by_load(
            self.state,
            policy.Request(prompt_len=request.prompt, shared_tokens=shared, cached_tokens=cached, coming=coming),
            str(peer.index),
            policy.DecodeView(
                pool_tokens=self.pool,
                free_tokens=max(room.free, 0),
                local_tokens=local,
                rows=rows,
                computing=rows - self.batch.rows,
                attention_rate=self.cost.attention_rate,
                expected_tokens=self.outputs.expected_tokens(local, self.local_prompts, rows),
                duty=self.duty.share,
                linear_s=linear,
                linear_row_s=self.cost.linear_s(rows + 1) - self.cost.linear_s(rows) if rows else 0.0,
                under_s=linear if halves else 0.0,
                waiting=behind,
                growth_tokens=room.growth,
                kept_tokens=room.kept,
                life_s=self.cost.life_s(
                    output,
                    request.prompt,
                    rows=rows,
                    local_tokens=local,
                    waiting=behind,
                    free_tokens=room.free,
                    growth_tokens=room.growth,
                    pace=self.state.local_pace.rate,
                ),
            ),
            {str(p.index): self._view(p, bounds) for p in self.prefills},
            self.rules.settings,
        )
        return decision.split, state, decision.reason

    def _lanes(self, peer: Prefill) -> int:
        return max(self.rules.lanes - peer.lanes_in_use, 0)

    def _view(self, peer: Prefill, bounds: bool) -> policy.PrefillView:
        brisk, lasting = peer.loads(self.now)
        return policy.PrefillView(
            pool_tokens=peer.pool_tokens,
            pinned_tokens=peer.pinned,
            read_tokens=peer.pinned,
            lanes_free=self._lanes(peer),
            attention_rate=peer.told_rate,
            round_trip_s=self.cost.round_trip_s(peer.lanes_in_use + 1),
            overhead_s=self.cost.overhead_s,
            prefill_load=brisk,
            lasting_load=lasting,
            bounds=bounds and peer.divided,
            cache_reserve_tokens=min(BATCH_TOKENS, peer.pool_tokens // 10),
        )

    # ---- steps ------------------------------------------------------------------------------------------------------

    def boundary(self) -> list[Req]:
        """Carry out the planned run, let requests leave and join; returns those that finished."""
        batch = self.batch
        self.used += batch.finish_run() * batch.rows
        finished = []
        while (request := batch.pop_finished()) is not None:
            tokens = request.prompt - request.split + request.output
            batch.local -= tokens
            self.used -= tokens
            if request.split:
                self._reads(request, -1)
            self._release(request)
            request.produced = request.output
            request.finish = batch.time
            finished.append(request)
        for request in self.arrived:
            self._join(request)
        self.arrived.clear()
        if batch.rows and self.used + batch.rows > self.pool and batch.rows > 1:
            self._retract()
        self._observe()
        return finished

    def _join(self, request: Req) -> None:
        tokens = request.prompt - request.split + request.produced
        self.coming_local -= tokens
        self.batch.add(request, tokens)
        if self._admitted is not None:
            self._admitted.runs(request, self.batch.step)
        self._order.append(request)
        if request.split:
            self._reads(request, 1)

    def _release(self, request: Req) -> None:
        self.outputs = self.outputs.add(request.output)
        if self._admitted is not None:
            self._admitted.remove(request)
            self._admitted.shares = self._admitted.shares.add(request.output, request.limit)
        self.local_prompts -= request.prompt - request.split
        self.active -= 1
        self.outstanding -= 1
        if request.split:
            self.prefills[request.prefill].unpin(request, request.split)

    def _reads(self, request: Req, sign: int) -> None:
        """The executor begins (1) or ceases (-1) to read this request's prefix."""
        self.remote[request.prefill] += sign * request.split
        self.prefills[request.prefill].reading += sign * request.split
        self.remote_rows += sign

    def _retract(self) -> None:
        batch = self.batch
        while batch.rows > 1 and self.used + RETRACT_STEPS * batch.rows > self.pool:
            request = self._order.pop()
            if request.stamp < 0:
                continue
            left = request.stamp - batch.step
            request.produced = request.output - left
            tokens = request.prompt - request.split + request.produced
            batch.remove(request, tokens)
            self.used -= tokens
            self.local_prompts -= request.prompt - request.split
            self.active -= 1
            if self._admitted is not None:
                self._admitted.remove(request)
            if request.split:
                self._reads(request, -1)
            self.retracted += 1
            self.waiting.appendleft(request)

    def plan(self) -> float | None:
        """Begin the next run; the time of its last boundary, None if there is nothing to do."""
        batch = self.batch
        if not batch.rows:
            return None
        fixed, remote = self.cost.linear_s(batch.rows), 0.0
        if self.remote_rows:
            under = 0.0
            trip = self.cost.round_trip_s(self.remote_rows)
            parts = [
                (peer.read_tokens, peer.rate(batch.time), trip) for peer in self.prefills if self.remote[peer.index]
            ]
            remote = max(trip + tokens / rate for tokens, rate, _ in parts)
            if self._in_halves(batch.rows) and self.cost.halves_pay(batch.rows, batch.local, parts):
                fixed = under = self.cost.halves_linear_s(batch.rows)
            remote, fixed = max(remote - under, 0.0), fixed + self.cost.overhead_s
        if len(self._order) > 4 * batch.rows + 16:
            self._order = [request for request in self._order if request.stamp >= 0]
        end = batch.plan(max((self.pool - self.used) // batch.rows, 1), fixed, remote)
        for peer in self.prefills:
            if self.remote[peer.index]:
                peer.step_s = batch.step_s()
        return end

    def _in_halves(self, rows: int) -> bool:
        return 0 < self.rules.halves_from <= rows

    def _observe(self) -> None:
        """Tell the policy now and then what the slowest prefill instance reached and how long it was waited for."""
        batch = self.batch
        steps = batch.steps_total - self._seen_steps
        if self.rules.offload != "auto" or steps < OBSERVE_STEPS:
            return
        self.duty = self.duty.add(batch.rows, self.active)
        if self.remote_rows:
            self._observe_slowest(steps)
        taking_part = {str(index) for index, tokens in self.remote.items() if tokens}
        self.state = policy.unobserved(self.state, steps, self.outputs.mean, taking_part)
        self._seen_steps, self._seen_exposed, self._seen_busy = batch.steps_total, batch.exposed_s, batch.busy_s

    def _observe_slowest(self, steps: int) -> None:
        batch = self.batch
        rates = [peer.rate(batch.time) for peer in self.prefills]
        slowest = max(
            self.prefills,
            key=lambda peer: peer.read_tokens / rates[peer.index] if self.remote[peer.index] else -1.0,
        )
        step_s = (batch.busy_s - self._seen_busy) / steps
        under = self.cost.halves_linear_s(batch.rows) if self._in_halves(batch.rows) else 0.0
        mean_local = max(batch.local - batch.rows * min(steps, OBSERVE_STEPS) / 2, 0)
        local_s = mean_local / self.cost.attention_rate
        exposed_s = (batch.exposed_s - self._seen_exposed) / steps
        self.state = policy.observe(
            self.state,
            policy.Observation(
                peer=str(slowest.index),
                steps=steps,
                step_s=step_s,
                predicted_step_s=step_s,
                exposed_wait_s=exposed_s,
                local_s=local_s,
                under_s=under,
                local_span_s=local_s,
                answer_s=local_s + exposed_s,
                executor_s=slowest.read_tokens / rates[slowest.index],
                life_steps=self.outputs.mean,
                remote_s=slowest.read_tokens / slowest.told_rate,
                round_trip_s=self.cost.round_trip_s(self.remote_rows),
            ),
            self.rules.settings,
        )
