"""Ragged decode attention and causal prefill attention against float64, over every way a plan can group rows."""

from __future__ import annotations

import math

import pytest
import torch
from attention_reference import reference, reference_causal
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.attention.prefill import attend_causal
from sglang_adrenaline.attention.ragged import (
    MAX_PAD_TOKENS,
    SHARED_MIN_TOKENS,
    VIEW_MIN_TOKENS,
    RaggedPlan,
    Scratch,
    attend,
)

# Relative and absolute: the rounding of the output, and of the softmax weights before they meet v, to q's dtype.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LSE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
POOL = 3000
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
SCALE = HEAD_DIM**-0.5


def pool(dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(POOL, KV_HEADS, HEAD_DIM, generator=generator).to(dtype) for _ in "kv"]


def queries(rows: int, dtype: torch.dtype, seed: int = 1):
    return torch.randn(rows, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slots_of(length: int, shape: str, seed: int) -> torch.Tensor:
    """Distinct slots: one `run`, `scattered`, a `mixed` row as a prompt and its decoded tokens leave it, or `pieces` of
    a prompt that was written in two parts into a pool in use."""
    generator = torch.Generator().manual_seed(seed)
    if shape == "mixed":
        run = 2 * length // 3
        rest = POOL - 1 - torch.randperm(POOL // 3, generator=generator)[: length - run]
        cut = int(torch.randint(0, length - run + 1, (1,), generator=generator))
        return torch.cat([rest[:cut], torch.arange(7, 7 + run), rest[cut:]])
    if shape == "pieces":
        first = 2 * length // 5
        tail = POOL - 1 - torch.randperm(POOL // 3, generator=generator)[: length // 5]
        return torch.cat([torch.arange(900, 900 + first), torch.arange(7, 7 + length - first - len(tail)), tail])
    if shape == "run":
        start = int(torch.randint(0, POOL - length + 1, (1,), generator=generator))
        return torch.arange(start, start + length)
    return torch.randperm(POOL, generator=generator)[:length]


def views_of(plan: RaggedPlan) -> list[tuple[tuple[int, ...], int, int]]:
    views = [*plan.views, *(view for merge in plan.merges for view in merge.views)]
    return sorted((view.rows, view.start, view.stop) for view in views)


def check(q, k, v, slots, o, lse, *, logit_cap=0.0):
    for row, row_slots in enumerate(slots):
        o_ref, lse_ref = reference(q[row], k[row_slots], v[row_slots], sm_scale=SCALE, logit_cap=logit_cap)
        torch.testing.assert_close(o[row].double(), o_ref, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])
        torch.testing.assert_close(lse[row].double(), lse_ref, atol=LSE_TOLERANCE[q.dtype], rtol=0)


lengths = st.one_of(
    st.sampled_from([0, 1, 2, MAX_PAD_TOKENS, MAX_PAD_TOKENS + 1, VIEW_MIN_TOKENS - 1, VIEW_MIN_TOKENS]),
    st.integers(0, 700),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(lengths, st.sampled_from(["run", "scattered", "mixed", "pieces"])), min_size=1, max_size=9),
    dtype=st.sampled_from(list(TOLERANCE)),
    logit_cap=st.sampled_from([0.0, 0.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_attend_over_any_rows_equals_the_reference(rows, dtype, logit_cap, seed):
    k, v = pool(dtype)
    slots = [slots_of(n, shape, seed + i) for i, (n, shape) in enumerate(rows)]
    q = queries(len(rows), dtype, seed)
    o, lse = attend(q, k, v, RaggedPlan.from_slots(slots), sm_scale=SCALE, logit_cap=logit_cap)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    check(q, k, v, slots, o, lse, logit_cap=logit_cap)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 400), st.floats(0, 1)), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_attend_to_prefix_and_suffix_merged_equals_the_whole(rows, dtype, seed):
    k, v = pool(dtype)
    lens = torch.tensor([n for n, _ in rows])
    splits = torch.tensor([round(n * share) for n, share in rows])
    table = torch.stack(
        [slots_of(500, ("run", "scattered", "mixed", "pieces")[(seed + i) % 4], seed + i) for i in range(len(rows))]
    ).to(torch.int32)
    index, zeros = torch.arange(len(rows)), torch.zeros_like(lens)
    q = queries(len(rows), dtype, seed)
    prefix, suffix, whole = (
        attend(q, k, v, RaggedPlan.from_rows(table, index, first, last), sm_scale=SCALE)
        for first, last in ((zeros, splits), (splits, lens), (zeros, lens))
    )
    o, lse = suffix
    merge_rows_(o, lse, *prefix, index)
    check(q, k, v, [table[i, : lens[i]].long() for i in index], o, lse)
    torch.testing.assert_close(o, whole[0], atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])
    torch.testing.assert_close(lse, whole[1], atol=LSE_TOLERANCE[dtype], rtol=0)


def test_from_rows_and_from_slots_make_the_same_plan():
    table = torch.randperm(POOL)[:600].view(2, 300).to(torch.int32)
    starts, ends = torch.tensor([10, 0, 250]), torch.tensor([200, 0, 251])
    by_rows = RaggedPlan.from_rows(table, torch.tensor([1, 0, 0], dtype=torch.int32), starts, ends)
    by_slots = RaggedPlan.from_slots([table[1, 10:200].long(), torch.empty(0).long(), table[0, 250:251].long()])
    assert by_rows.has_empty
    assert by_slots.has_empty
    assert [g.slots.tolist() for g in by_rows.groups] == [g.slots.tolist() for g in by_slots.groups]


def test_row_that_ends_before_it_starts_is_empty():
    plan = RaggedPlan.from_rows(
        torch.zeros(1, 8, dtype=torch.int32), torch.tensor([0]), torch.tensor([5]), torch.tensor([3])
    )
    o, lse = attend(queries(1, torch.float32), *pool(torch.float32), plan, sm_scale=SCALE)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


def test_plan_of_no_rows_gives_no_rows():
    o, lse = attend(queries(0, torch.float32), *pool(torch.float32), RaggedPlan.from_slots([]), sm_scale=SCALE)
    assert o.shape == (0, HEADS, HEAD_DIM)
    assert lse.shape == (0, HEADS)


def test_long_ascending_run_is_read_in_place_and_a_shuffled_one_is_not():
    run = torch.arange(100, 100 + VIEW_MIN_TOKENS)
    assert len(RaggedPlan.from_slots([run]).views) == 1
    swapped = run.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert len(RaggedPlan.from_slots([swapped]).views) == 0
    plan = RaggedPlan.from_slots([torch.tensor([9, 4]), torch.cat([run, torch.tensor([7, 5])])])
    assert views_of(plan) == [((1,), 100, 100 + VIEW_MIN_TOKENS)]
    assert [group.slots.tolist() for group in plan.groups] == [[9, 4, 7, 5]]
    assert len(RaggedPlan.from_slots([torch.arange(10), torch.arange(20, 20 + VIEW_MIN_TOKENS)]).views) == 1


def test_padding_of_a_group_is_bounded():
    plan = RaggedPlan.from_slots([slots_of(n, "scattered", n) for n in (10, 2000, 60, 70, 1990, 900)])
    for group in plan.groups:
        padding = 0 if group.mask is None else int((group.mask == -math.inf).sum(-1).max())
        assert padding <= MAX_PAD_TOKENS
    assert sorted((group.count, group.width) for group in plan.groups) == [(1, 900), (2, 2000), (3, 70)]


def test_scratch_is_reused_across_plans_without_mixing_results():
    scratch, (k, v), q = Scratch(), pool(torch.float32), queries(2, torch.float32)
    for seed, length in enumerate((300, 20, 450)):
        slots = [slots_of(length, "scattered", seed), slots_of(length // 2, "scattered", seed + 50)]
        o, lse = attend(q, k, v, RaggedPlan.from_slots(slots, scratch=scratch), sm_scale=SCALE)
        check(q, k, v, slots, o, lse)


def test_attend_with_wrong_number_of_rows_raises():
    with pytest.raises(ValueError, match="2 rows, its plan 1"):
        plan = RaggedPlan.from_slots([torch.arange(3)])
        attend(queries(2, torch.float32), *pool(torch.float32), plan, sm_scale=SCALE)


def test_attend_with_values_narrower_than_keys_equals_the_reference():
    k, v = pool(torch.float32)
    v = v[..., :8].contiguous()
    slots = [slots_of(30, "scattered", 1), slots_of(0, "scattered", 2), slots_of(250, "run", 3)]
    q = queries(3, torch.float32)
    o, lse = attend(q, k, v, RaggedPlan.from_slots(slots), sm_scale=SCALE)
    check(q, k, v, slots, o, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("prefix_len", "new"), [(0, 1), (0, 37), (1, 1), (300, 1), (299, 33), (5, 130)])
def test_attend_causal_equals_the_reference(prefix_len, new, contiguous, dtype):
    k_pool, v_pool = pool(dtype)
    slots = slots_of(prefix_len, "run" if contiguous else "scattered", 5)
    q = queries(new, dtype)
    k, v = (torch.randn(new, KV_HEADS, HEAD_DIM).to(dtype) for _ in "kv")
    o = attend_causal(q, k, v, k_pool, v_pool, slots, sm_scale=SCALE)
    expected = reference_causal(
        q, torch.cat([k_pool[slots], k]), torch.cat([v_pool[slots], v]), prefix_len, sm_scale=SCALE
    )
    torch.testing.assert_close(o.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_run_that_rows_share_is_read_once():
    prefix = torch.arange(100, 600)
    rows = [
        torch.cat([prefix, torch.arange(600, 640)]),  # whose own part lies behind the prefix
        torch.cat([prefix, torch.tensor([9, 4, 7])]),
        torch.arange(1000, 1400),
        prefix,
        prefix[:VIEW_MIN_TOKENS],  # sharing no more than this would have the others read again
    ]
    plan = RaggedPlan.from_slots(rows)
    assert views_of(plan) == [
        ((0, 1), 100, 600), ((2,), 1000, 1400), ((3,), 100, 600), ((4,), 100, 100 + VIEW_MIN_TOKENS)
    ]  # fmt: skip
    q, (k, v) = queries(len(rows), torch.float32), pool(torch.float32)
    check(q, k, v, rows, *attend(q, k, v, plan, sm_scale=SCALE))


def test_every_long_run_of_a_shared_prefix_is_read_once():
    """A prefix in three parts, as a pool in use leaves it: the short part is gathered with what follows it."""
    parts = [torch.arange(500, 800), torch.arange(40, 60), torch.arange(1000, 1000 + VIEW_MIN_TOKENS)]
    rows = [torch.cat([*parts, torch.tensor([2000 + 3 * row, 9])]) for row in range(4)]
    plan = RaggedPlan.from_slots([*rows, torch.cat([parts[0], parts[2]])])
    assert [view.rows for view in plan.views] == [(4,)], "nothing of it is gathered"
    second = ((0, 1, 2, 3, 4), 1000, 1000 + VIEW_MIN_TOKENS)
    assert views_of(plan) == [((0, 1, 2, 3), 500, 800), second, ((4,), 500, 800)]
    assert [group.width for group in plan.groups] == [22]
    q, (k, v) = queries(5, torch.float32), pool(torch.float32)
    check(q, k, v, [*rows, torch.cat([parts[0], parts[2]])], *attend(q, k, v, plan, sm_scale=SCALE))


def test_a_short_run_is_read_in_place_for_enough_rows():
    enough = 2 * VIEW_MIN_TOKENS // SHARED_MIN_TOKENS
    rows = [
        torch.cat([torch.arange(300, 300 + SHARED_MIN_TOKENS), torch.tensor([9 + 2 * row])]) for row in range(enough)
    ]
    assert views_of(RaggedPlan.from_slots(rows[1:])) == []
    plan = RaggedPlan.from_slots(rows)
    assert views_of(plan) == [(tuple(range(enough)), 300, 300 + SHARED_MIN_TOKENS)]
    q, (k, v) = queries(enough, torch.float32), pool(torch.float32)
    check(q, k, v, rows, *attend(q, k, v, plan, sm_scale=SCALE))
