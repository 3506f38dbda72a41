"""A fleet of equal groups of instances, the routing of requests to them, and the event loop."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.simulate.aggregated import Aggregated
from sglang_adrenaline.simulate.decode import Decode, DecodeRules
from sglang_adrenaline.simulate.prefill import Prefill
from sglang_adrenaline.simulate.trace import Req

AFFINITY_SLACK = 8
"""A request follows its prefix to an instance that has at most so many more requests than another one at hand."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """groups: xPyD groups whose instances reach each other; aggregated fleets have groups * (x + y) instances."""

    prefills: int
    decodes: int
    groups: int = 1
    pool_tokens: int
    share: float = 0.0
    """The executor's part of a prefill device; `cost_model.WHOLE_DEVICE`: no partition."""
    new_token_ratio: float = 0.5
    rate_error: float = 1.0
    """What executors really reach, as share of what the policy is told."""


class Events:
    """Times and what is to be done then; an action that was overtaken looks at its own version and does nothing."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable, tuple]] = []
        self._count = 0
        self.handled = 0

    def at(self, time: float, action: Callable, *args: object) -> None:
        self._count += 1
        heapq.heappush(self._heap, (time, self._count, action, args))

    def run_until(self, end: float) -> None:
        """Work off everything before `end`, and what follows from it."""
        heap = self._heap
        while heap and heap[0][0] < end:
            time, _, action, args = heapq.heappop(heap)
            action(time, *args)
            self.handled += 1


def _two_choices(blocks: tuple[int, ...], serial: int, count: int) -> tuple[int, int]:
    """Two of `count` places: the home of a prefix, or one in turn, and one that is as good as random."""
    turn = serial * 2654435761 % (1 << 32) % count
    return (blocks[0] * 40503 % 65521 % count if blocks else serial % count), turn


class Fleet:
    """What both kinds share: the load they are given."""

    def __init__(self) -> None:
        self.events = Events()
        self._serial = 0
        self._backlog: deque[Req] = deque()

    def run(self, requests: list[Req], concurrency: int | None = None) -> None:
        """Hand over all requests at their times or, with `concurrency`, so many at a time, and finish them."""
        if concurrency is None:
            for request in requests:
                self.events.run_until(request.arrival)
                self._arrive(request)
        else:
            self._backlog.extend(requests)
            for _ in range(min(concurrency, len(requests))):
                self._next_client(0.0)
        self.events.run_until(math.inf)

    def _next_client(self, now: float) -> None:
        """A request has ended; with a backlog its client sends another."""
        if self._backlog:
            self.events.at(now, self._send, self._backlog.popleft())

    def _send(self, now: float, request: Req) -> None:
        request.arrival = now
        self._arrive(request)

    def _arrive(self, request: Req) -> None:
        raise NotImplementedError


class DisaggregatedFleet(Fleet):
    """Groups of prefill and decode instances: stock PD, or with offloading."""

    def __init__(self, shape: Shape, cost: CostModel, rules: DecodeRules) -> None:
        super().__init__()
        self.groups: list[tuple[list[Prefill], list[Decode]]] = []
        for _ in range(shape.groups):
            prefills = [
                Prefill(index, cost, shape.pool_tokens, shape.share, shape.rate_error)
                for index in range(shape.prefills)
            ]
            self.groups.append(
                (prefills, [Decode(index, cost, shape.pool_tokens, rules, prefills) for index in range(shape.decodes)])
            )
        self._cost = cost
        self._load = [0] * shape.groups

    def instances(self) -> list[Decode]:
        return [decode for _, decodes in self.groups for decode in decodes]

    def _arrive(self, request: Req) -> None:
        self._serial += 1
        home, other = _two_choices(request.blocks, self._serial, len(self.groups))
        slack = AFFINITY_SLACK if request.blocks else 0
        index = home if self._load[home] <= self._load[other] + slack else other
        self._load[index] += 1
        prefills, decodes = self.groups[index]
        prefill = min(prefills, key=lambda p: (max(p.free_at, request.arrival), p.lanes_in_use, p.index))
        if request.blocks:
            follow = prefills[request.blocks[0] % len(prefills)]
            if follow.free_at <= max(prefill.free_at, request.arrival) + 1.0:
                prefill = follow
        decode = min(decodes, key=lambda d: d.outstanding)
        request.prefill, request.decode = prefill.index, index
        decode.enqueue(request)
        if len(decode.waiting) == 1:
            self._begin(decode, request.arrival)

    def _begin(self, decode: Decode, now: float) -> None:
        for request in decode.admit(now):
            done = decode.prefills[request.prefill].submit(request, now)
            done += self._cost.transfer_s(request.prompt - request.split)
            self.events.at(done, self._prefilled, decode, request)

    def _prefilled(self, now: float, decode: Decode, request: Req) -> None:
        if decode.prefilled(request, now):
            self._load[request.decode] -= 1
            self._next_client(now)
            self._begin(decode, now)
        elif not decode.batch.planned:
            decode.batch.time = max(decode.batch.time, now)
            self._turn(decode)
        elif (end := decode.batch.cut(now)) is not None:
            self._next(decode, end)

    def _next(self, decode: Decode, end: float) -> None:
        decode.version += 1
        self.events.at(end, self._boundary, decode, decode.version)

    def _boundary(self, now: float, decode: Decode, version: int) -> None:
        if version == decode.version:
            self._turn(decode)

    def _turn(self, decode: Decode) -> None:
        for request in decode.boundary():
            self._load[request.decode] -= 1
            self._next_client(request.finish)
        self._begin(decode, decode.batch.time)
        if (end := decode.plan()) is not None:
            self._next(decode, end)


class AggregatedFleet(Fleet):
    """Instances that each do everything (data parallel)."""

    def __init__(self, shape: Shape, cost: CostModel) -> None:
        super().__init__()
        count = shape.groups * (shape.prefills + shape.decodes)
        self._all = [Aggregated(index, cost, shape.pool_tokens, shape.new_token_ratio) for index in range(count)]

    def instances(self) -> list[Aggregated]:
        return self._all

    def _arrive(self, request: Req) -> None:
        self._serial += 1
        home, other = (self._all[i] for i in _two_choices(request.blocks, self._serial, len(self._all)))
        slack = AFFINITY_SLACK if request.blocks else 0
        instance = home if home.outstanding <= other.outstanding + slack else other
        instance.enqueue(request)
        if not instance.batch.planned:
            # Requests of the same moment come first, so that one batch takes them all.
            instance.batch.time = max(instance.batch.time, request.arrival)
            if len(instance.waiting) == 1:
                instance.version += 1
                self.events.at(instance.batch.time, self._boundary, instance, instance.version)
            return
        first = len(instance.waiting) == 1 and instance.fits(request)
        if first and (end := instance.batch.cut(request.arrival)) is not None:
            self._next(instance, end)

    def _next(self, instance: Aggregated, end: float) -> None:
        instance.version += 1
        self.events.at(end, self._boundary, instance, instance.version)

    def _boundary(self, now: float, instance: Aggregated, version: int) -> None:
        if version == instance.version:
            for request in instance.boundary():
                self._next_client(request.finish)
            if (end := instance.plan()) is not None:
                self._next(instance, end)
