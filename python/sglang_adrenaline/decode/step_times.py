"""Measured decode steps, gathered for the policy's feedback: step times, predicted ones, and waits of each link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from sglang_adrenaline import policy

OBSERVE_STEPS = 32
PREDICT_EVERY = 8


@dataclass(frozen=True)
class LinkTotals:
    """Of one link since it is up. `index` never repeats, `peer` is the prefill instance."""

    index: int
    peer: str
    steps: int
    exposed_wait_s: float


@dataclass(frozen=True)
class Predicted:
    """One step by the cost model, in seconds. remote: of each prefill instance (attention, round trips)."""

    step_s: float
    local_s: float
    remote: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class StepTimes:
    """One window of OBSERVE_STEPS decode steps after the other."""

    def __init__(self) -> None:
        self._steps = 0
        self._step_s = 0.0
        self._predicted: list[Predicted] = []
        self._before: dict[int, LinkTotals] = {}

    def add(self, step_s: float) -> bool:
        """A step took `step_s` from its launch to the next one's. Whether a prediction for it is wanted."""
        self._steps += 1
        self._step_s += step_s
        return self._steps % PREDICT_EVERY == 0

    def predicted(self, step: Predicted) -> None:
        self._predicted.append(step)

    def observations(self, links: Iterable[LinkTotals]) -> list[policy.Observation]:
        """At the end of a window, one for each link that took part in it; none before."""
        if self._steps < OBSERVE_STEPS:
            return []
        seen = []
        now = {link.index: link for link in links}
        for index, link in now.items():
            before = self._before.get(index, LinkTotals(index, link.peer, 0, 0.0))
            steps = link.steps - before.steps
            parts = [step.remote[link.peer] for step in self._predicted if link.peer in step.remote]
            if steps > 0 and parts:
                seen.append(
                    policy.Observation(
                        peer=link.peer,
                        steps=steps,
                        step_s=self._step_s / self._steps,
                        predicted_step_s=fmean(step.step_s for step in self._predicted),
                        exposed_wait_s=max(link.exposed_wait_s - before.exposed_wait_s, 0.0) / steps,
                        local_s=fmean(step.local_s for step in self._predicted if link.peer in step.remote),
                        remote_s=fmean(attention_s for attention_s, _ in parts),
                        round_trip_s=fmean(trip_s for _, trip_s in parts),
                    )
                )
        self._before = now
        self._steps, self._step_s, self._predicted = 0, 0.0, []
        return seen
