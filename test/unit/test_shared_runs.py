"""Runs of slots that lanes share: each slot of each lane in one run, and shared ones found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_adrenaline.attention.shared_runs import Run, SharedRuns


def tree_slots(path: list[tuple[int, int]]) -> np.ndarray:
    """A prompt as the radix tree would hold it: equal (choice, length) steps from the root have equal slots."""
    slots: list[int] = []
    seed = 0
    for choice, length in path:
        seed = (seed * 7 + choice + 1) % 100_003
        slots += [(seed * 1000 + i) % 2**31 for i in range(length)]
    return np.array(slots, dtype=np.int64)


PATHS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 3, 8, 20])), min_size=1, max_size=4)
OPERATIONS = st.lists(st.tuples(st.integers(0, 7), st.one_of(st.none(), PATHS)), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(OPERATIONS, st.sets(st.integers(0, 7)), st.sampled_from([1, 4, 10]))
def test_runs_cover_each_slot_of_each_lane_once_and_share_what_is_equal(operations, lanes, min_shared):
    shared = SharedRuns(min_shared)
    have: dict[int, np.ndarray] = {}
    for lane, path in operations:
        if path is None:
            shared.discard(lane)
            have.pop(lane, None)
        else:
            have[lane] = tree_slots(path)
            shared.add(lane, have[lane])
    runs = shared.runs(lanes)
    wanted = lanes & have.keys()
    for lane in wanted:
        spans = sorted((run.begin, run.end) for run in runs if lane in run.lanes)
        assert spans[0][0] == 0 and spans[-1][1] == len(have[lane])
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    for run in runs:
        assert run.begin < run.end and set(run.lanes) <= wanted and len(set(run.lanes)) == len(run.lanes)
        parts = [have[lane][run.begin : run.end] for lane in run.lanes]
        assert all((part == parts[0]).all() for part in parts)
        assert len(run.lanes) == 1 or run.end - run.begin >= min_shared
    beginnings = {tuple(have[lane][: end + 1]) for lane in wanted for end in range(len(have[lane]))}
    assert shared.distinct_tokens(lanes) == len(beginnings)
    # No two lanes read a long run apart that they could read together.
    for a in wanted:
        for b in wanted - {a}:
            common = np.argmin(np.append(have[a][: len(have[b])] == have[b][: len(have[a])], False))
            own = [run for run in runs if a in run.lanes and b not in run.lanes]
            apart = sum(run.end - run.begin for run in own if run.end <= common)
            assert apart < min_shared * 5  # what is left at each of the tree's levels


def test_agents_with_a_system_prompt_and_a_branch():
    shared = SharedRuns()
    system, branch = tree_slots([(0, 300)]), tree_slots([(0, 300), (1, 100)])
    shared.add(3, np.append(system, [7, 8]))
    shared.add(0, np.append(branch, [9]))
    shared.add(9, branch)
    shared.add(5, tree_slots([(2, 40)]))
    runs = shared.runs([0, 3, 5, 9, 11])
    three = next(run for run in runs if len(run.lanes) == 3)
    assert set(three.lanes) == {0, 3, 9} and (three.begin, three.end) == (0, 300)
    two = next(run for run in runs if len(run.lanes) == 2)
    assert set(two.lanes) == {0, 9} and (two.begin, two.end) == (300, 400)
    assert {run.lanes[0]: (run.begin, run.end) for run in runs if len(run.lanes) == 1} == {
        0: (400, 401), 3: (300, 302), 5: (0, 40)
    }  # fmt: skip
    # Without the third, the two have one run.
    assert Run(two.lanes, 0, 400) in shared.runs([0, 9])


def test_short_beginnings_are_not_told():
    shared = SharedRuns()
    for lane in range(4):
        shared.add(lane, np.append(tree_slots([(0, 63)]), [1000 + lane]))
    assert sorted(shared.runs(range(4))) == [Run((lane,), 0, 64) for lane in range(4)]


@pytest.mark.parametrize("lanes", [[], [4]])
def test_nothing_to_attend_to(lanes):
    assert SharedRuns().runs(lanes) == [] and SharedRuns().distinct_tokens(lanes) == 0
