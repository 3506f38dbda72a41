"""One decode server on a GPU offloads to two prefill servers in the same steps; one of them dies and comes back.

Starts servers of its own, all on one GPU if there are no more: `pytest test/gpu/test_gpu_several_prefills.py` alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import gpu_servers
import pytest
import torch
from background import expect_answered, expect_lost
from bf16_model import VARIANTS, build_bf16_model
from gpu_cases import batch_cases, length_cases, prompt_len
from gpu_fleet import Fleet, Totals, started
from gpu_servers import Gpus
from leftovers import wait_for_nothing_left
from servers import Group, wait_until
from test_gpu_exactness import WHOLE, check
from test_gpu_lifecycle import DEATH_BOUND_S, _running, ask, until

PREFILL = ("prefill", "prefill-1")
ALL = (*PREFILL, "decode")
VICTIM = "prefill-1"
pytestmark = [pytest.mark.timeout(240, func_only=True)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """In place of the fixture of this name that other tests share."""
    folder = tmp_path_factory.mktemp("gpu-2p1d")
    made = Fleet.make(build_bf16_model(folder / "model", VARIANTS[0]), folder, Gpus.of(torch.cuda.device_count()))
    gpu_servers.add_prefill(made.ours, VICTIM)
    with started([made]):
        yield made


def offloaded(group: Group) -> dict[str, int]:
    return {name: group.status(name)["totals"]["offloaded"] for name in PREFILL}


def test_answers_equal_stock_and_both_prefill_servers_are_used(fleet):
    lengths = length_cases()
    # Kernels are loaded at their first use, for which a named split does not wait as long as it takes.
    for _ in PREFILL:
        check(fleet, lengths, [(name, 0) for name in lengths], concurrency=1)
    asked = [(name, split) for name, case in lengths.items() for split in sorted({0, 1, prompt_len(case)})]
    check(fleet, lengths, asked, concurrency=8)
    batch = batch_cases(40, shortest=1, longest=60, seed=8)
    generator = random.Random(8)
    asked = [(name, generator.choice([None, 0, WHOLE, 1, prompt_len(case) // 2])) for name, case in batch.items()]
    check(fleet, batch, asked, concurrency=40)
    wait_for_nothing_left(fleet.ours, names=ALL)
    counts, peers = offloaded(fleet.ours), fleet.ours.status("decode")["peers"]
    print(counts, [(peer["address"], peer["steps"]) for peer in peers])
    assert min(counts.values()) >= 10, counts
    assert len(peers) == 2 and all(peer["connected"] and peer["steps"] for peer in peers), peers


def test_kill_one_prefill_its_requests_end_and_the_others_go_on(fleet):
    group = fleet.ours
    expect_answered([ask(group, split=WHOLE, tokens=3, seed=seed) for seed in range(10, 16)], 60)  # all are connected
    with Totals(group, 10) as totals:
        remote = [ask(group, split=WHOLE, tokens=3500, seed=seed) for seed in range(20, 28)]
        local = [ask(group, split=0, tokens=3000, seed=seed) for seed in (30, 31)]
        until(lambda: _running(group) == 10, 60, "all requests run", remote + local)
        held = group.status(VICTIM)["running"]["offloaded"]
        assert 0 < held < len(remote), "both hold prompts"
        group.kill(VICTIM)
        died = time.monotonic()
        for client in remote:
            client.thread.join(100)
        lost = [client for client in remote if client.status != 200]
        assert len(lost) == held, [client.text[:200] for client in lost]
        expect_lost(lost, died, DEATH_BOUND_S)
        expect_answered([client for client in remote if client not in lost] + local, 60)
    assert (totals.failed, totals.offloaded, totals.local) == (held, len(remote) - held, len(local))
    print(f"{held} requests lost, the last after {max(client.ended for client in lost) - died:.2f} s")
    after = [ask(group, split=WHOLE, tokens=5, seed=seed) for seed in (40, 41, 42)]
    expect_answered(after, 60)
    wait_for_nothing_left(group, names=("prefill", "decode"))


@pytest.mark.timeout(400, func_only=True)
def test_prefill_that_joins_again_is_used_by_the_running_decode_server(fleet):
    group = fleet.ours
    instance = group.status("decode")["instance"]
    group.kill(VICTIM)
    group.restart(VICTIM, timeout_s=200)

    def used() -> bool:
        clients = [ask(group, split=WHOLE, tokens=5, seed=seed) for seed in range(50, 56)]
        expect_answered(clients, 60)
        return offloaded(group)[VICTIM] > 0

    wait_until(used, 60, "the prefill server that came back is offloaded to")
    cases = length_cases()
    check(fleet, cases, [(name, WHOLE) for name in cases], concurrency=8)
    assert group.status("decode")["instance"] == instance
    wait_for_nothing_left(group, names=ALL)
