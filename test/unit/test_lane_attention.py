"""Buckets of lanes, and pools that the GPU executor refuses; the attention itself is tested in test/kernel."""

import pytest
import torch

from sglang_adrenaline.errors import ChannelError
from sglang_adrenaline.prefill.executor import LayerKV
from sglang_adrenaline.prefill.lane_attention import bucket_of, check_pool, lane_buckets


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


def layer(kv_heads=2, dtype=torch.bfloat16, v_dim=64, cap=0.0) -> LayerKV:
    return LayerKV(torch.zeros(5, kv_heads, 64, dtype=dtype), torch.zeros(5, kv_heads, v_dim, dtype=dtype), 0.125, cap)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (layer(cap=30.0), "soft cap"),
        (layer(dtype=torch.float8_e5m2), "dtype"),
        (layer(v_dim=32), "one shape"),
        (layer(kv_heads=3), "do not fit"),
    ],
)
def test_pool_the_kernels_cannot_read_is_refused(bad, match):
    check_pool([layer()], 4, torch.bfloat16)
    with pytest.raises(ChannelError, match=match):
        check_pool([bad], 4, torch.bfloat16)
