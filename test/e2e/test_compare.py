"""The equality rules themselves: a harness that cannot see a difference proves nothing. Starts no servers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import all_cases
from compare import Answer, Tie, check_equal, with_split

STOCK = Answer(
    token_ids=(5, 6, 7),
    text="abc",
    finish={"type": "length", "length": 3},
    prompt_tokens=4,
    logprobs=(-0.1, -0.2, -0.3),
    best_two=((-0.1, -3.0), (-0.70, -0.72), (-0.3, -2.0)),
)


def test_equal_answers_pass():
    assert check_equal(STOCK, STOCK) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"token_ids": (5, 6, 8)},
        {"token_ids": (5, 6)},
        {"token_ids": ()},
        {"text": "abd"},
        {"finish": {"type": "stop"}},
        {"prompt_tokens": 5},
        {"logprobs": (-0.1, -0.2, -0.3002)},
        {"logprobs": (-0.1, float("nan"), -0.3)},
        {"logprobs": (-0.1, -0.2)},
    ],
)
def test_float32_difference_fails(changed):
    with pytest.raises(AssertionError):
        check_equal(replace(STOCK, **changed), STOCK)


def test_bfloat16_tie_is_let_pass_and_reported():
    ours = replace(STOCK, token_ids=(5, 9, 7), logprobs=(-0.1, -0.71, -9.0))
    tie = check_equal(ours, STOCK, dtype="bfloat16")
    assert isinstance(tie, Tie) and tie.position == 1 and tie.gap == pytest.approx(0.02)
    with pytest.raises(AssertionError):
        check_equal(ours, STOCK)


def test_bfloat16_difference_without_a_tie_fails():
    with pytest.raises(AssertionError):
        check_equal(replace(STOCK, token_ids=(5, 6, 9)), STOCK, dtype="bfloat16")


def test_bfloat16_logprob_beyond_tolerance_fails():
    with pytest.raises(AssertionError):
        check_equal(replace(STOCK, logprobs=(-0.1, -0.2, -0.33)), STOCK, dtype="bfloat16")


def test_split_goes_into_custom_params_and_leaves_the_case_alone():
    case = all_cases()[0]
    payload = with_split(case.payload, 3)
    assert payload["sampling_params"]["custom_params"] == {"adrenaline": {"remote_prefix_len": 3}}
    assert "custom_params" not in case.payload["sampling_params"]
    assert with_split(case.payload, None) == case.payload


def test_case_names_are_unique():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
