"""Requests to simulate: Mooncake's trace format, or made up with a fixed seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from sglang_adrenaline.errors import ConfigError

BLOCK_TOKENS = 512
"""Tokens behind one id of `hash_ids` in Mooncake's traces; ours use the same."""
MAX_LENGTH = 1 << 21
USUAL_LIMIT = 4096
"""max_new_tokens of requests whose clients do not know how long answers become."""


class TraceLine(msgspec.Struct):
    """One line of a Mooncake trace. timestamp: milliseconds since the trace's beginning."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]
    output_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]] = []
    """One a block of the prompt; equal ids mean equal tokens from the prompt's beginning on."""


class Req:
    """One request: what the trace says and what became of it. Times in seconds."""

    __slots__ = (
        "arrival", "blocks", "cached", "decode", "finish", "first", "limit", "output", "prefill", "produced", "prompt",
        "room", "split", "stamp",
    )  # fmt: skip

    def __init__(
        self, arrival: float, prompt: int, output: int, blocks: tuple[int, ...] = (), limit: int = USUAL_LIMIT
    ) -> None:
        self.arrival, self.prompt, self.output, self.blocks = arrival, prompt, output, blocks
        self.limit = max(limit, output)  # what servers know of the output's length beforehand
        self.produced = 0
        self.split = -1  # not decided
        self.room = 0  # unshared tokens pinned for it
        self.cached = 0
        self.prefill: int = -1
        self.decode: int = -1
        self.first = self.finish = -1.0
        self.stamp = 0  # step at which its next run in a batch ends; tells stale entries of a heap


def load_mooncake(path: str, *, copies: int = 1, limit: int | None = None, time_scale: float = 1.0) -> list[Req]:
    """Requests of a Mooncake JSONL trace, in order of arrival.

    copies: independent populations that arrive in the same time; time_scale: factor on the timestamps.
    Raises ConfigError naming the line that is none.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read trace {path}: {error.strerror}") from None
    decoder = msgspec.json.Decoder(TraceLine)
    requests: list[Req] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = decoder.decode(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise ConfigError(f"trace {path}, line {number}: {error}") from None
        arrival = entry.timestamp / 1e3 * time_scale
        for copy in range(copies):
            blocks = tuple(block * copies + copy for block in entry.hash_ids)
            requests.append(Req(arrival, entry.input_length, entry.output_length, blocks))
    if not requests:
        raise ConfigError(f"trace {path} has no requests")
    requests.sort(key=lambda request: request.arrival)
    return requests[:limit]


def _arrivals(count: int, rate: float | None, rng: np.random.Generator) -> np.ndarray:
    """Poisson arrivals; all at once without a rate."""
    return np.zeros(count) if rate is None else np.cumsum(rng.exponential(1.0 / rate, count))


def fixed_lengths(count: int, rate: float | None, prompt: int, output: int, seed: int) -> list[Req]:
    """Every request alike, with the output's length as its max_new_tokens."""
    rng = np.random.default_rng(seed)
    return [Req(time, prompt, output, limit=output) for time in _arrivals(count, rate, rng).tolist()]


def sharegpt_like(count: int, rate: float | None, seed: int) -> list[Req]:
    """Lognormal lengths of conversations' turns: prompts median 130, mean about 300; outputs median 150, mean 240."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(130), 1.3, count), 4, 8192).astype(int).tolist()
    outputs = np.clip(rng.lognormal(np.log(150), 1.0, count), 2, 2048).astype(int).tolist()
    return [Req(*values) for values in zip(_arrivals(count, rate, rng).tolist(), prompts, outputs, strict=True)]


def shared_prefix_agents(
    count: int, rate: float | None, seed: int, *, agents: int = 64, system_tokens: int = 4096, turns: int = 4
) -> list[Req]:
    """Sessions of agents: a system prompt shared by an agent's sessions, then turns that each repeat all before them.

    A turn adds 512 tokens of tool output or question to the prompt, is answered with about 200 tokens (lognormal) and
    follows the one before after 2 s to think plus 25 ms a token. `rate` counts requests.
    """
    rng = np.random.default_rng(seed)
    sessions = -(-count // turns)
    starts = _arrivals(sessions, None if rate is None else rate / turns, rng)
    kinds = rng.integers(0, agents, sessions)
    outputs = np.clip(rng.lognormal(np.log(160), 0.7, (sessions, turns)), 8, 2048).astype(int)
    system_blocks = system_tokens // BLOCK_TOKENS
    requests = []
    for session in range(sessions):
        time, prompt = float(starts[session]), system_tokens
        first = int(kinds[session]) * system_blocks
        system = tuple(range(first, first + system_blocks))
        own = agents * system_blocks + session * 1024
        for turn in range(turns):
            prompt += BLOCK_TOKENS
            answer = int(outputs[session, turn])
            history = tuple(range(own, own + (prompt - system_tokens) // BLOCK_TOKENS))
            requests.append(Req(time, prompt, answer, system + history))
            time += 2.0 + 0.025 * answer
            prompt += answer
    requests.sort(key=lambda request: request.arrival)
    return requests[:count]
