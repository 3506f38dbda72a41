"""The executor's share of the SMs follows prefill's load, without flapping."""

import itertools

import pytest
from figures_of_models import LLAMA2_7B
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.cost_model import WHOLE_DEVICE, CostModel
from sglang_adrenaline.policy import PrefillLoad, SharePoint
from sglang_adrenaline.policy.prefill_load import LASTING_S, ArrivedWork
from sglang_adrenaline.policy.sm_share import MARGIN, predicted_ttft_s
from sglang_adrenaline.prefill.share_control import DWELL_S, ShareControl, points_at
from sglang_adrenaline.profile_data import datasheet_profile

POINTS = [
    SharePoint(executor_share=share, attention_rate=rate, prefill_factor=prefill)
    for share, rate, prefill in ((0.1, 2e6, 0.75), (0.25, 4e6, 0.625), (0.5, 5.5e6, 0.425))
]
SLO_S = 0.2
ALONE_RATE = 40e3
"""Tokens per second of prefill alone."""


def run(control, begin, seconds, prompts_s, tokens=1024):
    """The shares of that time, one for each prompt."""
    times = [begin + number / prompts_s for number in range(int(seconds * prompts_s))]
    shares, arrived = [], ArrivedWork(LASTING_S)
    for now in times:
        arrived.add(now, tokens / ALONE_RATE)
        control.computed(tokens / ALONE_RATE)
        shares.append(control.share(now, arrived.load(now, 0.0)))
    return shares


def test_share_load_that_rises_and_falls_takes_the_share_away_and_gives_it_back():
    control = ShareControl(POINTS, SLO_S)
    assert control.share(1.0, 0.0) == 0.5
    assert run(control, 1.0, 60, prompts_s=5)[-1] == 0.5
    assert run(control, 61.0, 60, prompts_s=22)[-1] == 0.1
    assert control.share(300.0, 0.0) == 0.5


def test_share_steady_load_settles():
    for prompts_s in (3, 8, 11, 12, 13, 14, 16, 20, 25):
        shares = run(ShareControl(POINTS, SLO_S), 1.0, 300, prompts_s)
        assert len(set(shares[len(shares) // 2 :])) == 1, prompts_s


@given(st.lists(st.tuples(st.floats(1e-3, 2.0), st.floats(1e-4, 1.0), st.floats(0.0, 3.0)), min_size=1, max_size=200))
def test_share_changes_no_faster_than_it_may_and_only_between_measured_points(prompts):
    control, now, changes, before = ShareControl(POINTS, SLO_S), 1.0, [], None
    for gap, alone_s, load in prompts:
        now += gap
        control.computed(alone_s)
        share = control.share(now, load)
        assert share in {WHOLE_DEVICE, *(point.executor_share for point in POINTS)}
        if before is not None and share != before:
            changes.append(now)
        before = share
    assert all(later - sooner >= DWELL_S for sooner, later in itertools.pairwise(changes))


def test_share_settled_keeps_the_objective():
    for prompts_s in (4, 9, 12, 18):
        share = run(ShareControl(POINTS, SLO_S), 1.0, 120, prompts_s)[-1]
        (point,) = (point for point in POINTS if point.executor_share == share)
        load = PrefillLoad(requests_s=prompts_s, prompt_s=1024 / ALONE_RATE)
        assert predicted_ttft_s(load, point.prefill_factor) <= 1.3 * MARGIN * SLO_S


def test_share_without_an_objective_is_the_fastest_under_which_prefill_keeps_up():
    control = ShareControl(POINTS, None)
    assert run(control, 1.0, 60, prompts_s=14)[-1] == 0.5  # 0.84 of what prefill computes beside it
    assert run(control, 61.0, 60, prompts_s=18)[-1] == 0.25
    assert control.share(300.0, 0.0) == 0.5


@pytest.mark.parametrize("slo_s", [None, SLO_S])
def test_share_prefill_that_cannot_keep_up_gets_everything_and_gives_it_back(slo_s):
    control = ShareControl(POINTS, slo_s)
    assert run(control, 1.0, 60, prompts_s=28)[-1] == WHOLE_DEVICE
    assert run(control, 61.0, 60, prompts_s=5)[-1] == 0.5


def test_points_at_takes_the_nearest_point_of_the_profile():
    cost = CostModel(datasheet_profile("H100", LLAMA2_7B))
    points = points_at(cost, (0.17, 0.36))
    assert [point.executor_share for point in points] == [0.17, 0.36]
    known = {point.executor_share: point for point in cost.share_points()}
    assert [point.attention_rate for point in points] == [known[0.18].attention_rate, known[0.36].attention_rate]


def test_share_no_points_are_refused():
    with pytest.raises(ValueError, match="no SM shares"):
        ShareControl([], SLO_S)
