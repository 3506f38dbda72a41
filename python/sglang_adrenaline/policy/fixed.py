"""Offloads a fixed share of prompt tokens (`--adrenaline-offload-ratio R`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_adrenaline.policy.wish import page_floor, wished_split


@dataclass(frozen=True)
class Settings:
    """ratio: share of prompt tokens to offload, 0..1. min_tokens: shorter prompts stay local. page_size: the pools'."""

    ratio: float
    min_tokens: int
    page_size: int


@dataclass(frozen=True)
class State:
    """owed: prompt tokens that the ratio promised to offload so far and that were not (negative: too many were)."""

    owed: float = 0.0


def decide(state: State, prompt_len: int, requested: int | None, settings: Settings) -> tuple[int, State]:
    """Return (remote prefix length P, next state) for a prompt of `prompt_len` tokens; 0 <= P <= prompt_len.

    `requested` is the request's own wish: None leaves it to the ratio, WHOLE_PROMPT asks for all, N for N tokens. A
    wish is no part of the ratio's accounts. P is a whole number of pages.

    The ratio is met by offloading whole prompts and leaving others local, with the rounding error carried over: a
    request with its whole prompt remote needs no KV transfer and no decode memory for the prompt, and a local one costs
    no round trip, whereas splitting every prompt would pay both for every request. |owed| stays below the longest
    prompt. A decision that the prefill side refuses is not owed again: it refuses because it is full.
    """
    if requested is not None:
        return wished_split(prompt_len, requested, settings.page_size), state
    if prompt_len < settings.min_tokens or settings.ratio <= 0.0:
        return 0, state
    owed = state.owed + settings.ratio * prompt_len
    if owed < prompt_len / 2:
        return 0, replace(state, owed=owed)
    return page_floor(prompt_len, settings.page_size), replace(state, owed=owed - prompt_len)
