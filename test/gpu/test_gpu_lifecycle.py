"""What is taken on a GPU is given back, and death in the middle of a graph hangs nobody. Runs last of this folder.

Each model variant's group loses another server, so that only the last test has to start them again, which takes long
(`-k "not returns"` leaves it out).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import aiohttp
import pytest
from background import Client, expect_answered, expect_lost, wait_until_offloading_works
from cases import prompt
from compare import with_split
from leftovers import wait_for_nothing_left
from servers import Group, wait_until

NUM_REQUESTS = 150
DEATH_BOUND_S = 10.0


def ask(group: Group, split: int, tokens: int, seed: int) -> Client:
    return Client(group.url, split, tokens, seed, prompt_len=300, timeout_s=100)


async def _mixed_load(url: str, seed: int) -> list[int]:
    """Statuses; 0 for a client that left before its answer was complete."""
    rng = random.Random(seed)
    gate = asyncio.Semaphore(32)

    async def one(session: aiohttp.ClientSession, number: int) -> int:
        length = rng.choice([1, 5, 40, 200, 700, 2500])
        wish = rng.choice([None, None, 0, -1, rng.randint(0, length)])
        sampling = {"temperature": 0.8, "max_new_tokens": rng.choice([1, 2, 20, 60]), "ignore_eos": True}
        body = with_split({"input_ids": prompt(number % 40, length), "sampling_params": sampling}, wish)
        stay_s = rng.choice([None, None, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0])  # in queue, in prefill, while decoding

        async def read() -> int:
            async with session.post(f"{url}/generate", json={**body, "stream": rng.random() < 0.5}) as reply:
                await reply.read()
                return reply.status

        async with gate:
            try:
                return await asyncio.wait_for(read(), stay_s)
            except TimeoutError:
                return 0

    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        return list(await asyncio.gather(*(one(session, number) for number in range(NUM_REQUESTS))))


def test_mixed_requests_with_aborts_leave_nothing_behind(fleet):
    before = fleet.ours.status("decode")["totals"]
    statuses = asyncio.run(_mixed_load(fleet.ours.url, seed=1))
    assert set(statuses) <= {0, 200}, statuses
    assert statuses.count(200) > NUM_REQUESTS / 4 and statuses.count(0) > NUM_REQUESTS / 20
    after = fleet.ours.status("decode")["totals"]
    assert after["failed"] == before["failed"] and after["offloaded"] > before["offloaded"]
    wait_for_nothing_left(fleet.ours, timeout_s=30)
    prefill = fleet.ours.status("prefill")
    assert prefill["totals"]["offloaded"] == prefill["totals"]["unpinned"]


@pytest.mark.parametrize("variant", ["gqa"])
def test_kill_prefill_offloaded_requests_end_and_local_ones_finish(fleets, variant):
    group = fleets[variant].ours
    remote = [ask(group, split=-1, tokens=3500, seed=seed) for seed in (1, 2, 3, 4)]
    local = [ask(group, split=0, tokens=1500, seed=seed) for seed in (5, 6)]
    until(lambda: _running(group) >= 6, 30, "all requests run", remote + local)
    group.kill("prefill")
    died = time.monotonic()
    expect_lost(remote, died, DEATH_BOUND_S)
    expect_answered(local, 60)
    assert group.servers["decode"].alive()
    status = group.status("decode")
    assert status["totals"]["failed"] >= 4 and not status["peers"][0]["connected"]
    wait_until(lambda: group.status("decode")["lanes_in_use"] == 0, 10, "decode gave its lanes back")


@pytest.mark.parametrize("variant", ["mha"])
def test_kill_decode_prefill_unpins_in_time(fleets, variant):
    group = fleets[variant].ours
    clients = [ask(group, split=-1, tokens=3500, seed=seed) for seed in (7, 8, 9)]
    until(lambda: group.status("prefill")["running"]["offloaded"] == 3, 30, "all are pinned", clients)
    group.kill("decode")
    died = time.monotonic()
    wait_until(lambda: group.status("prefill")["pinned_tokens"] == 0, DEATH_BOUND_S, "prefill unpinned")
    assert time.monotonic() - died < DEATH_BOUND_S
    assert group.status("prefill")["lanes_in_use"] == 0
    for client in clients:
        client.thread.join(30)
        assert client.ended and client.status not in (0, 200), client


@pytest.mark.timeout(300, func_only=True)
@pytest.mark.parametrize(("variant", "server"), [("gqa", "prefill"), ("mha", "decode")])
def test_lost_server_returns_and_is_used_again(fleets, variant, server):
    """The servers that the two tests before this one killed."""
    group = fleets[variant].ours
    group.kill(server)
    group.restart(server, timeout_s=200)
    wait_until_offloading_works(group)
    wait_for_nothing_left(group)


def until(condition: Callable[[], bool], timeout_s: float, what: str, clients: list[Client]) -> None:
    """Like `wait_until`, but fails at once, with its answer, when one of `clients` has ended already."""

    def met() -> bool:
        ended = [client for client in clients if client.ended]
        assert not ended, f"ended too early: {ended[0].status} {ended[0].text[:300]}"
        return condition()

    wait_until(met, timeout_s, what)


def _running(group: Group) -> int:
    return sum(group.status("decode")["running"].values())
