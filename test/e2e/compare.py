"""When two servers' answers count as equal, and the client that gets the answers from `/generate`.

float32: the same tokens, always. bfloat16: a first difference is let pass where the stock server's two best
log-probabilities lie within `BF16_TIE`; such cases are returned, so that tests count them. Log-probabilities of the
common tokens must agree within the dtype's tolerance.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
import requests

Dtype = Literal["float32", "bfloat16"]

LOGPROB_TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 2e-2}
BF16_TIE = 0.05


@dataclass(frozen=True)
class Answer:
    """What one `/generate` request (or one of its n choices) gave."""

    token_ids: tuple[int, ...]
    text: str
    finish: Any
    prompt_tokens: int
    logprobs: tuple[float, ...] = ()
    """Of each token, natural logarithm; empty if not asked for."""
    best_two: tuple[tuple[float, float], ...] = ()
    """The two best log-probabilities at each position."""
    prompt_logprobs: tuple[tuple[float | None, int], ...] = ()
    """(log-probability, token) of each token of the prompt, if asked for; SGLang knows none for the first."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> Answer:
        meta = body["meta_info"]
        chosen = meta.get("output_token_logprobs") or []
        best = meta.get("output_top_logprobs") or []
        return Answer(
            token_ids=tuple(body["output_ids"]),
            text=body["text"],
            finish=meta["finish_reason"],
            prompt_tokens=meta["prompt_tokens"],
            logprobs=tuple(item[0] for item in chosen),
            best_two=tuple((items[0][0], items[1][0]) for items in best),
            prompt_logprobs=tuple((item[0], item[1]) for item in meta.get("input_token_logprobs") or []),
        )


@dataclass(frozen=True)
class Tie:
    """A first difference that bfloat16 may have: at `position` stock's two best were `gap` apart."""

    position: int
    gap: float


def check_equal(ours: Answer, stock: Answer, *, dtype: Dtype = "float32", label: str = "") -> Tie | None:
    """Raises AssertionError unless `ours` equals `stock`; a Tie is returned where bfloat16 allows the difference."""
    common = _common_length(ours.token_ids, stock.token_ids)
    tie = None
    if ours.token_ids != stock.token_ids:
        tie = _tie_at(stock, common)
        what = f"{label}: token {common} differs: ours {ours.token_ids[common : common + 3]}, stock "
        what += f"{stock.token_ids[common : common + 3]}, stock's two best there {_best_at(stock, common)}"
        assert dtype == "bfloat16" and tie is not None, what
    else:
        assert ours.text == stock.text, f"{label}: same tokens, other text: {ours.text!r}, stock {stock.text!r}"
        assert ours.finish == stock.finish, f"{label}: finish {ours.finish}, stock {stock.finish}"
    assert ours.prompt_tokens == stock.prompt_tokens, f"{label}: prompt tokens"
    if ours.logprobs and stock.logprobs:
        assert len(ours.logprobs) == len(ours.token_ids), f"{label}: a log-probability per token"
        _check_logprobs(ours.logprobs[:common], stock.logprobs[:common], LOGPROB_TOLERANCE[dtype], label)
    assert len(ours.prompt_logprobs) == len(stock.prompt_logprobs), f"{label}: prompt log-probabilities"
    for (a, token), (b, expected) in zip(ours.prompt_logprobs, stock.prompt_logprobs, strict=True):
        assert token == expected and (a is None) == (b is None), f"{label}: prompt token {token}, stock {expected}"
        assert a is None or b is None or abs(a - b) < LOGPROB_TOLERANCE[dtype], f"{label}: prompt {a}, stock {b}"
    return tie


def _check_logprobs(ours: Sequence[float], stock: Sequence[float], tolerance: float, label: str) -> None:
    """Says all that is beyond the tolerance: one token alone is another fault than all from one on."""
    beyond = [
        f"of token {position}: ours {a}, stock {b}"
        for position, (a, b) in enumerate(zip(ours, stock, strict=True))
        if not math.isfinite(a) or abs(a - b) >= tolerance
    ]
    assert not beyond, f"{label}: log-probability, {len(beyond)} of {len(ours)}: {'; '.join(beyond[:8])}"


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _best_at(answer: Answer, position: int) -> tuple[float, float] | None:
    return answer.best_two[position] if position < len(answer.best_two) else None


def _tie_at(stock: Answer, position: int) -> Tie | None:
    best = _best_at(stock, position)
    if best is None or best[0] - best[1] > BF16_TIE:
        return None
    return Tie(position, best[0] - best[1])


def with_split(payload: Mapping[str, Any], remote_prefix_len: int | None) -> dict[str, Any]:
    """The payload of `/generate` with a split of its own; None leaves it to the server."""
    if remote_prefix_len is None:
        return dict(payload)
    sampling = dict(payload["sampling_params"])
    sampling["custom_params"] = {"adrenaline": {"remote_prefix_len": remote_prefix_len}}
    return {**payload, "sampling_params": sampling}


def generate_all(
    url: str, payloads: Sequence[Mapping[str, Any]], *, concurrency: int = 8, timeout_s: float = 300
) -> list[list[Answer]]:
    """Send every payload to `/generate`, `concurrency` at a time; per payload its n answers, in order.

    Raises AssertionError with the server's words on any status but 200.
    """
    return asyncio.run(_generate_all(url, payloads, concurrency, timeout_s))


def generate_streaming(url: str, payload: Mapping[str, Any], *, timeout_s: float = 120) -> tuple[Answer, int]:
    """The answer to `/generate` with `stream`, and the number of events it came in.

    SGLang's events hold all text so far; checks that nothing once sent is taken back.
    """
    reply = requests.post(f"{url}/generate", json={**payload, "stream": True}, stream=True, timeout=timeout_s)
    assert reply.status_code == 200, reply.text
    last: dict[str, Any] = {}
    events = 0
    for line in reply.iter_lines():
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        event = json.loads(line[len(b"data: ") :])
        assert "error" not in event, event
        assert event["text"].startswith(last.get("text", "")), (last["text"], event["text"])
        last, events = event, events + 1
    assert events, "no event came"
    return Answer.of(last), events


async def _generate_all(
    url: str, payloads: Sequence[Mapping[str, Any]], concurrency: int, timeout_s: float
) -> list[list[Answer]]:
    gate = asyncio.Semaphore(concurrency)

    async def one(session: aiohttp.ClientSession, payload: Mapping[str, Any]) -> list[Answer]:
        async with gate, session.post(f"{url}/generate", json=payload) as reply:
            text = await reply.text()
            assert reply.status == 200, f"{reply.status}: {text}\nfor {str(payload)[:300]}"
            body = await reply.json(content_type=None)
        return [Answer.of(item) for item in (body if isinstance(body, list) else [body])]

    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    ) as session:
        return list(await asyncio.gather(*(one(session, payload) for payload in payloads)))
