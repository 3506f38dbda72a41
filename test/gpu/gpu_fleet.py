"""The deployments that one GPU test compares: a single stock server, a stock PD pair and ours, of one model."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_servers
from compare import Answer, Tie, check_equal, generate_all, with_split
from gpu_servers import GPU_ARGS, Gpus
from servers import Group, Server, wait_until

START_TIMEOUT_S = 400.0
ANSWER_TIMEOUT_S = 60.0
STOP_GRACE_S = 2.0
MAX_RUNNING = 48
TEST_ARGS = (
    *GPU_ARGS,
    "--enable-fp32-lm-head",
    *("--context-length", "4096"),
    *("--max-total-tokens", "60000"),
    *("--max-running-requests", str(MAX_RUNNING)),
    *("--cuda-graph-max-bs-decode", str(MAX_RUNNING)),
    # Of the memory that is free when a server starts; the pool's size is given above, and up to ten share a GPU.
    *("--mem-fraction-static", "0.6"),
)
CHUNK_ARGS = ("--chunked-prefill-size", "512")
"""On our prefill server: longer prompts take several chunks."""
ADRENALINE_ARGS = (
    *("--adrenaline-lanes", "64", "--adrenaline-offload-ratio", "0.7"),
    *("--adrenaline-halves-from", "8"),  # so that the batches of the tests run either way
)

Payload = Mapping[str, Any]


@dataclass
class Fleet:
    """The deployments, and what the stock ones answered so far."""

    single: Group
    pd: Group
    ours: Group
    _answers: dict[str, tuple[Answer, Answer]] = field(default_factory=dict)

    @staticmethod
    def make(model: Path, logs: Path, gpus: Gpus) -> Fleet:
        """Not started yet."""
        single = gpu_servers.stock_server("stock-single", model, logs, [*TEST_ARGS, *gpus.args(1)])
        pd = gpu_servers.stock_pd(model, logs, args=TEST_ARGS, gpus=gpus)
        ours = gpu_servers.adrenaline(model, logs, args=TEST_ARGS, gpus=gpus, adrenaline_args=ADRENALINE_ARGS)
        ours.servers["prefill"].command += CHUNK_ARGS
        return Fleet(Group({"single": single}, front="single"), pd, ours)

    @property
    def servers(self) -> list[Server]:
        return [server for group in (self.single, self.pd, self.ours) for server in group.servers.values()]

    def stock(self, payloads: Mapping[str, Payload], *, concurrency: int = 8) -> dict[str, tuple[Answer, Answer]]:
        """(single server's, PD pair's) answer to each named payload; a name is asked once a session."""
        new = {name: payload for name, payload in payloads.items() if name not in self._answers}
        if new:
            single, pd = (self._ask(group, list(new.values()), concurrency) for group in (self.single, self.pd))
            self._answers |= {name: (one, other) for name, one, other in zip(new, single, pd, strict=True)}
        return {name: self._answers[name] for name in payloads}

    def check(
        self, payloads: Mapping[str, Payload], asked: Sequence[tuple[str, int | None]], *, concurrency: int
    ) -> list[Tie]:
        """Ask ours `(name, split)` pairs, compare with both stock answers; the ties that bfloat16 excuses."""
        stock = self.stock(payloads, concurrency=concurrency)
        answers = self._ask(self.ours, [with_split(payloads[name], split) for name, split in asked], concurrency)
        ties, differences = [], []
        for (name, split), ours in zip(asked, answers, strict=True):
            for which, theirs in zip(("single", "PD"), stock[name], strict=True):
                try:
                    tie = check_equal(ours, theirs, dtype="bfloat16", label=f"{name}, split {split}, stock {which}")
                except AssertionError as error:
                    differences.append(str(error))
                else:
                    ties += [tie] if tie is not None else []
        assert not differences, "\n".join(differences)
        print(f"{len(asked)} requests, {len(ties)} ties of {2 * len(asked)} comparisons")
        return ties

    @staticmethod
    def _ask(group: Group, payloads: Sequence[Payload], concurrency: int) -> list[Answer]:
        choices = generate_all(group.url, payloads, concurrency=concurrency, timeout_s=ANSWER_TIMEOUT_S)
        return [answers[0] for answers in choices]


@contextlib.contextmanager
def started(fleets: Sequence[Fleet]) -> Iterator[None]:
    """Start all servers together, wait until all serve, and end them afterwards, whatever happened."""
    every = [server for fleet in fleets for server in fleet.servers]
    try:
        for server in every:
            server.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        for server in every:
            server.wait_ready(deadline)
        yield
    finally:
        for server in every:
            server.terminate()
        time.sleep(STOP_GRACE_S)
        for server in every:
            server.kill()


class Totals:
    """How many requests of each kind our decode server counts in a block of a test."""

    def __init__(self, group: Group, requests: int) -> None:
        self._group, self._requests = group, requests

    def __enter__(self) -> Totals:
        self._before = self._counts()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            return
        expected = sum(self._before.values()) + self._requests
        wait_until(lambda: sum(self._counts().values()) >= expected, 15, "requests of this block counted")
        after = self._counts()
        self.local = after["local"] - self._before["local"]
        self.offloaded = after["offloaded"] - self._before["offloaded"]
        self.failed = after["failed"] - self._before["failed"]

    def _counts(self) -> dict[str, int]:
        return dict(self._group.status("decode")["totals"])
