"""Requests whose answers are recorded from the stock servers and then asked of ours, in every split.

Prompts are token ids from a fixed generator, so that each run, and each server of a run, gets the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiny_model import SPECIAL, VOCAB_SIZE

GREEDY = {"temperature": 0, "max_new_tokens": 24}
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 2}
LENGTHS = (1, 2, 7, 8, 40, 257, 1000, 2000)
SHARED_PREFIX = 200

SCHEMA = """{
  "type": "object",
  "properties": {
    "name": {"type": "string", "pattern": "^[a-z]{3,8}$"},
    "size": {"type": "string", "enum": ["small", "medium", "large"]},
    "ok": {"type": "boolean"}
  },
  "required": ["name", "size", "ok"],
  "additionalProperties": false
}"""


@dataclass(frozen=True)
class Case:
    """One request to `/generate`; prompt_len is in tokens."""

    name: str
    payload: Mapping[str, Any]
    prompt_len: int
    only_pd: bool = False
    """Stock PD and a single stock server disagree about it, by themselves; ours follows PD."""

    @property
    def choices(self) -> int:
        return int(self.payload["sampling_params"].get("n", 1))


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(len(SPECIAL), VOCAB_SIZE) for _ in range(length)]


def case(
    name: str,
    input_ids: list[int],
    *,
    sampling: Mapping[str, Any] | None = None,
    only_pd: bool = False,
    **fields: Any,
) -> Case:
    payload = {"input_ids": input_ids, "sampling_params": {**GREEDY, **(sampling or {})}, **LOGPROBS, **fields}
    return Case(name, payload, len(input_ids), only_pd)


def length_cases() -> list[Case]:
    return [case(f"length-{n}", prompt(n, n)) for n in LENGTHS]


def shared_prefix_cases() -> list[Case]:
    """Prompts that agree in their first 200 tokens and then go on differently; some are prefixes of others."""
    shared = prompt(9001, SHARED_PREFIX)
    tails = [prompt(9002, 30), prompt(9003, 1), prompt(9004, 120)]
    return [
        case("shared-only", shared),
        *(case(f"shared-{len(tail)}", shared + tail) for tail in tails),
        case("shared-150", shared + tails[2] + prompt(9005, 30)),
    ]


def sampling_cases() -> list[Case]:
    """What the sampler, not attention, must get right."""
    return [
        case("n-2", prompt(9101, 33), sampling={"n": 2}),
        case("schema", prompt(9102, 60), sampling={"json_schema": SCHEMA, "max_new_tokens": 80}),
        # Log-probabilities differ by 6e-4 between the two stock deployments from the third token on.
        case("penalties", prompt(9103, 45), sampling={"frequency_penalty": 0.7, "presence_penalty": 0.4}, only_pd=True),
        case("min-tokens", prompt(9104, 21), sampling={"min_new_tokens": 20}),
        case("one-token", prompt(9105, 90), sampling={"max_new_tokens": 1}),
        case("two-tokens", prompt(9106, 90), sampling={"max_new_tokens": 2}),
        case("long-answer", prompt(9107, 64), sampling={"max_new_tokens": 300, "ignore_eos": True}),
    ]


def input_logprob_case() -> Case:
    return case("input-logprobs", prompt(9201, 48), logprob_start_len=0)


def stop_cases(plain_text: str, plain_ids: tuple[int, ...]) -> list[Case]:
    """Stops in the middle of the answer to the prompt of `length-257`: by a piece of its text, by a token."""
    middle = len(plain_text) // 2
    ids = prompt(257, 257)
    return [
        case("stop-string", ids, sampling={"stop": [plain_text[middle : middle + 4], "never said"]}),
        case("stop-token", ids, sampling={"stop_token_ids": [plain_ids[len(plain_ids) // 2]]}),
    ]


def all_cases() -> list[Case]:
    return [*length_cases(), *shared_prefix_cases(), *sampling_cases(), input_logprob_case()]
