"""Requests of the GPU tests, by name: prompts are token ids from a fixed generator, answers greedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cases import GREEDY, LOGPROBS, prompt

LENGTHS = (1, 2, 7, 40, 257, 1000, 2000, 3500)
"""Prompts of the length cases, in tokens; the last ones take several chunks of prefill."""


def payload(input_ids: list[int], tokens: int = 24) -> Mapping[str, Any]:
    sampling = {**GREEDY, "max_new_tokens": tokens, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling, **LOGPROBS}


def length_cases() -> dict[str, Mapping[str, Any]]:
    return {f"length-{n}": payload(prompt(n, n)) for n in LENGTHS}


def shared_prefix_cases() -> dict[str, Mapping[str, Any]]:
    """Prompts that agree in their first 200 tokens; some are prefixes of others."""
    shared = prompt(9001, 200)
    tails = {"none": [], "one": prompt(9003, 1), "some": prompt(9002, 30), "many": prompt(9004, 300)}
    return {f"shared-{name}": payload(shared + tail) for name, tail in tails.items()}


def batch_cases(count: int, *, shortest: int, longest: int, seed: int) -> dict[str, Mapping[str, Any]]:
    """Prompts of 5 to some 600 tokens; answers of all lengths from `shortest` to `longest` tokens, evenly."""
    cases = {}
    for i in range(count):
        length = 5 + (i * 7919) % 601
        tokens = shortest + (i * 31) % (longest - shortest + 1)
        cases[f"batch-{seed}-{i}"] = payload(prompt(seed * 1000 + i, length), tokens)
    return cases


def prompt_len(case: Mapping[str, Any]) -> int:
    return len(case["input_ids"])
