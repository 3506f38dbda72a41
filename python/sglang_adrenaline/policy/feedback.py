"""What measured steps change in the decision by load: the executors' effective rates, and what a step takes besides.

How long decode waited for an instance tells its rate: its part of the step took what local attention took, and the wait
on top. Where nothing was waited for, that is only a lower bound, and the rate is tried upwards while requests stay
local for it. Rates move after several observations in a row that agree, and not at all inside a dead band, so that
noise moves nothing. The caller agrees with the other ranks on each observation first (e.g. rank 0's is taken).
"""

from __future__ import annotations

import math

import msgspec

from sglang_adrenaline.policy.auto import LoadState
from sglang_adrenaline.policy.views import LoadSettings

MORE = 1.1
"""Upwards without evidence."""
RATE_MIN, RATE_MAX = 0.25, 2.0
TOLERANCE = 0.05
EXTRA_WEIGHT = 0.2


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the recent steps in which rows of one prefill instance took part. Seconds a step."""

    peer: str
    steps: int
    step_s: float
    predicted_step_s: float
    exposed_wait_s: float
    """Decode waited so long for this instance's answers."""
    local_s: float
    """Predicted: attention here, under which the remote part was to hide."""
    remote_s: float
    """Predicted: this instance's attention at the rate that its view says."""
    round_trip_s: float = 0.0


def observe(state: LoadState, seen: Observation, settings: LoadSettings) -> LoadState:
    """The state after an observation; one without steps changes nothing."""
    if seen.steps <= 0 or seen.step_s <= 0.0:
        return state
    extra_s = state.extra_s
    if seen.predicted_step_s > 0.0:
        beyond = seen.step_s - seen.predicted_step_s
        beyond = _clip(beyond, -seen.predicted_step_s / 2, 2 * seen.predicted_step_s)
        extra_s += EXTRA_WEIGHT * (beyond - extra_s)
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
    return LoadState(state.pressed, state.reuse, state.limited, rates, {**state.votes, seen.peer: votes}, extra_s)


def _told_rate(seen: Observation) -> float:
    """The rate, as share of what the view says, by which the instance's part took as long as it did (or less)."""
    took_s = seen.local_s + seen.exposed_wait_s - seen.round_trip_s
    return seen.remote_s / took_s if took_s > 0.0 else RATE_MAX


def _vote(state: LoadState, rate: float, told: float, waited: float, settings: LoadSettings) -> int:
    if waited < settings.wait_low:
        return 1 if state.limited or told > rate * (1 + TOLERANCE) else 0
    if waited <= settings.wait_high:
        return 0
    return -1 if told < rate * (1 - TOLERANCE) else int(told > rate * (1 + TOLERANCE))


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
