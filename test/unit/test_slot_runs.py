"""Choice of free slots: nothing lost or handed out twice, prompts in one run where there is one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_adrenaline.slot_runs import shortest_first, take

slots = st.sets(st.integers(1, 400), min_size=1, max_size=300).flatmap(lambda held: st.permutations(sorted(held)))


def run_lens(free: np.ndarray) -> list[int]:
    """Lengths of the runs in the order in which they stand."""
    return [len(part) for part in np.split(free, np.flatnonzero(np.diff(free) != 1) + 1)]


def longest(free: list[int]) -> int:
    return max(run_lens(np.sort(np.array(free))))


@given(slots)
def test_shortest_first_keeps_all_and_joins_neighbours(free):
    ordered = shortest_first(np.array(free))
    assert sorted(ordered.tolist()) == sorted(free)
    ascending = sorted(free)
    lens = run_lens(ordered)
    # Whole runs: a slot whose successor is free is followed by it.
    assert all(b == a + 1 for a, b in itertools.pairwise(ordered.tolist()) if a + 1 in set(free))
    # Runs that touch by chance count as one here.
    assert len(lens) <= len(run_lens(np.array(ascending)))


@given(slots, st.data())
def test_take_loses_nothing_and_takes_one_run_if_there_is_one(free, data):
    count = data.draw(st.integers(1, len(free)))
    taken, rest = take(np.array(free), count)
    assert len(taken) == count
    assert sorted([*taken.tolist(), *rest.tolist()]) == sorted(free)
    assert (np.diff(taken) > 0).all()
    if longest(free) >= count:
        assert longest(taken.tolist()) == count
    else:
        assert longest(taken.tolist()) >= longest(free)  # the longest run is in it
    assert rest.tolist() == shortest_first(rest).tolist()


def test_take_prefers_the_smallest_run_that_fits():
    free = np.array([*range(10, 20), *range(30, 34), *range(50, 55)])
    taken, rest = take(free, 5)
    assert taken.tolist() == [50, 51, 52, 53, 54]
    assert rest.tolist() == [*range(30, 34), *range(10, 20)]


@pytest.mark.parametrize("count", [0, 4])
def test_take_refuses_more_than_there_is(count):
    with pytest.raises(ValueError, match="free slots"):
        take(np.array([1, 2, 3]), count)
