"""Steps in two halves, as far as no GPU is needed: passes that take turns, numbers of calls, rows of a batch."""

import threading
from dataclasses import dataclass

import pytest
import torch
from figures_of_models import LLAMA2_7B
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline import compat
from sglang_adrenaline.attention.turns import take_turns
from sglang_adrenaline.channel.calls import StepCalls, calls_of
from sglang_adrenaline.cost_model import HALVES_LAYER_S, CostModel
from sglang_adrenaline.errors import ChannelError
from sglang_adrenaline.profile_data import datasheet_profile


def passes(log, first_turns, second_turns):
    def one(name, turns):
        def go(hand_over):
            for turn in range(turns):
                log.append((name, turn))
                hand_over()
            return name

        return go

    return one("a", first_turns), one("b", second_turns)


@given(st.integers(0, 5), st.integers(0, 5))
def test_passes_alternate_until_one_is_over(first, second):
    log = []
    assert take_turns(*passes(log, first, second)) == ("a", "b")
    both = min(first, second)
    alternating = [(name, turn) for turn in range(both) for name in "ab"]
    rest = [("a", turn) for turn in range(both, first)] + [("b", turn) for turn in range(both, second)]
    assert log == alternating + rest


def test_only_one_pass_runs_at_a_time_and_no_thread_is_left():
    running, before = [], threading.active_count()

    def go(hand_over):
        for _ in range(50):
            running.append(1)
            assert len(running) == 1
            running.pop()
            hand_over()

    take_turns(go, go)
    assert threading.active_count() == before


@pytest.mark.parametrize("failing", [0, 1])
def test_error_of_either_pass_ends_both_and_is_raised(failing):
    ended = []

    def go(index):
        def run(hand_over):
            try:
                for turn in range(10):
                    if index == failing and turn == 3:
                        raise ValueError("broken")
                    hand_over()
            finally:
                ended.append(index)

        return run

    with pytest.raises(ValueError, match="broken"):
        take_turns(go(0), go(1))
    assert sorted(ended) == [0, 1]


@given(st.integers(2, 200))
def test_calls_of_whole_steps_and_halves_rise_and_share_first_and_last(layers):
    calls = StepCalls(layers, calls_of(layers, "cuda"))
    whole = [calls.whole(layer) for layer in range(layers)]
    halves = [calls.half(layer, half) for layer in range(layers) for half in (0, 1)]
    assert calls.halves
    assert halves == list(range(calls.calls))
    assert whole == sorted(set(whole)) and (whole[0], whole[-1]) == (0, calls.calls - 1)


def test_calls_one_a_layer_know_no_halves():
    calls = StepCalls(4, calls_of(4, "cpu"))
    assert not calls.halves and [calls.whole(layer) for layer in range(4)] == [0, 1, 2, 3]
    one = StepCalls(1, 2)
    assert not one.halves and one.whole(0) == 1
    with pytest.raises(ChannelError):
        StepCalls(4, 6)


@dataclass
class Batch:
    """As much of SGLang's ForwardBatch as `batch_rows` looks at."""

    batch_size: int
    input_ids: torch.Tensor
    mrope_positions: torch.Tensor
    num_token_non_padded: torch.Tensor
    rids: list[str]
    mode: str = "decode"


def test_batch_rows_are_views_of_what_has_one_entry_a_row():
    batch = Batch(5, torch.arange(5), torch.zeros(3, 5), torch.tensor(5), list("abcde"))
    part = compat.batch_rows(batch, slice(2, 5))
    assert part.batch_size == 3 and part.rids == list("cde") and part.mode == "decode"
    assert part.mrope_positions.shape == (3, 3) and part.num_token_non_padded is batch.num_token_non_padded
    batch.input_ids[2] = 70
    assert part.input_ids.tolist() == [70, 3, 4]
    assert batch.batch_size == 5 and len(batch.rids) == 5


COST = CostModel(datasheet_profile("H200", LLAMA2_7B))


def test_remote_attention_hides_under_all_work_of_a_step_in_halves():
    local, trip_s = 100_000, 0.001
    hidden = COST.step_s(400, local)
    remote = [(0.9 * hidden * COST.attention_rate, COST.attention_rate, trip_s)]
    whole, halves = COST.step_s(400, local, remote), COST.step_s(400, local, remote, halves=True)
    assert halves < whole
    assert halves == pytest.approx(COST.halves_linear_s(400) + local / COST.attention_rate + COST.overhead_s)
    assert COST.step_s(400, local, halves=True) == COST.step_s(400, local), "no channel takes part"


def test_small_batches_lose_by_reading_the_weights_twice():
    assert COST.halves_linear_s(64) > 2 * COST.linear_s(64)
    more = COST.halves_linear_s(512) - COST.linear_s(512)
    assert more == pytest.approx(COST.layers * HALVES_LAYER_S, rel=0.01), "both are bound by operations"
