"""Figures of a model that several tests compute with."""

from sglang_adrenaline.figures import ModelFigures

LLAMA2_7B = ModelFigures(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_qo_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
)
