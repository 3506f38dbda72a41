"""What is taken is given back: after aborts in every phase, under memory operations, and when nothing is to do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterator

import aiohttp
import pytest
import requests
from cases import prompt
from compare import with_split
from leftovers import wait_for_nothing_left
from servers import Group, session_members, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

NUM_REQUESTS = 200
IDLE_WINDOW_S = 6.0
IDLE_SHARE = 0.05
"""Of one core, all servers together, over a window."""
IDLE_WITHIN_S = 30.0
"""After the last request has given everything back."""


async def _send_and_leave(session: aiohttp.ClientSession, url: str, payload: dict, stay_s: float | None) -> int:
    """Status of the answer, or 0 for a client that hung up after `stay_s` seconds."""

    async def read() -> int:
        async with session.post(f"{url}/generate", json=payload) as reply:
            async for _ in reply.content.iter_any():
                pass
            return reply.status

    try:
        return await asyncio.wait_for(read(), stay_s)
    except TimeoutError:
        return 0


async def _mixed_load(url: str, seed: int) -> list[int]:
    rng = random.Random(seed)
    gate = asyncio.Semaphore(12)

    async def one(session: aiohttp.ClientSession, number: int) -> int:
        length = rng.choice([1, 5, 40, 200, 700])
        wish = rng.choice([None, None, 0, -1, rng.randint(0, length)])
        sampling = {"temperature": 0.8, "max_new_tokens": rng.choice([1, 2, 20, 60]), "ignore_eos": True}
        stream = rng.random() < 0.5
        payload = with_split({"input_ids": prompt(number % 40, length), "sampling_params": sampling}, wish)
        stay_s = rng.choice([None, None, 0.0, 0.02, 0.1, 0.3, 0.8, 1.5])  # in queue, in prefill, while decoding
        async with gate:
            return await _send_and_leave(session, url, payload | {"stream": stream}, stay_s)

    timeout = aiohttp.ClientTimeout(total=240)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        return list(await asyncio.gather(*(one(session, number) for number in range(NUM_REQUESTS))))


def test_mixed_requests_with_aborts_leave_nothing_behind(deployment):
    statuses = asyncio.run(_mixed_load(deployment.url, seed=1))
    assert set(statuses) <= {0, 200}, statuses
    assert statuses.count(200) > NUM_REQUESTS / 4 and statuses.count(0) > NUM_REQUESTS / 10
    totals = deployment.status("decode")["totals"]
    assert totals["failed"] == 0 and totals["offloaded"] > 0
    wait_for_nothing_left(deployment)
    prefill = deployment.status("prefill")
    assert prefill["totals"]["offloaded"] == prefill["totals"]["unpinned"]


@contextlib.contextmanager
def pinned_request(group: Group, tokens: int = 3000) -> Iterator[dict]:
    """An offloaded request that decodes while the block runs; its answer is in the dict afterwards."""
    payload = with_split(
        {"input_ids": prompt(77, 300), "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}, -1
    )
    result: dict = {}

    def ask() -> None:
        reply = requests.post(f"{group.url}/generate", json=payload, timeout=120)
        result.update(status=reply.status_code, body=reply.json())

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: group.status("prefill")["pinned_tokens"] > 0, 30, "the request is pinned")
    yield result
    thread.join(timeout=120)
    assert not thread.is_alive()


def test_memory_operations_while_pinned_are_refused_and_harm_nothing(deployment):
    prefill = deployment.servers["prefill"].url
    with pinned_request(deployment) as result:
        assert requests.post(f"{prefill}/flush_cache", timeout=30).status_code == 400
        released = requests.post(f"{prefill}/release_memory_occupation", json={}, timeout=30)
        assert released.status_code == 400 and "pinned" in released.text
        body = {"model_path": "/nowhere"}
        updated = requests.post(f"{prefill}/update_weights_from_disk", json=body, timeout=30)
        assert updated.status_code == 400 and "pinned" in updated.text
        assert deployment.status("prefill")["pinned_tokens"] == 300
    assert result["status"] == 200
    assert result["body"]["meta_info"]["completion_tokens"] == 3000
    wait_for_nothing_left(deployment)
    assert requests.post(f"{prefill}/flush_cache", timeout=30).status_code == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"remote_prefix_len": 51}, "0..50"),
        ({"remote_prefix_len": -2}, "0..50"),
        ({"remote_prefix_len": "all"}, "whole number"),
        ({"remote_prefix_length": 3}, "remote_prefix_length"),
        ([3], "object"),
    ],
)
def test_malformed_split_is_a_400_that_says_why(deployment, options, words):
    sampling = {"max_new_tokens": 2, "custom_params": {"adrenaline": options}}
    reply = requests.post(
        f"{deployment.url}/generate", json={"input_ids": prompt(1, 50), "sampling_params": sampling}, timeout=30
    )
    assert reply.status_code == 400 and words in reply.text


def test_malformed_split_in_a_chat_is_a_400_that_says_why(deployment):
    body = {"model": "any", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    body["custom_params"] = {"adrenaline": {"remote_prefix_len": 10**6}}
    reply = requests.post(f"{deployment.url}/v1/chat/completions", json=body, timeout=30)
    assert reply.status_code == 400 and "prompt tokens" in reply.text


def test_rooms_chosen_by_a_client_do_not_take_a_server_down(deployment):
    """The router sets its own; sent past it, numbers no server chose must not hurt anybody."""
    decode = deployment.servers["decode"].url
    for room in (-1, 2**63 - 1, 0):
        body = {"input_ids": prompt(3, 20), "sampling_params": {"max_new_tokens": 2}, "bootstrap_room": room}
        body |= {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1}
        with contextlib.suppress(requests.RequestException):
            requests.post(f"{decode}/generate", json=body, timeout=2)
    reply = requests.post(
        f"{deployment.url}/generate",
        json={"input_ids": prompt(4, 20), "sampling_params": {"max_new_tokens": 3}},
        timeout=60,
    )
    assert reply.status_code == 200
    wait_for_nothing_left(deployment, timeout_s=60)


def _cpu_seconds(group: Group) -> dict[str, float]:
    """CPU seconds that each process of each server has used so far, by "server pid name"."""
    used = {}
    for name, server in group.servers.items():
        for pid in session_members(server.pid):
            with open(f"/proc/{pid}/stat") as stat:
                head, fields = stat.read().rsplit(")", 1)
            ticks = sum(map(int, fields.split()[11:13]))
            used[f"{name} {pid} {head.split('(', 1)[1]}"] = ticks / 100
    return used


def _idle_share(group: Group) -> tuple[float, str]:
    """Share of a core that all servers used in the next window, and who used it."""
    before, since = _cpu_seconds(group), time.monotonic()
    time.sleep(IDLE_WINDOW_S)
    after, passed = _cpu_seconds(group), time.monotonic() - since
    shares = {who: (used - before.get(who, 0.0)) / passed for who, used in after.items()}
    return sum(shares.values()), ", ".join(f"{who}: {share:.1%}" for who, share in shares.items() if share)


def test_idle_servers_use_next_to_no_cpu(deployment):
    """What runs always fails in every window; what the tests before left to be cleaned up is gone after a while."""
    wait_for_nothing_left(deployment, timeout_s=60)
    windows = []
    deadline = time.monotonic() + IDLE_WITHIN_S
    while time.monotonic() < deadline:
        windows.append(_idle_share(deployment))
        if windows[-1][0] < IDLE_SHARE:
            return
    raise AssertionError("; ".join(f"{share:.1%} of a core while idle ({who})" for share, who in windows))
