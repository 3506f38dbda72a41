"""Measured decode steps, gathered for the policy's feedback: step times, predicted ones, links' waits and speeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from sglang_adrenaline import policy

OBSERVE_STEPS = 16
PREDICT_EVERY = 8


@dataclass(frozen=True)
class LinkTotals:
    """Of one link since it is up. `index` never repeats, `peer` is the prefill instance."""

    index: int
    peer: str
    steps: int
    exposed_wait_s: float
    local_span_s: float = 0.0
    busy_s: float = 0.0
    """Of the executor, with what it worked and read in that time, by its newest report; 0: not measured."""
    worked_s: float = 0.0
    read_tokens: int = 0


@dataclass(frozen=True)
class Speed:
    """Seconds a token that an executor read, and those in which it had the device; 0: not measured."""

    busy_s: float = 0.0
    worked_s: float = 0.0


@dataclass(frozen=True)
class RemotePart:
    """What a prefill instance has to do with a step. Seconds: predicted, at the rate of its view."""

    tokens: int
    attention_s: float
    round_trip_s: float


@dataclass(frozen=True)
class Predicted:
    """One step by the cost model, in seconds; step_s: with what measured steps have corrected, local_s: without."""

    step_s: float
    local_s: float
    remote: Mapping[str, RemotePart] = field(default_factory=dict)
    under_s: float = 0.0
    """What else of the step remote attention hides under."""


@dataclass(frozen=True)
class Window:
    """So many decode steps; seen: one observation for each link that took part in them."""

    steps: int
    seen: Sequence[policy.Observation] = ()


class StepTimes:
    """One window of OBSERVE_STEPS decode steps after the other."""

    def __init__(self) -> None:
        self._steps = 0
        self._step_s = 0.0
        self._predicted: list[Predicted] = []
        self._before: dict[int, LinkTotals] = {}
        self._reached: dict[int, Speed] = {}
        """Of each link's executor, by the newest report that told."""

    def add(self, step_s: float) -> bool:
        """A step took `step_s` from its launch to the next one's. Whether a prediction for it is wanted."""
        self._steps += 1
        self._step_s += step_s
        return self._steps % PREDICT_EVERY == 0

    def predicted(self, step: Predicted) -> None:
        self._predicted.append(step)

    def window(self, links: Iterable[LinkTotals]) -> Window | None:
        """Once it is over; None before."""
        if self._steps < OBSERVE_STEPS:
            return None
        now = {link.index: link for link in links}
        rose = [_rise(link, self._before.get(index)) for index, link in now.items()]
        self._reached = {link.index: reached for link in rose if (reached := self._speed(link)) is not None}
        rose = [link for link in rose if link.steps > 0]
        # Each waits for those before it: the shortest span has no wait in it.
        span_s = min((link.local_span_s / link.steps for link in rose), default=0.0)
        seen = [observed for link in rose if (observed := self._observed(link, span_s)) is not None]
        window = Window(self._steps, seen)
        self._before = now
        self._steps, self._step_s, self._predicted = 0, 0.0, []
        return window

    def _speed(self, rose: LinkTotals) -> Speed | None:
        if rose.read_tokens > 0 and rose.busy_s > 0.0:
            return Speed(rose.busy_s / rose.read_tokens, rose.worked_s / rose.read_tokens)
        return self._reached.get(rose.index)

    def _observed(self, rose: LinkTotals, span_s: float) -> policy.Observation | None:
        """None where no prediction was asked for while the link had a part in steps."""
        took_part = [step for step in self._predicted if rose.peer in step.remote]
        if not took_part:
            return None
        parts = [step.remote[rose.peer] for step in took_part]
        reached = self._reached.get(rose.index, Speed())
        tokens = fmean(part.tokens for part in parts)
        return policy.Observation(
            peer=rose.peer,
            steps=rose.steps,
            step_s=self._step_s / self._steps,
            predicted_step_s=fmean(step.step_s for step in self._predicted),
            exposed_wait_s=rose.exposed_wait_s / rose.steps,
            local_s=fmean(step.local_s for step in took_part),
            under_s=fmean(step.under_s for step in took_part),
            remote_s=fmean(part.attention_s for part in parts),
            round_trip_s=fmean(part.round_trip_s for part in parts),
            local_span_s=span_s,
            answer_s=(rose.local_span_s + rose.exposed_wait_s) / rose.steps if rose.local_span_s else 0.0,
            executor_s=tokens * reached.busy_s,
            worked_s=tokens * reached.worked_s,
        )


def _rise(now: LinkTotals, before: LinkTotals | None) -> LinkTotals:
    """Since `before`; None: since the link is up."""
    if before is None:
        return now
    return LinkTotals(
        now.index,
        now.peer,
        now.steps - before.steps,
        max(now.exposed_wait_s - before.exposed_wait_s, 0.0),
        max(now.local_span_s - before.local_span_s, 0.0),
        now.busy_s - before.busy_s,
        now.worked_s - before.worked_s,
        now.read_tokens - before.read_tokens,
    )
