"""A tiny Llama with random weights, and a tokenizer, made on the spot: the model of the exactness tests.

Its answers mean nothing, but they are varied, depend on the whole prompt and leave wide gaps between the best logits,
so that two servers that compute the same thing in float32 give the same tokens, and two that do not soon differ.
`python test/e2e/tiny_model.py FOLDER` writes it and prints how varied and how decided its answers are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 448
CONTEXT_LENGTH = 4096
SPECIAL = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>")

CHAT_TEMPLATE = (
    "{% if tools %}<|user|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}{{ message.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

TRAINING_TEXT = (
    "The prefill server keeps the prompt and the decode server asks it for attention over the part that it kept.",
    "A request has a prompt, a split point, a lane and an end; every step sends the query and merges the answer.",
    '{"name": "Ada", "age": 36, "tags": ["one", "two", "three"], "ok": true, "none": null, "pi": 3.14159}',
    "Numbers such as 0 1 2 3 4 5 6 7 8 9 10 20 50 100 1000 occur in texts about time, length and money.",
    "When the prefix is shared by many requests, its keys and values are read once and used by all of them.",
)


def build_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Write configuration, float32 weights and tokenizer of the model to `folder`, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer().save_pretrained(folder)
    _model(seed).save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written, and the grammar engine knows the kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            fan_in = 1 if "embed_tokens" in name else weight.shape[1]
            weight.normal_(0.0, _gain(name) / fan_in**0.5, generator=generator)
        # Bytes that are no ASCII text, and all special tokens but the end, would make broken characters in the
        # answers: a logit of 0 among hundreds of random ones is never the best.
        model.lm_head.weight[_silent_tokens()] = 0.0
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, do_sample=False)
    return model.eval()


def _gain(name: str) -> float:
    """Standard deviation of an output for inputs of standard deviation 1.

    Queries and keys large enough that attention picks tokens instead of averaging over all; attention's share of the
    residual stream large enough that a wrong prefix changes the answer; logits several units apart.
    """
    if "q_proj" in name or "k_proj" in name:
        return 2.0
    if "o_proj" in name:
        return 3.0
    return 4.0 if "lm_head" in name else 1.0


def _silent_tokens() -> list[int]:
    vocab = _tokenizer().get_vocab()
    plain = {chr(code) for code in range(33, 127)} | {"Ġ"}
    return [index for token, index in vocab.items() if token != "<|eos|>" and not set(token) <= plain] + [
        vocab[token] for token in SPECIAL if token != "<|eos|>"
    ]


def _report(folder: Path) -> None:
    """Greedy answers to random prompts: share of distinct tokens, best-two gaps, and what forgetting a prefix does."""
    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(folder)
    changed = 0
    for length in (1, 7, 50, 300):
        prompt = torch.randint(5, VOCAB_SIZE, (1, length))
        steps = 48
        out = model.generate(
            prompt, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        answer = out.sequences[0, length:]
        best = torch.stack([logits[0].topk(2).values for logits in out.logits])
        gaps = best[:, 0] - best[:, 1]
        other = prompt.clone()
        other[0, 0] = (other[0, 0] + 1) % VOCAB_SIZE
        second = model.generate(other, max_new_tokens=steps, do_sample=False)[0, length:]
        changed += int(not torch.equal(answer, second))
        print(
            f"prompt {length}: {len(answer)} tokens, {len(set(answer.tolist()))} distinct, "
            f"smallest gap {gaps.min():.4f}, median {gaps.median():.2f}; other first token gives "
            f"{'another' if not torch.equal(answer, second) else 'the same'} answer"
        )
        print("   ", repr(_tokenizer().decode(answer)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = build_tiny_model(Path(sys.argv[1]))
    _report(path)
