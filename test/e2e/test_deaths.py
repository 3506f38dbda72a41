"""Servers that die, and requests that are retracted: nobody hangs, nothing leaks, the others go on.

The decode server of this group retracts a request every few steps, so that some are retracted when the others die.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import requests
import servers
from background import Client, expect_answered, expect_lost, wait_until_offloading_works
from compare import check_equal, generate_all, with_split
from leftovers import wait_for_nothing_left
from servers import Group, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

RETRACT_ENV = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "9"}
DEATH_BOUND_S = 10.0


@pytest.fixture(scope="module")
def mortal(tiny_model, logs, reference) -> Iterator[Group]:
    group = servers.adrenaline(tiny_model, logs, decode_args=("--enable-metrics",))
    group.servers["decode"].env |= RETRACT_ENV
    with group:
        yield group.start()


def test_retracted_requests_give_the_same_tokens(mortal, reference):
    """Retraction copies the suffix to the host and back while the prefix stays pinned."""
    asked = [("length-257", -1), ("length-40", 7), ("length-257", 0), ("length-40", -1), ("length-1000", 999)]
    asked += [("long-answer", -1), ("long-answer", 0), ("long-answer", 30)]
    payloads = [with_split(reference.cases[name].payload, split) for name, split in asked]
    answers = generate_all(mortal.url, payloads, concurrency=8)
    for (name, split), choices in zip(asked, answers, strict=True):
        check_equal(choices[0], reference.single[name][0], label=f"{name}, split {split}, retracted now and then")
    assert "#retracted_reqs" in mortal.servers["decode"].log_text()
    wait_for_nothing_left(mortal)


def test_metrics_show_the_status(mortal):
    text = requests.get(f"{mortal.servers['decode'].url}/metrics", timeout=30).text
    for name in ("requests_total", "steps_total", "tokens", "lanes_in_use", "peers"):
        assert f"sglang_adrenaline:{name}" in text


def test_kill_prefill_offloaded_requests_end_with_the_cause_and_local_ones_finish(mortal):
    remote = [Client(mortal.url, split=-1, tokens=3000, seed=seed) for seed in (1, 2, 3)]
    local = [Client(mortal.url, split=0, tokens=600, seed=seed) for seed in (4, 5)]
    wait_until(lambda: _running(mortal) >= 5, 60, "all requests run")
    mortal.kill("prefill")
    died = time.monotonic()
    expect_lost(remote, died, DEATH_BOUND_S)
    expect_answered(local, 120)
    status = mortal.status("decode")
    assert status["totals"]["failed"] >= 3 and not status["peers"][0]["connected"]
    mortal.restart("prefill")
    wait_until_offloading_works(mortal)
    wait_for_nothing_left(mortal)


def test_kill_decode_prefill_unpins_in_time(mortal):
    clients = [Client(mortal.url, split=-1, tokens=3000, seed=seed) for seed in (6, 7)]
    wait_until(lambda: mortal.status("prefill")["running"]["offloaded"] == 2, 60, "both are pinned")
    mortal.kill("decode")
    died = time.monotonic()
    wait_until(lambda: mortal.status("prefill")["pinned_tokens"] == 0, DEATH_BOUND_S, "prefill unpinned")
    assert time.monotonic() - died < DEATH_BOUND_S
    assert mortal.status("prefill")["lanes_in_use"] == 0
    for client in clients:
        client.thread.join(30)
        assert client.ended and client.status not in (0, 200), client
    mortal.restart("decode")
    wait_until_offloading_works(mortal)
    wait_for_nothing_left(mortal)


def _running(group: Group) -> int:
    return sum(group.status("decode")["running"].values())
