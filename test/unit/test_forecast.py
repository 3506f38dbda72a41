"""Forecast of the memory that answers will take: against stepping through them, and what is learned of lengths."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

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
