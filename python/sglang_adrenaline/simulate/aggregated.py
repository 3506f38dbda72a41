"""An aggregated instance: prefill and decode on one device, prefill first, as SGLang schedules by default."""

from __future__ import annotations

from collections import deque

from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.simulate.batch import Batch
from sglang_adrenaline.simulate.decode import RETRACT_STEPS
from sglang_adrenaline.simulate.prefill import BATCH_TOKENS, PrefixCache
from sglang_adrenaline.simulate.trace import Req


class Aggregated:
    """One instance and its queue. A request is admitted when it and this share of all outputs to come fit."""

    def __init__(self, index: int, cost: CostModel, pool_tokens: int, new_token_ratio: float) -> None:
        self.index, self.cost, self.pool = index, cost, pool_tokens
        self.new_token_ratio = new_token_ratio
        self.batch = Batch(token_s=1.0 / cost.attention_rate)
        self.cache = PrefixCache()
        self.waiting: deque[Req] = deque()
        self.used = 0
        self.to_come = 0
        """Output tokens that running requests still have to produce."""
        self.version = 0
        self.outstanding = 0
        self.retracted = 0
        self.prefill_s = 0.0
        self._order: list[Req] = []

    def enqueue(self, request: Req) -> None:
        self.outstanding += 1
        self.waiting.append(request)

    def boundary(self) -> list[Req]:
        """Carry out the planned run, let requests leave, prefill what fits; returns those that finished."""
        batch = self.batch
        grown = batch.finish_run() * batch.rows
        self.used += grown
        self.to_come -= grown
        finished = []
        while (request := batch.pop_finished()) is not None:
            batch.local -= request.prompt + request.output
            self.used -= request.prompt + request.output
            self.outstanding -= 1
            request.produced = request.output
            request.finish = batch.time
            finished.append(request)
        if batch.rows > 1 and self.used + batch.rows > self.pool:
            self._retract()
        finished += self._prefill()
        return finished

    def fits(self, request: Req) -> bool:
        left = request.output - request.produced
        tokens = self.used + request.prompt + request.produced
        return tokens + self.new_token_ratio * (self.to_come + left) <= self.pool or self.used == 0

    def _prefill(self) -> list[Req]:
        """Batches of prompts until memory or the queue ends; decode stands still meanwhile."""
        batch, single = self.batch, []
        while self.waiting and self.fits(self.waiting[0]):
            together: list[Req] = []
            tokens, seconds = 0, self.cost.profile.prefill_fixed_s
            while self.waiting and (not together or tokens < BATCH_TOKENS) and self.fits(self.waiting[0]):
                request = self.waiting.popleft()
                length = request.prompt + request.produced
                request.cached = min(self.cache.match(request.blocks), length - 1)
                tokens += length - request.cached
                seconds += self.cost.prefill_s(length - request.cached, request.cached)
                if request.blocks:
                    self.cache.insert(request.blocks, max(self.pool - self.used - length, 0))
                if not request.produced:
                    request.produced = 1
                    length += 1
                self.used += length
                self.to_come += request.output - request.produced
                together.append(request)
            batch.time += seconds
            self.prefill_s += seconds
            for request in together:
                if request.first < 0:
                    request.first = batch.time
                if request.output == request.produced:
                    self.used -= request.prompt + request.output
                    self.outstanding -= 1
                    request.finish = batch.time
                    single.append(request)
                else:
                    batch.add(request, request.prompt + request.produced)
                    self._order.append(request)
        return single

    def _retract(self) -> None:
        batch = self.batch
        while batch.rows > 1 and self.used + RETRACT_STEPS * batch.rows > self.pool:
            request = self._order.pop()
            if request.stamp < 0:
                continue
            left = request.stamp - batch.step
            request.produced = request.output - left
            batch.remove(request, request.prompt + request.produced)
            self.used -= request.prompt + request.produced
            self.to_come -= left
            self.retracted += 1
            self.waiting.appendleft(request)

    def plan(self) -> float | None:
        batch = self.batch
        if not batch.rows:
            return None
        if len(self._order) > 4 * batch.rows + 16:
            self._order = [request for request in self._order if request.stamp >= 0]
        return batch.plan(max((self.pool - self.used) // batch.rows, 1), self.cost.linear_s(batch.rows), 0.0)
