"""The offload decision: bounds, the ratio it keeps, and what a request may ask for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline import policy

lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=200)
settings = st.builds(
    policy.Settings,
    ratio=st.floats(0, 1),
    min_tokens=st.integers(1, 64),
    page_size=st.sampled_from([1, 16, 64]),
)


def run(prompt_lens, rules):
    state, splits = policy.State(), []
    for length in prompt_lens:
        split, state = policy.decide(state, length, None, rules)
        splits.append(split)
    return splits, state


@given(lengths, settings)
def test_decide_any_requests_gives_whole_pages_within_the_prompt(prompt_lens, rules):
    splits, state = run(prompt_lens, rules)
    for length, split in zip(prompt_lens, splits, strict=True):
        assert 0 <= split <= length and split % rules.page_size == 0
        assert length >= rules.min_tokens or split == 0
    assert abs(state.owed) <= max(prompt_lens)


@given(lengths, st.floats(0, 1))
def test_decide_many_requests_keeps_the_ratio_within_one_prompt(prompt_lens, ratio):
    splits, _ = run(prompt_lens, policy.Settings(ratio=ratio, min_tokens=1, page_size=1))
    assert abs(sum(splits) - ratio * sum(prompt_lens)) <= max(prompt_lens)


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (1.0, 10)])
def test_decide_extreme_ratio_offloads_none_or_all(ratio, expected):
    splits, _ = run([100] * 10, policy.Settings(ratio=ratio, min_tokens=1, page_size=1))
    assert sum(split == 100 for split in splits) == expected


@given(lengths, settings)
def test_decide_same_requests_decides_alike_on_every_rank(prompt_lens, rules):
    assert run(prompt_lens, rules) == run(prompt_lens, rules)


@pytest.mark.parametrize(("wish", "expected"), [(0, 0), (7, 7), (99, 99), (100, 100), (-1, 100)])
def test_decide_requested_split_is_taken_and_leaves_the_accounts_alone(wish, expected):
    rules = policy.Settings(ratio=0.5, min_tokens=500, page_size=1)
    state = policy.State(owed=3.0)
    assert policy.decide(state, 100, wish, rules) == (expected, state)


def test_decide_requested_split_is_floored_to_pages():
    rules = policy.Settings(ratio=0.5, min_tokens=1, page_size=16)
    assert policy.decide(policy.State(), 100, -1, rules)[0] == 96
    assert policy.decide(policy.State(), 100, 15, rules)[0] == 0


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (None, None),
        ({}, None),
        ({"other": 1}, None),
        ({"adrenaline": None}, None),
        ({"adrenaline": {}}, None),
        ({"adrenaline": {"remote_prefix_len": None}}, None),
        ({"adrenaline": {"remote_prefix_len": 0}}, 0),
        ({"adrenaline": {"remote_prefix_len": -1}}, -1),
        ({"adrenaline": {"remote_prefix_len": 10}}, 10),
    ],
)
def test_requested_prefix_len_valid_is_read(params, expected):
    assert policy.requested_prefix_len(params, 10) == expected


@pytest.mark.parametrize(
    "options",
    [
        3,
        "all",
        [1],
        {"remote_prefix": 3},
        {"remote_prefix_len": 11},
        {"remote_prefix_len": -2},
        {"remote_prefix_len": 1.0},
        {"remote_prefix_len": "3"},
        {"remote_prefix_len": True},
        {"remote_prefix_len": 2**80},
    ],
)
def test_requested_prefix_len_invalid_is_refused_in_one_line(options):
    with pytest.raises(ValueError, match="adrenaline") as caught:
        policy.requested_prefix_len({"adrenaline": options}, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("params", ["adrenaline", [1], 3])
def test_requested_prefix_len_params_that_are_no_object_are_refused(params):
    with pytest.raises(ValueError, match="custom_params must be an object"):
        policy.requested_prefix_len(params, 10)
