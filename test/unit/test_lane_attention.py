"""Buckets of lanes, and pools that the GPU executor refuses; the attention itself is tested in test/kernel."""

import pytest
import torch

from sglang_adrenaline.errors import ChannelError
from sglang_adrenaline.prefill.executor import LayerKV
from sglang_adrenaline.prefill.gpu_executor import bucket_of, lane_buckets
from sglang_adrenaline.prefill.lane_attention import check_pool


@pytest.mark.parametrize(
    ("lanes", "buckets"),
    [
        (1, (1,)),
        (8, (8,)),
        (40, (8, 16, 32, 40)),
        (64, (8, 16, 32, 64)),
        (256, (8, 16, 32, 64, 128, 192, 256)),
        (300, (8, 16, 32, 64, 128, 192, 256, 300)),
    ],
)
def test_buckets_rise_to_the_number_of_lanes(lanes, buckets):
    assert lane_buckets(lanes) == buckets


def test_bucket_is_the_smallest_with_the_highest_lane():
    buckets = lane_buckets(40)
    assert [bucket_of(buckets, lane) for lane in (-1, 0, 7, 8, 31, 32, 39)] == [8, 8, 8, 16, 32, 40, 40]


def layer(kv_heads=2, dtype=torch.bfloat16, head_dim=64, v_dim=None, cap=0.0) -> LayerKV:
    k, v = (torch.zeros(5, kv_heads, size, dtype=dtype) for size in (head_dim, v_dim or head_dim))
    return LayerKV(k, v, 0.125, cap)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (layer(cap=30.0), "soft cap"),
        (layer(dtype=torch.float8_e5m2), "dtype"),
        (layer(v_dim=32), "one shape"),
        (layer(kv_heads=3), "4 to 3"),
        (layer(head_dim=80), "heads of"),
    ],
)
def test_pool_the_kernels_cannot_read_is_refused(bad, match):
    check_pool([layer()], 4, torch.bfloat16)
    with pytest.raises(ChannelError, match=match):
        check_pool([bad], 4, torch.bfloat16)


def test_pool_with_too_many_query_heads_to_a_kv_head_is_refused():
    check_pool([layer(kv_heads=1)], 16, torch.bfloat16)
    with pytest.raises(ChannelError, match="16 query heads"):
        check_pool([layer(kv_heads=1)], 17, torch.bfloat16)
