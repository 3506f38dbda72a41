"""Merging partial attention: exact against float64, defined on empty parts, strict about shapes."""

from __future__ import annotations

import math

import pytest
import torch
from attention_reference import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_adrenaline.attention.merge import combine, merge_rows_

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def parts(split: int, total: int, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(4, 16, generator=generator)
    k, v = (torch.randn(total, 2, 16, generator=generator) for _ in "kv")
    whole = reference(q, k, v, sm_scale=0.25)
    a, b = (reference(q, k[s], v[s], sm_scale=0.25) for s in (slice(0, split), slice(split, None)))
    return whole, (a[0].to(dtype), a[1].float()), (b[0].to(dtype), b[1].float())


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(0, 40),
    share=st.floats(0, 1),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_merge_of_any_split_equals_the_whole(total, share, dtype, seed):
    (o_ref, lse_ref), (o_a, lse_a), (o_b, lse_b) = parts(round(total * share), total, dtype, seed)
    o, lse = o_a[None].clone(), lse_a[None].clone()
    merge_rows_(o, lse, o_b[None], lse_b[None], torch.tensor([0]))
    torch.testing.assert_close(o[0].double(), o_ref, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse[0].double(), lse_ref, atol=1e-5, rtol=0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_merge_touches_only_its_rows_in_their_order(index_dtype):
    o, lse = torch.zeros(4, 1, 2), torch.zeros(4, 1)
    o_remote = torch.tensor([[[2.0, 2.0]], [[8.0, 8.0]]])
    merge_rows_(o, lse, o_remote, torch.zeros(2, 1), torch.tensor([3, 1], dtype=index_dtype))
    assert o[:, 0, 0].tolist() == [0.0, 4.0, 0.0, 1.0]
    assert lse[:, 0].tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_merge_of_two_empty_parts_is_zero_not_nan(dtype):
    o, lse = torch.full((1, 2, 4), 7.0, dtype=dtype), torch.full((1, 2), -math.inf)
    merge_rows_(o, lse, torch.full((1, 2, 4), 9.0, dtype=dtype), lse.clone(), torch.tensor([0]))
    assert (o == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("empty_is_local", [True, False])
def test_merge_with_one_empty_part_returns_the_other_bit_for_bit(empty_is_local):
    full, empty = (torch.randn(1, 2, 4), torch.randn(1, 2)), (torch.full((1, 2, 4), 5.0), torch.full((1, 2), -math.inf))
    local, remote = (empty, full) if empty_is_local else (full, empty)
    o, lse = local[0].clone(), local[1].clone()
    merge_rows_(o, lse, *remote, torch.tensor([0]))
    assert torch.equal(o, full[0])
    assert torch.equal(lse, full[1])


def test_merge_of_far_apart_lse_stays_finite():
    o, lse = torch.ones(1, 1, 2), torch.tensor([[3000.0]])
    merge_rows_(o, lse, torch.full((1, 1, 2), 5.0), torch.tensor([[-3000.0]]), torch.tensor([0]))
    assert o.flatten().tolist() == [1.0, 1.0]
    assert lse.item() == 3000.0


def test_merge_of_no_rows_changes_nothing():
    o, lse = torch.randn(2, 1, 4), torch.randn(2, 1)
    before = o.clone(), lse.clone()
    merge_rows_(o, lse, torch.empty(0, 1, 4), torch.empty(0, 1), torch.empty(0, dtype=torch.int64))
    assert torch.equal(o, before[0])
    assert torch.equal(lse, before[1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lse", {"lse": torch.zeros(2, 3)}),
        ("lse", {"lse": torch.zeros(2, 1, dtype=torch.float64)}),
        ("o_remote", {"o_remote": torch.zeros(1, 1, 8)}),
        ("lse_remote", {"lse_remote": torch.zeros(2, 1)}),
        ("lse_remote", {"lse_remote": torch.zeros(1, 1, dtype=torch.bfloat16)}),
    ],
)
def test_merge_of_wrong_shapes_or_dtypes_names_the_argument(name, change):
    arguments = {
        "o": torch.zeros(2, 1, 4),
        "lse": torch.zeros(2, 1),
        "o_remote": torch.zeros(1, 1, 4),
        "lse_remote": torch.zeros(1, 1),
        "rows": torch.tensor([0]),
    }
    with pytest.raises(ValueError, match=f"^{name}:"):
        merge_rows_(**(arguments | change))


def test_combine_leaves_its_arguments_alone():
    arguments = [torch.randn(3, 2, 4), torch.randn(3, 2), torch.randn(3, 2, 4), torch.randn(3, 2)]
    copies = [x.clone() for x in arguments]
    combine(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))
