"""Prompt logprobs of `/generate`: prefill computes them, the client gets decode's answer, so they are put in there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

PROMPT_FIELDS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
"""Keys of `meta_info` that hold one entry per prompt token."""


class HasBody(Protocol):
    @property
    def body(self) -> bytes: ...


def merge_body(decode: bytes, prefill: bytes) -> bytes:
    """Decode's answer (an object, or a list for a batch) with prefill's prompt logprobs."""
    answer, source = msgspec.json.decode(decode), msgspec.json.decode(prefill)
    if isinstance(answer, list) and isinstance(source, list):
        for one, its_source in zip(answer, source, strict=True):
            _merge(one, its_source)
    else:
        _merge(answer, source)
    return msgspec.json.encode(answer)


async def merge_events(chunks: AsyncIterator[bytes], prefill: asyncio.Task[Any]) -> AsyncIterator[bytes]:
    """Server-sent events of decode with prefill's prompt logprobs in each. Waits for prefill at the first event."""
    sources: Any = None
    pending = b""
    async for chunk in chunks:
        *events, pending = (pending + chunk).split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and not event.endswith(b"[DONE]"):
                answer = msgspec.json.decode(event[5:])
                if sources is None:
                    sources = msgspec.json.decode((await prefill).body)
                _merge(answer, sources[answer.get("index", 0)] if isinstance(sources, list) else sources)
                event = b"data: " + msgspec.json.encode(answer)
            yield event + b"\n\n"
    if pending:
        yield pending


def _merge(answer: Any, source: Any) -> None:
    """In place. Leaves anything that is not an answer (an error, say) as it is."""
    if not (isinstance(answer, dict) and isinstance(source, dict)):
        return
    into, prompt = answer.get("meta_info"), source.get("meta_info")
    if not (isinstance(into, dict) and isinstance(prompt, dict)):
        return
    for name in PROMPT_FIELDS:
        if prompt.get(name):
            into[name] = prompt[name] + (into.get(name) or [])
