"""Drives a workload against servers that speak SGLang's `/generate` and takes the times where a client sees them.

One event loop, one connection a request. Of the streamed events only the cumulative `completion_tokens` is read, by
pattern, so that a client of thousands of events a second does not become what is measured.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from workload import Workload

_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_FIRST_ID = 100
"""Token ids below are special in many vocabularies."""


@dataclass
class Record:
    """One request. Times are seconds since the workload began."""

    start: float
    events: list[tuple[float, int]] = field(default_factory=list)
    """(time of arrival, tokens so far) of each piece that brought tokens."""
    finished: bool = False
    error: str | None = None
    """Why it failed; None also for a request that was open when the workload's time was up."""


class Load:
    """One run of a workload over `urls`, in turn. Use once: `await Load(...).run()`."""

    def __init__(self, urls: Sequence[str], workload: Workload, *, vocab_size: int, seed: int, offload: bool) -> None:
        """offload: the servers know `custom_params.adrenaline`; else a workload's `ratio` is left out."""
        self._urls = urls
        self._workload = workload
        self._vocab_size = vocab_size
        self._offload = offload
        self._rng = random.Random(f"{seed}/{workload}")
        self._count = 0
        self._began = 0.0
        self.records: list[Record] = []

    async def run(self, timeout_s: float) -> list[Record]:
        """All requests, also those that failed or were cut off after `timeout_s`."""
        # A workload's own end is no failure; the general one is.
        own_end = self._workload.kind == "saturated"
        limit = min(timeout_s, self._workload.seconds) if own_end else timeout_s
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as session:
            self._began = time.perf_counter()
            work = asyncio.ensure_future(self._drive(session))
            done, _ = await asyncio.wait({work}, timeout=limit)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            if done:
                work.result()
        if not done and not own_end:
            for record in self.records:
                if not record.finished and record.error is None:
                    record.error = f"not finished within {timeout_s:.0f} s"
        return self.records

    async def _drive(self, session: aiohttp.ClientSession) -> None:
        workload = self._workload
        async with asyncio.TaskGroup() as tasks:
            if workload.kind == "saturated":
                opens = 0.0
                for _ in range(workload.concurrency):
                    opens += self._rng.expovariate(workload.rate) if workload.rate else 0.0
                    tasks.create_task(self._keep_open(session, opens))
            elif workload.kind == "single":
                for _ in range(workload.requests):
                    await self._one(session, workload.output_len)
            else:
                due = 0.0
                for _ in range(workload.requests):
                    if workload.kind == "rate":
                        due += self._rng.expovariate(workload.rate)
                        await asyncio.sleep(max(0.0, due - self._now()))
                    tasks.create_task(self._one(session, workload.output_len))

    async def _keep_open(self, session: aiohttp.ClientSession, opens_s: float) -> None:
        """One request after the other. The first one's length is random, so that ends come evenly, not in waves."""
        await asyncio.sleep(opens_s)
        tokens = self._rng.randint(1, self._workload.output_len)
        while True:
            record = await self._one(session, tokens)
            tokens = self._workload.output_len
            if record.error is not None:
                await asyncio.sleep(0.2)  # a server that is gone must not be asked a thousand times a second

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _body(self, tokens: int) -> dict[str, Any]:
        workload, number = self._workload, self._count
        self._count += 1
        ids = self._rng.choices(range(_FIRST_ID, self._vocab_size - _FIRST_ID), k=self._prompt_len())
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        if workload.stream > 1:
            sampling["stream_interval"] = workload.stream
        if workload.ratio is not None and self._offload:
            # Of the first n requests, the share comes as close to the ratio as whole prompts allow.
            remote = int((number + 1) * workload.ratio) > int(number * workload.ratio)
            sampling["custom_params"] = {"adrenaline": {"remote_prefix_len": -1 if remote else 0}}
        return {"input_ids": ids, "sampling_params": sampling, "stream": True}

    def _prompt_len(self) -> int:
        mean, sigma = self._workload.input_len, self._workload.spread
        if not sigma:
            return mean
        return min(max(round(mean * self._rng.lognormvariate(-sigma * sigma / 2, sigma)), 1), 8 * mean)

    async def _one(self, session: aiohttp.ClientSession, tokens: int) -> Record:
        url = self._urls[self._count % len(self._urls)]
        data = json.dumps(self._body(tokens)).encode()
        record = Record(self._now())
        self.records.append(record)
        try:
            headers = {"Content-Type": "application/json"}
            async with session.post(f"{url}/generate", data=data, headers=headers) as reply:
                if reply.status != 200:
                    record.error = f"{reply.status}: {(await reply.text())[:300]}"
                    return record
                await read_answer(reply, record, self._now)
            if record.error is None:
                got = record.events[-1][1] if record.events else 0
                record.finished = got == tokens
                record.error = None if record.finished else f"{got} tokens came instead of {tokens}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            record.error = f"{type(error).__name__}: {error}"
        return record


async def read_answer(reply: aiohttp.ClientResponse, record: Record, now: Callable[[], float]) -> None:
    """Reads a streamed answer to its end into `record`; `now`: seconds since the workload began."""
    rest = b""
    async for chunk in reply.content.iter_any():
        *events, rest = (rest + chunk).split(b"\n\n")
        events = [event for event in events if event.startswith(b"data: ") and not event.endswith(b"[DONE]")]
        if not events:
            continue
        found = _TOKENS.search(events[-1])
        if found is None or b'"type":"abort"' in events[-1].replace(b" ", b""):
            record.error = events[-1][:300].decode(errors="replace")
            return
        tokens = int(found[1])
        if not record.events or tokens > record.events[-1][1]:
            record.events.append((now(), tokens))
