"""`python -m sglang_adrenaline.profile` on a GPU with a model of few layers: the figures agree with each other."""

from __future__ import annotations

import json

from sglang_adrenaline import profile
from sglang_adrenaline.profile_data import load_profile

FEW_LAYERS = {
    "num_hidden_layers": 4,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def test_profile_of_this_gpu_is_consistent(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FEW_LAYERS))
    out = tmp_path / "gpu.json"
    arguments = ["--model-path", str(tmp_path), "--out", str(out), "--device", "cuda", "--sm-counts", "16,32,64"]
    assert profile.main(arguments) == 0
    measured = load_profile(str(out))
    few, some, half = measured.shares
    assert few.attention_bytes_s < some.attention_bytes_s < half.attention_bytes_s < measured.attention_bytes_s
    assert 1 > few.prefill_factor > half.prefill_factor > 0.1
    assert measured.linear[-1].seconds > measured.linear[0].seconds
    # A batch of prefill uses the GPU better than a single row does.
    assert measured.prefill_token_s < measured.linear[0].seconds / 10
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
