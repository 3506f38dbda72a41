"""Decides how much of a prompt stays on the prefill side. Pure functions over explicit state.

Runs in the decode scheduler, once per request. The decision depends on nothing but the state, the request and the
settings, so that every rank that sees the same requests in the same order decides alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

WHOLE_PROMPT = -1


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
        wish = prompt_len if requested == WHOLE_PROMPT else min(requested, prompt_len)
        return _page_floor(wish, settings.page_size), state
    if prompt_len < settings.min_tokens or settings.ratio <= 0.0:
        return 0, state
    owed = state.owed + settings.ratio * prompt_len
    if owed < prompt_len / 2:
        return 0, replace(state, owed=owed)
    return _page_floor(prompt_len, settings.page_size), replace(state, owed=owed - prompt_len)


def _page_floor(tokens: int, page_size: int) -> int:
    return tokens - tokens % page_size


def requested_prefix_len(custom_params: Mapping[str, Any] | None, prompt_len: int) -> int | None:
    """What `custom_params={"adrenaline": {"remote_prefix_len": N}}` asks for; None where it asks for nothing.

    Raises ValueError with one line for the user on anything else than -1 <= N <= prompt_len.
    """
    if not custom_params:
        return None
    if not isinstance(custom_params, Mapping):
        raise ValueError(f"custom_params must be an object, not {custom_params!r}")
    if custom_params.get("adrenaline") is None:
        return None
    options = custom_params["adrenaline"]
    if not isinstance(options, Mapping):
        raise ValueError(f'custom_params["adrenaline"] must be an object, not {options!r}')
    unknown = sorted(set(options) - {"remote_prefix_len"})
    if unknown:
        raise ValueError(f'custom_params["adrenaline"] knows remote_prefix_len, not {", ".join(map(repr, unknown))}')
    wish = options.get("remote_prefix_len")
    if wish is None:
        return None
    if isinstance(wish, bool) or not isinstance(wish, int):
        raise ValueError(f"adrenaline.remote_prefix_len must be a whole number, not {wish!r}")
    if not WHOLE_PROMPT <= wish <= prompt_len:
        raise ValueError(
            f"adrenaline.remote_prefix_len must be -1 (whole prompt) or 0..{prompt_len} (prompt tokens), not {wish}"
        )
    return wish
