"""What measured steps change in the decision by load: the executors' effective rates and the scale of step times.

Rates move by small factors, after several observations in a row that agree, and not at all inside a dead band, so that
noise moves nothing. The caller agrees with the other ranks on each observation first (e.g. rank 0's is taken).
"""

from __future__ import annotations

import msgspec

from sglang_adrenaline.policy.auto import LoadState
from sglang_adrenaline.policy.views import LoadSettings

LESS, MORE = 0.9, 1.05
RATE_MIN, RATE_MAX = 0.25, 2.0
SCALE_MIN, SCALE_MAX = 0.5, 3.0
SCALE_WEIGHT = 0.2


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the recent steps in which rows of one prefill instance took part. Seconds."""

    peer: str
    steps: int
    step_s: float
    predicted_step_s: float
    exposed_wait_s: float
    """Per step: time that decode waited for this instance's answers."""


def observe(state: LoadState, seen: Observation, settings: LoadSettings) -> LoadState:
    """The state after an observation; one without steps changes nothing."""
    if seen.steps <= 0 or seen.step_s <= 0.0:
        return state
    step_scale = state.step_scale
    if seen.predicted_step_s > 0.0:
        measured = _clip(seen.step_s / seen.predicted_step_s, SCALE_MIN, SCALE_MAX)
        step_scale += SCALE_WEIGHT * (measured - step_scale)
    vote = _vote(state, seen, settings)
    before = state.votes.get(seen.peer, 0)
    votes = before + vote if vote * before >= 0 and vote else vote
    rates = state.rates
    if abs(votes) >= settings.patience:
        rate = rates.get(seen.peer, 1.0) * (MORE if votes > 0 else LESS)
        rates = {**rates, seen.peer: _clip(rate, RATE_MIN, RATE_MAX)}
        votes = 0
    return LoadState(state.pressed, state.reuse, 0, rates, {**state.votes, seen.peer: votes}, step_scale)


def _vote(state: LoadState, seen: Observation, settings: LoadSettings) -> int:
    waited = seen.exposed_wait_s / seen.step_s
    if waited > settings.wait_high:
        return 0 if state.pressed else -1  # under memory pressure waiting is the price that was agreed to
    return 1 if waited < settings.wait_low and state.limited else 0


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
