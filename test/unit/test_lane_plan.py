"""Plans of the attention kernel, carried out with NumPy in float64 as the kernel does it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_adrenaline.attention.lane_plan import WHOLE, KernelShape, make_plan, max_words, within_rows
from sglang_adrenaline.attention.shared_runs import Run


@st.composite
def some_runs(draw):
    """Runs of up to 12 lanes: shared ones over disjoint sets of them, then one of each lane's own."""
    lanes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True))
    runs = []
    at = 0
    while at < len(lanes):
        some = lanes[at : at + draw(st.integers(1, 12))]
        at += len(some)
        if len(some) > 1:
            runs.append(Run(tuple(some), 0, draw(st.integers(64, 3000))))
        for lane in some:
            if len(some) == 1 or draw(st.booleans()):
                begin = 0 if len(some) == 1 else runs[-1].end
                runs.append(Run((lane,), begin, begin + draw(st.integers(1, 5000))))
    return runs


@settings(max_examples=200, deadline=None)
@given(some_runs(), st.sampled_from([(1, 32), (4, 8), (3, 3), (16, 1), (5, 2)]), st.sampled_from([8, 384, 1056]))
def test_every_lane_attends_to_all_its_slots_once(runs, heads, warps):
    group, kv_heads = heads
    shape = KernelShape(group, kv_heads, columns=16, warps=warps)
    lanes = {lane for run in runs for lane in run.lanes}
    max_rows = 4 * 41 + 1024
    words = make_plan(runs, shape, max_rows)
    assert words.dtype == np.int32 and len(words) <= max_words(41, max_rows)
    num_pieces, pieces_at, members_at, num_merges, merges_at = words[:5]
    assert pieces_at % 4 == 0 and members_at % 2 == 0 and merges_at % 4 == 0  # the kernel's loads are that wide
    pieces = words[pieces_at : pieces_at + 4 * num_pieces].reshape(-1, 4)
    members = words[members_at : merges_at - merges_at % 2].reshape(-1, 2)
    merges = {lane: (row, rows) for lane, row, rows, _ in words[merges_at:].reshape(-1, 4).tolist()}
    assert len(merges) == num_merges

    starts = np.cumsum([0] + [run.end - run.begin for run in runs])
    read: dict[int, list[int]] = {lane: [] for lane in lanes}
    rows_of: dict[int, list[int]] = {lane: [] for lane in lanes}
    for slots, tokens, first, count in pieces.tolist():
        assert tokens > 0 and 0 < count * group <= 16
        index = int(np.searchsorted(starts, slots, side="right")) - 1
        assert slots + tokens <= starts[index + 1]
        for lane, row in members[first : first + count].tolist():
            assert lane in runs[index].lanes
            read[lane] += range(slots, slots + tokens)
            rows_of[lane].append(row)
    for lane in lanes:
        expected = [slot for i, run in enumerate(runs) if lane in run.lanes for slot in range(starts[i], starts[i + 1])]
        assert sorted(read[lane]) == expected
        if len(rows_of[lane]) == 1:
            assert rows_of[lane] == [WHOLE] and lane not in merges
        else:
            begin, count = merges[lane]
            assert sorted(rows_of[lane]) == list(range(begin, begin + count))
    used = sorted(row for rows in rows_of.values() for row in rows if row != WHOLE)
    assert used == sorted(set(used)) and (not used or used[-1] < max_rows)


def test_no_runs_are_no_work():
    assert make_plan([], KernelShape(1, 8, 16, 1056), 10)[:5].tolist() == [0, 8, 8, 0, 8]


def test_pieces_are_of_a_size_that_fills_the_warps():
    many = make_plan([Run((lane,), 0, 512) for lane in range(128)], KernelShape(1, 32, 16, 1056), 2048)
    assert many[0] == 128  # whole prompts: four tickets a warp, no partial results
    alone = make_plan([Run((0,), 0, 8192)], KernelShape(1, 32, 16, 1056), 2048)
    assert alone[0] == 32  # one wave
    short = make_plan([Run((0,), 0, 50)], KernelShape(1, 32, 16, 1056), 2048)
    assert short[0] == 1


def test_pieces_become_larger_where_partial_results_are_scarce():
    runs = [Run((lane,), 0, 4096) for lane in range(8)]
    shape = KernelShape(4, 8, 16, 1056)
    assert make_plan(runs, shape, 1000)[0] > make_plan(runs, shape, 16)[0] >= 8


def test_a_deep_tree_is_read_lane_by_lane():
    shape = KernelShape(4, 8, columns=16, warps=1056)
    runs = [Run((0, 1), 0, 100), Run((0,), 100, 200), Run((1,), 100, 250), Run((2,), 0, 7)]
    assert within_rows(runs, 4) is runs
    with pytest.raises(ValueError, match="partial results"):
        make_plan(runs, shape, 3)
    alone = within_rows(runs, 3)
    assert sorted(alone) == [Run((0,), 0, 200), Run((1,), 0, 250), Run((2,), 0, 7)]
    make_plan(alone, shape, 3)


def test_a_long_prompt_among_short_ones_is_cut():
    runs = [Run((lane,), 0, 512) for lane in range(100)] + [Run((100,), 0, 32_000)]
    words = make_plan(runs, KernelShape(4, 8, 16, 1056), 2048)
    pieces = words[8 : 8 + 4 * words[0]].reshape(-1, 4)
    assert pieces[:, 1].max() < 2 * 512


def test_heads_that_fill_the_warps_are_not_cut():
    words = make_plan([Run((lane,), 0, 512) for lane in range(128)], KernelShape(4, 8, 16, 1056), 2048)
    assert words[0] == 128 and words[3] == 0
