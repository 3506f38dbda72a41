"""What a request asks for by itself: `custom_params={"adrenaline": {"remote_prefix_len": N}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHOLE_PROMPT = -1


def wished_split(prompt_len: int, wish: int, page_size: int) -> int:
    """The split P, whole pages, that a valid `wish` (WHOLE_PROMPT or tokens) means for this prompt."""
    return page_floor(prompt_len if wish == WHOLE_PROMPT else min(wish, prompt_len), page_size)


def page_floor(tokens: int, page_size: int) -> int:
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
