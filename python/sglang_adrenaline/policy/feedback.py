"""What measured steps change in the decision by load: rates of attention here and there, round trips, fixed time.

Decode measures what attention here takes beside the executors', which report what they read in how long: both rates
are known after one window of steps, and only noise has to be smoothed (`pace.py`). What passes between a layer's
queries and its answers beyond the executor's own time is the round trip: about that where decode waits longer than it
attends, at most that elsewhere, since it waits for the slow ones of many answers and the rest are hidden. So a shorter
one is believed at once, and a longer one the more, the more of the time was waited.

An executor that does not report is known by waits alone (`_guessed_rate`): its part of the step took what local
attention took, and the wait on top. Where nothing was waited for, that is only a lower bound, and the rate is tried
upwards while requests stay local for it. Such a rate moves after several observations in a row that agree, and not at
all inside a dead band. The caller agrees with the other ranks on each observation first (e.g. rank 0's is taken).

An instance that has no part in steps is not measured, and one that was slow gets no part. So what is known of it fades
while nothing is measured (`unobserved`): the slower it was, the longer until it is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import msgspec

from sglang_adrenaline.policy.auto import LoadState
from sglang_adrenaline.policy.pace import KEEP, Pace
from sglang_adrenaline.policy.views import LoadSettings

MORE = 1.1
"""Upwards without evidence."""
RATE_MIN, RATE_MAX = 0.25, 2.0
"""Of guessed rates."""
TOLERANCE = 0.05
EXTRA_WEIGHT = 0.2
TRIP_WEIGHT = 0.5
T = TypeVar("T")

FADE_LIVES = 16.0
"""What is not measured any more is forgotten by a factor of e in as many lives of a request, so that trying what is
still slow costs few of the steps."""
LIFE_STEPS = 256.0
"""As long as none is known."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the recent steps in which rows of one prefill instance took part. Seconds a step."""

    peer: str
    steps: int
    step_s: float
    predicted_step_s: float
    exposed_wait_s: float
    """Decode waited so long for this instance's answers."""
    local_s: float
    """Predicted: attention here, at the rate that the view says."""
    under_s: float = 0.0
    """Predicted: what else of a step the remote part hides under."""
    remote_s: float
    """Predicted: this instance's attention at the rate that its view says."""
    round_trip_s: float = 0.0
    """Predicted: what this instance's answers take besides."""
    local_span_s: float = 0.0
    """Measured: attention here; 0: not measured."""
    answer_s: float = 0.0
    """Measured: attention here and waits, as this instance's link saw them; 0: not measured."""
    executor_s: float = 0.0
    """Measured: this instance's attention; 0: not measured."""
    worked_s: float = 0.0
    """Measured: the part of it in which the executor had the device; 0: not measured."""
    life_steps: float = 0.0
    """Steps that a request takes part in, on the mean; 0: not known."""


def observe(state: LoadState, seen: Observation, settings: LoadSettings) -> LoadState:
    """The state after an observation; one without steps changes nothing."""
    if seen.steps <= 0 or seen.step_s <= 0.0:
        return state
    extra_s = state.extra_s
    if seen.predicted_step_s > 0.0:
        beyond = seen.step_s - seen.predicted_step_s
        beyond = _clip(beyond, -seen.predicted_step_s / 2, 2 * seen.predicted_step_s)
        extra_s += EXTRA_WEIGHT * (beyond - extra_s)
    # What a request meets on the mean of its life counts: an executor is slow while prefill computes, and fast after.
    keep = max(math.exp(-seen.steps / seen.life_steps), KEEP) if seen.life_steps > 0.0 else KEEP
    state = msgspec.structs.replace(
        state, extra_s=extra_s, local_pace=state.local_pace.add(seen.local_s, seen.local_span_s, keep)
    )
    if seen.executor_s <= 0.0:
        return state if seen.peer in state.paces else _guessed_rate(state, seen, settings)
    pace = state.paces.get(seen.peer, Pace()).add(seen.remote_s, seen.executor_s, keep)
    work_pace = state.work_paces.get(seen.peer, Pace()).add(seen.remote_s, seen.worked_s, keep)
    trips = {**state.trips, seen.peer: _learnt_trip(state.trips.get(seen.peer, 0.0), seen)}
    return msgspec.structs.replace(
        state,
        paces={**state.paces, seen.peer: pace},
        work_paces={**state.work_paces, seen.peer: work_pace},
        trips=trips,
    )


def unobserved(state: LoadState, steps: int, life_steps: float, observed: Collection[str]) -> LoadState:
    """The state after a window of steps in which only these prefill instances were observed.

    life_steps: as in `Observation`. What is known of other instances turns back into what their views say; where there
    was no observation at all, so does what is known of this instance.
    """
    keep = math.exp(-steps / (FADE_LIVES * (life_steps or LIFE_STEPS)))

    def faded(known: Mapping[str, T], fade: Callable[[T], T]) -> dict[str, T]:
        return {name: value if name in observed else fade(value) for name, value in known.items()}

    state = msgspec.structs.replace(
        state,
        paces=faded(state.paces, lambda pace: pace.faded(keep)),
        work_paces=faded(state.work_paces, lambda pace: pace.faded(keep)),
        trips=faded(state.trips, lambda trip_s: keep * trip_s),
        rates=faded(state.rates, lambda rate: rate**keep),
    )
    if observed:
        return state
    return msgspec.structs.replace(state, local_pace=state.local_pace.faded(keep), extra_s=keep * state.extra_s)


def _learnt_trip(beyond_s: float, seen: Observation) -> float:
    """What round trips take beyond `seen.round_trip_s`, which `beyond_s` was so far."""
    if seen.answer_s <= 0.0:
        return beyond_s
    took_s = seen.answer_s + seen.under_s
    told_s = max(took_s - seen.executor_s, 0.0) - seen.round_trip_s
    weight = TRIP_WEIGHT
    if told_s > beyond_s:
        weight *= min(2 * seen.exposed_wait_s / took_s, 1.0)
    return beyond_s + weight * (told_s - beyond_s)


def _guessed_rate(state: LoadState, seen: Observation, settings: LoadSettings) -> LoadState:
    rate = state.rates.get(seen.peer, 1.0)
    waited = seen.exposed_wait_s / seen.step_s
    told = _told_rate(seen)
    vote = _vote(state, rate, told, waited, settings)
    before = state.votes.get(seen.peer, 0)
    votes = before + vote if vote * before >= 0 and vote else vote
    rates = state.rates
    if abs(votes) >= settings.patience:
        target = math.sqrt(rate * _clip(told, RATE_MIN, RATE_MAX))
        if waited < settings.wait_low:
            target = max(target, rate * MORE)
        rates = {**rates, seen.peer: _clip(target, RATE_MIN, RATE_MAX)}
        votes = 0
    return msgspec.structs.replace(state, rates=rates, votes={**state.votes, seen.peer: votes})


def _told_rate(seen: Observation) -> float:
    """The rate, as share of what the view says, by which the instance's part took as long as it did (or less)."""
    took_s = (seen.local_span_s or seen.local_s) + seen.under_s + seen.exposed_wait_s - seen.round_trip_s
    return seen.remote_s / took_s if took_s > 0.0 else RATE_MAX


def _vote(state: LoadState, rate: float, told: float, waited: float, settings: LoadSettings) -> int:
    if waited < settings.wait_low:
        return 1 if state.limited or told > rate * (1 + TOLERANCE) else 0
    if waited <= settings.wait_high:
        return 0
    return -1 if told < rate * (1 - TOLERANCE) else int(told > rate * (1 + TOLERANCE))


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
