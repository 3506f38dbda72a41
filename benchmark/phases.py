"""The load of `shifting_load.py`: three phases that ask for different things, and the requests of each, from a seed.

What bounds a phase, on servers of one core each and a decode pool of DECODE_POOL tokens:

    long prompts     prefill: decode could serve three times as many. Remote attention takes time from prefill.
    long outputs     decode's memory: half of the clients' requests fit with their prompts, all of them without.
    shared prefixes  decode's attention: four long prefixes are kept by both servers, so that neither prefill nor memory
                     is short, and a step is fastest where both servers read about as much.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DECODE_POOL = 4096
RESERVED_TOKENS = 64
"""`--num-reserved-decode-tokens` of decode: SGLang's 512 would be an eighth of this pool for each request."""
CONCURRENCY = 12
_FIRST_ID, _LAST_ID = 100, 900
JITTER = 0.25
"""Prompts are up to so much shorter or longer than the phase says."""


@dataclass(frozen=True)
class Phase:
    """Lengths in tokens. groups: so many prefixes of `shared` tokens are used in turn; 0: prompts share nothing."""

    name: str
    prompt: int
    output: int
    requests: int
    shared: int = 0
    groups: int = 0

    def prompts(self, seed: int, scale: float) -> list[list[int]]:
        """Token ids of each request; `scale` shortens or lengthens the phase."""
        rng = random.Random(f"{seed}/{self.name}")
        prefixes = [_ids(rng, self.shared) for _ in range(self.groups)]
        prompts = []
        for number in range(max(round(self.requests * scale), CONCURRENCY)):
            length = round(self.prompt * rng.uniform(1 - JITTER, 1 + JITTER))
            prefix = prefixes[number % self.groups] if prefixes else []
            prompts.append(prefix + _ids(rng, length))
        return prompts


PHASES = (
    Phase("long prompts", prompt=512, output=32, requests=60),
    Phase("long outputs", prompt=512, output=256, requests=30),
    Phase("shared prefixes", prompt=48, output=64, requests=48, shared=1024, groups=2),
)


def _ids(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(_FIRST_ID, _LAST_ID), k=count)
