"""How far ahead of prefill decode takes requests in.

A prompt that waits at prefill for others holds decode's memory for nothing. Where that memory is for a few prompts,
they also come in convoys: all that fit are computed as one batch, decode together and end together, and in between one
side has nothing to do.
"""

from __future__ import annotations

AHEAD = 2
"""Prompts that keep a prefill instance busy: one that it computes, one that is next."""
SHARE = 0.2
"""Of decode's pool, that prompts may hold before they are attended to."""


def has_enough(prompts: int, held_tokens: int, pool_tokens: int) -> bool:
    """Whether one more prompt would only wait at a prefill instance that computes, or is to compute, so many `prompts`
    of a decode instance; held_tokens: of that one's pool, for all prompts under way at all prefill instances."""
    return prompts >= AHEAD and held_tokens >= SHARE * pool_tokens
