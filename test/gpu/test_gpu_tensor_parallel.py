"""TP 2 + 2 in bfloat16 with CUDA graphs: ranks split, accept, fail and unpin requests as one. Needs two GPUs.

On two GPUs both servers run on both of them; from four on each has its own. Stock's deployments beside ours are TP 2 as
well. Starts servers of its own: `pytest test/gpu/test_gpu_tensor_parallel.py` alone.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from background import expect_answered, expect_lost, wait_until_offloading_works
from bf16_model import VARIANTS, build_bf16_model
from gpu_cases import batch_cases, length_cases, prompt_len
from gpu_fleet import Fleet, Totals, started
from gpu_servers import Gpus
from leftovers import wait_for_nothing_left
from servers import scheduler_pid
from test_gpu_exactness import WHOLE, check
from test_gpu_lifecycle import DEATH_BOUND_S, _mixed_load, _running, ask, until

TP = 2
pytestmark = [pytest.mark.timeout(240, func_only=True)]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """One model variant; a KV head a rank. In place of the fixture of this name that all other tests share."""
    if torch.cuda.device_count() < TP:
        pytest.skip(f"needs {TP} NVIDIA GPUs, there are {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("gpu-tp")
    gpus = Gpus.of(torch.cuda.device_count(), TP)
    made = Fleet.make(build_bf16_model(folder / "model", VARIANTS[0]), folder, gpus)
    with started([made]):
        yield made


def test_splits_of_all_lengths_equal_stock(fleet):
    cases = length_cases()
    asked = [(name, split) for name, case in cases.items() for split in sorted({0, 1, prompt_len(case)})]
    check(fleet, cases, asked, concurrency=8)
    wait_for_nothing_left(fleet.ours, timeout_s=30)


def test_batches_that_cross_graph_buckets_equal_stock(fleet):
    """Offloaded or not, and by the server's ratio; joins and leaves in nearly every step."""
    cases = batch_cases(40, shortest=1, longest=60, seed=6)
    generator = random.Random(6)
    asked = [(name, generator.choice([None, 0, WHOLE, 1, prompt_len(case) // 2])) for name, case in cases.items()]
    check(fleet, cases, asked, concurrency=40)
    wait_for_nothing_left(fleet.ours, timeout_s=30)


def test_mixed_requests_with_aborts_leave_nothing_behind(fleet):
    statuses = asyncio.run(_mixed_load(fleet.ours.url, seed=2))
    assert set(statuses) <= {0, 200} and statuses.count(200) > len(statuses) / 4, statuses
    wait_for_nothing_left(fleet.ours, timeout_s=30)
    prefill = fleet.ours.status("prefill")
    assert prefill["totals"]["offloaded"] == prefill["totals"]["unpinned"] > 0


@pytest.mark.timeout(480, func_only=True)
def test_kill_one_prefill_rank_ends_every_request_and_a_restart_serves_again(fleet):
    """In the middle of graph replays: the link of one rank dies first, then that of the other."""
    group = fleet.ours
    remote = [ask(group, split=-1, tokens=3500, seed=seed) for seed in (1, 2, 3, 4)]
    local = [ask(group, split=0, tokens=1000, seed=seed) for seed in (5, 6)]
    until(lambda: _running(group) >= 6, 60, "all requests run", remote + local)
    with Totals(group, len(remote) + len(local)) as totals:
        os.kill(scheduler_pid(group.servers["prefill"], rank=1), signal.SIGKILL)
        died = time.monotonic()
        expect_lost(remote, died, DEATH_BOUND_S)
        expect_answered(local, 100)
    assert (totals.failed, totals.offloaded) == (len(remote), 0)
    group.kill("prefill")
    group.restart("prefill", timeout_s=200)
    wait_until_offloading_works(group)
    wait_for_nothing_left(group)
