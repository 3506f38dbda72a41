"""Which models' attention our kernel serves in decode's graphs; the attention itself is tested in test/kernel."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_adrenaline import compat
from sglang_adrenaline.attention import local_rows
from sglang_adrenaline.attention.local_rows import Span, kernel_heads
from sglang_adrenaline.attention.planned import Heads

LAYER = compat.AttentionLayer(
    num_qo_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128, sm_scale=0.1, logit_cap=0.0
)
BF16 = torch.bfloat16


def test_heads_of_a_grouped_model():
    other_scale = replace(LAYER, sm_scale=0.2)
    assert kernel_heads([LAYER, other_scale], BF16, BF16) == Heads(32, 8, 128)
    assert kernel_heads([LAYER], torch.float16, torch.float16) == Heads(32, 8, 128)


@pytest.mark.parametrize(
    ("layers", "dtype", "kv_dtype"),
    [
        ([LAYER], torch.float32, torch.float32),
        ([LAYER], BF16, torch.float8_e4m3fn),
        ([replace(LAYER, head_dim=96, v_head_dim=96)], BF16, BF16),
        ([replace(LAYER, v_head_dim=64)], BF16, BF16),
        ([replace(LAYER, num_qo_heads=136)], BF16, BF16),
        ([LAYER, replace(LAYER, logit_cap=30.0)], BF16, BF16),
        ([LAYER, replace(LAYER, num_kv_heads=4)], BF16, BF16),
    ],
    ids=["fp32", "fp8 KV", "head size", "narrow values", "17 query heads", "logit cap", "layers differ"],
)
def test_other_models_are_flashinfers(layers, dtype, kv_dtype):
    assert kernel_heads(layers, dtype, kv_dtype) is None


def test_slots_are_written_by_what_sglang_has_for_it():
    """The kernel that fills FlashInfer's indices is there, with the arguments that we give it."""
    from sglang.kernels.ops.attention import utils

    names = utils.create_flashinfer_kv_indices_triton.arg_names
    assert names[:6] == [
        "req_to_token_ptr",
        "req_pool_indices_ptr",
        "page_kernel_lens_ptr",
        "kv_indptr",
        "kv_start_idx",
        "kv_indices_ptr",
    ]


def test_flashinfer_is_planned_with_the_span_and_then_by_its_fast_plan():
    calls = []
    updater = SimpleNamespace(call_begin_forward=lambda *args, **options: calls.append((args, options)))
    wrapper = SimpleNamespace(begin_forward="first")
    rows = local_rows.FlashInferRows(wrapper, "indptr", updater, None, fast_plans=True)
    lens = torch.tensor([3, 4])
    span = Span(torch.tensor([5, 6]), torch.tensor([0, 1]), lens, lens)
    rows.plan(span, spec_info=None, disable_split_kv=False)
    ((args, options),) = calls
    assert args == (wrapper, span.rows, lens, 7, "indptr", span.starts, None, lens)
    assert options == {"disable_split_kv": False} and wrapper.begin_forward.func is local_rows.fast_decode_plan
