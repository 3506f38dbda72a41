"""Prefill on one host, decode and router on another: the same answers, and a cut cable that nobody waits for long.

The hosts are network namespaces whose processes do not see each other's either, so that neither shared memory nor
process_vm reaches across. KV that is transferred goes by SGLang's Mooncake backend over TCP.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import servers
from background import Client, wait_until_offloading_works
from compare import check_equal, generate_all, with_split
from leftovers import wait_for_nothing_left
from netns import Host, NoNamespacesError, two_hosts
from servers import Group, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

END_BOUND_S = 6.0
"""A step waits 2.5 s at most; the rest is for the clients' answers on a busy machine."""
BACK_BOUND_S = 60.0
SPLITS = ((257, (0, 1, 7, 256, 257)), (1000, (0, 999, 1000)), (8, (7, 8)), (40, (39,)))
"""Prompt lengths, and of each how many tokens stay with prefill."""


@dataclass(frozen=True)
class Fleet:
    group: Group
    prefill_host: Host


@pytest.fixture(scope="module")
def fleet(tiny_model, logs, reference) -> Iterator[Fleet]:
    backend, env = servers.stock_transfer()
    if backend == "local":
        pytest.skip("SGLang's Mooncake backend is not installed: KV cannot be transferred between hosts")
    with contextlib.ExitStack() as stack:
        try:
            first, second = stack.enter_context(two_hosts())
        except NoNamespacesError as error:
            pytest.skip(f"no network namespaces here: {error}")
        stack.enter_context(second.entered())  # so are the clients of these tests
        group = servers.adrenaline(
            tiny_model,
            logs,
            args=(*servers.SMALL_SERVER_ARGS, "--disaggregation-transfer-backend", backend),
            prefill_args=("--adrenaline-control-host", first.address),
            prefill_host=first.address,
            decode_host=second.address,
        )
        for name, host in (("prefill", first), ("decode", second)):
            server = group.servers[name]
            server.command = host.command(server.command)
            server.env |= {**env, "SGLANG_HOST_IP": host.address}
        stack.enter_context(group)
        yield Fleet(group.start(), first)


def test_answers_equal_stock(fleet, reference):
    group = fleet.group
    asked = [(f"length-{length}", split) for length, splits in SPLITS for split in splits]
    payloads = [with_split(reference.cases[name].payload, split) for name, split in asked]
    answers = generate_all(group.url, payloads, concurrency=6)
    for (name, split), choices in zip(asked, answers, strict=True):
        for stock in reference.stocks(name):
            check_equal(choices[0], stock[0], label=f"{name}, split {split}")
    wait_for_nothing_left(group)
    totals = group.status("decode")["totals"]
    assert totals["offloaded"] == sum(split > 0 for _, split in asked) and totals["failed"] == 0
    assert "channel zmq" in group.servers["prefill"].log_text()


def test_cut_cable_ends_offloaded_requests_and_a_new_one_serves_them_again(fleet):
    group = fleet.group
    remote = [Client(group.url, split=-1, tokens=3000, seed=seed) for seed in (1, 2, 3)]
    local = [Client(group.url, split=0, tokens=600, seed=seed) for seed in (4, 5)]
    wait_until(lambda: sum(group.status("decode")["running"].values()) == 5, 60, "all requests run")
    fleet.prefill_host.plug("down")
    cut = time.monotonic()
    new = Client(group.url, split=-1, tokens=10, seed=6)
    for client in remote:
        client.thread.join(END_BOUND_S + 5)
        assert client.ended and client.ended - cut < END_BOUND_S, (client, time.monotonic() - cut)
        assert client.status >= 500 and "held the prompt's KV and was lost" in client.text, client.text
    for client in local:
        client.thread.join(120)
        assert client.status == 200, client.text
    new.thread.join(30)
    assert new.ended and new.status >= 500, new
    fleet.prefill_host.plug("up")
    wait_until_offloading_works(group, BACK_BOUND_S)
    wait_for_nothing_left(group)
