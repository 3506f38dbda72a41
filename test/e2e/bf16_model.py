"""The models of the tests in bfloat16, CPU and GPU: random Llamas with head size 64, made on the spot.

bfloat16 rounds to 8 bits, and two correct servers need not round alike: another batch, another split of the sum. So the
weights are scaled for answers that such noise changes rarely and a wrong prefix changes surely: attention that looks at
many tokens rather than at one, and only `LOUD_TOKENS` tokens that are ever the best, which lie well apart.
`python test/e2e/bf16_model.py FOLDER` shows, on a CPU, what rounding does to such a model, and what a lost prefix does.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_model import CONTEXT_LENGTH, SPECIAL, VOCAB_SIZE, build_tiny_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64
NUM_HEADS = 8
NUM_LAYERS = 4
LOUD_TOKENS = 24
LOUD, QUIET = 0.6, 0.08
"""Standard deviation of a loud and of any other token's logit."""


@dataclass(frozen=True)
class Variant:
    """num_kv_heads decides which FlashInfer kernels SGLang takes: from 4 query heads a KV head on, tensor cores."""

    name: str
    num_kv_heads: int
    seed: int


VARIANTS = (Variant("gqa", 2, 0), Variant("mha", NUM_HEADS, 1))


def build_bf16_model(folder: Path, variant: Variant) -> Path:
    """Write configuration, bfloat16 weights and tokenizer to `folder`, which is returned."""
    build_tiny_model(folder)  # for its tokenizer; configuration and weights are written over
    make_model(variant).save_pretrained(folder, safe_serialization=True)
    return folder


def make_model(variant: Variant) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=NUM_HEADS * HEAD_DIM,
        intermediate_size=1024,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=variant.num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    generator = torch.Generator().manual_seed(variant.seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            fan_in = 1 if "embed_tokens" in name else weight.shape[1]
            weight.normal_(0.0, _gain(name) / fan_in**0.5, generator=generator)
        loud = torch.randperm(VOCAB_SIZE - len(SPECIAL), generator=generator)[:LOUD_TOKENS] + len(SPECIAL)
        scale = torch.full((VOCAB_SIZE, 1), QUIET)
        scale[loud] = LOUD
        model.lm_head.weight.mul_(scale)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, do_sample=False)
    return model.eval()


def _gain(name: str) -> float:
    """Standard deviation of an output for inputs of standard deviation 1."""
    if "q_proj" in name or "k_proj" in name:
        return 1.2
    return 3.0 if "o_proj" in name else 1.0


def _report(variant: Variant) -> None:
    """Over random prompts: what rounding does to log-probabilities and greedy tokens, and what a lost prefix does."""
    exact, rounded = make_model(variant).float(), make_model(variant)
    rounded.lm_head.float()  # the servers get --enable-fp32-lm-head
    torch.manual_seed(1)
    errors, gaps, changed, distinct, lost = [], [], 0, 0, 0
    lengths = (1, 7, 40, 257, 600)
    for length in lengths:
        prompt = torch.randint(len(SPECIAL), VOCAB_SIZE, (1, length))
        answer = exact.generate(prompt, max_new_tokens=32, do_sample=False, pad_token_id=1)[:, length:]
        whole = torch.cat([prompt, answer], 1)
        with torch.no_grad():
            want = exact(whole).logits[0, length - 1 : -1].log_softmax(-1)
            hidden = rounded.model(whole).last_hidden_state.float()
            got = rounded.lm_head(hidden)[0, length - 1 : -1].log_softmax(-1)
            part = whole[:, length // 2 :] if length > 1 else whole[:, 1:]
            forgot = exact(part).logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
        chosen = answer[0]
        rows = torch.arange(len(chosen))
        errors.append((got - want)[rows, chosen].abs())
        best = want.topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
        changed += int((got.argmax(-1) != chosen).sum())
        distinct += len(set(chosen.tolist()))
        lost += int((forgot.argmax(-1) != chosen[-len(forgot) :]).sum())
    error, gap = torch.cat(errors), torch.cat(gaps)
    print(
        f"{variant.name}: {len(error)} tokens, {distinct / len(lengths):.0f} distinct an answer; log-probability error "
        f"of bfloat16 mean {error.mean():.4f}, largest {error.max():.4f}; best two within 0.05: {(gap < 0.05).sum()}; "
        f"tokens changed by rounding {changed}, by forgetting half of the prompt {lost}"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for one in VARIANTS:
        build_bf16_model(Path(sys.argv[1]) / one.name, one)
        _report(one)
