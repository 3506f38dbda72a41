"""Forecast of the memory that answers will take: against stepping through them, and what is learned of lengths."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline import compat
from sglang_adrenaline.decode.forecast import MemoryForecast
from sglang_adrenaline.decode.memory import ConstantReserve, Growth, Promised
from sglang_adrenaline.policy import AnswerShares, peak_growth
from sglang_adrenaline.policy.forecast import FEW, PRIOR, RECENT

ROWS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=12)


def stepped(rows, newcomer):
    """Largest growth over all steps, one after the other; the newcomer's own tokens stay until the last one ends."""
    most = 0
    for step in range(max([left for _, left in rows] + [newcomer]) + 1):
        alive = sum(held + step for held, left in rows if step <= left)
        most = max(most, alive + min(step, newcomer) - sum(held for held, _ in rows))
    return most


def arrays(rows):
    held, left = zip(*rows, strict=True) if rows else ((), ())
    return np.array(held, dtype=np.int64), np.array(left, dtype=np.int64)


@given(ROWS, st.integers(0, 60))
def test_peak_growth_is_what_stepping_finds(rows, newcomer):
    assert peak_growth(*arrays(rows), newcomer) == stepped(rows, newcomer)


@given(ROWS, st.integers(0, 60), st.integers(0, 40))
def test_peak_growth_never_falls_with_a_longer_answer(rows, newcomer, more):
    assert peak_growth(*arrays(rows), newcomer + more) >= peak_growth(*arrays(rows), newcomer)


def test_peak_growth_of_ends_that_come_evenly_is_far_below_a_reserve_for_each():
    """100 answers of 100, one ending each step: every end frees what the others grow by."""
    left = np.arange(100, dtype=np.int64)
    assert peak_growth(100 - left, left, 100) < 200
    together = np.full(100, 100, dtype=np.int64)
    assert peak_growth(np.zeros_like(together), together, 100) == 101 * 100


def learned(*shares, limit=1000):
    seen = AnswerShares()
    for share in shares:
        seen = seen.add(max(int(share * limit), 1), limit)
    return seen


def left_of(seen, produced, limit=1000, assumed=512):
    return int(seen.expected_left(np.array([produced]), np.array([limit]), assumed)[0])


def test_expected_left_is_assumed_until_enough_was_seen():
    few = learned(*[0.1] * (FEW - 1))
    assert left_of(few, 0) == 512
    assert left_of(few, 900) == 100


def test_expected_left_answers_that_used_their_limit_are_exact():
    assert left_of(learned(*[1.0] * FEW), 300) == 700


def test_expected_left_is_the_mean_of_the_longer_ones():
    half = learned(*[0.1] * FEW, *[0.5] * FEW)
    assert abs(left_of(half, 200) - (0.5 * FEW + PRIOR) / (FEW + PRIOR) * 1000 + 200) <= 1
    assert left_of(half, 600) == 400  # longer than all that were seen: the limit is what is known


@given(
    st.lists(st.floats(0.01, 1.0), max_size=RECENT + 20),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
)
def test_expected_left_stays_within_the_limit(shares, rows):
    produced, limit = (np.array(column) for column in zip(*rows, strict=True))
    seen = learned(*shares)
    left = seen.expected_left(produced, limit, 512)
    assert (left >= 0).all() and (left <= np.maximum(limit - produced, 0)).all()
    assert len(seen.recent) <= RECENT


def test_constant_reserve_counts_rows_promised_and_newcomer():
    kept = ConstantReserve(64, rows=lambda: 3)
    assert kept.growth(1000, [Promised(10, 1000)]) == Growth(5 * 64, 64)


class Request:
    """As much of SGLang's Req as the forecast reads."""

    def __init__(self, rid: str, limit: int, produced: int = 0) -> None:
        self.rid = rid
        self.output_ids = [0] * produced
        self.sampling_params = SimpleNamespace(max_new_tokens=limit)
        self.over = False

    def finished(self) -> bool:
        return self.over


@pytest.fixture(scope="module", autouse=True)
def sglang_is_imported():
    """Not within an example's time."""
    compat.answer_limit(Request("", 1))


ROW = st.tuples(st.integers(0, 500), st.integers(1, 200), st.integers(0, 200))


def rows_of(entries):
    """Requests whose answers are `produced` long, with their prompts' tokens here."""
    return [
        (Request(str(number), limit, min(produced, limit)), prompt)
        for number, (prompt, limit, produced) in enumerate(entries)
    ]


@given(st.lists(ROW, max_size=8), st.lists(ROW, max_size=4), st.integers(1, 300))
def test_memory_forecast_rows_that_come_within_a_loop_count_like_those_before(before, later, limit):
    at_once, one_by_one = MemoryForecast(0, 512), MemoryForecast(0, 512)
    rows = rows_of([*before, *later])
    for req, prompt in rows:
        at_once.placed(req, prompt)
    for req, prompt in rows[: len(before)]:
        one_by_one.placed(req, prompt)
    one_by_one.growth(limit)  # from here on the loop's rows are known
    for req, prompt in rows[len(before) :]:
        one_by_one.placed(req, prompt)
    assert one_by_one.growth(limit) == at_once.growth(limit)


def test_memory_forecast_follows_answers_and_their_ends():
    forecast = MemoryForecast(10_000, 512)
    (first, _), _ = rows = rows_of([(100, 200, 50), (0, 200, 0)])
    for req, prompt in rows:
        forecast.placed(req, prompt)
    # 150 steps on the first one ends; the second one and a newcomer of 10 tokens have grown by 150 and 10 then.
    headroom = 10_000 // 50
    assert forecast.growth(10) == Growth(150 + 150 + 10 + headroom, 10)
    first.output_ids += [0] * 100
    assert forecast.growth(10) == Growth(150 + 150 + 10 + headroom, 10), "as it was when the loop began"
    forecast.new_loop()
    assert forecast.growth(10) == Growth(50 + 50 + 10 + headroom, 10)
    first.over = True
    forecast.gone(first)
    assert forecast.growth(10) == Growth(200 + 10 + headroom, 10)


def test_memory_forecast_lets_the_only_request_have_all():
    """As stock SGLang does: nothing would ever make more room for it."""
    assert MemoryForecast(10_000, 512).growth(100) == Growth(100, 100)


def test_memory_forecast_counts_what_is_promised():
    forecast = MemoryForecast(0, 512)
    assert forecast.growth(10, [Promised(0, 30), Promised(0, 30)]) == Growth(30 + 30 + 10, 10)
    assert forecast.growth(10) == Growth(10, 10), "of one call only"


def test_memory_forecast_learns_how_long_answers_are():
    forecast = MemoryForecast(0, 512)
    for number in range(FEW):
        req = Request(str(number), limit=1000, produced=100)
        forecast.placed(req, 0)
        req.over = True
        forecast.gone(req)
    assert forecast.growth(1000).own < 150
    early = Request("retracted", limit=1000, produced=10)
    forecast.placed(early, 0)
    forecast.gone(early)  # its row goes, but it has not ended
    assert 100 <= forecast.growth(1000).own < 150
