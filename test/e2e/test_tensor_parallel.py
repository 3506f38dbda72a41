"""TP 2 + 2: the ranks of a server split, accept, fail and unpin requests as one; none is left behind.

Four scheduler processes on a CPU, with gloo. Decode's pool is small and its ratio auto, so that the first rank's
decisions have to reach the other; it retracts a request every few steps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import servers
from background import Client, expect_answered, expect_lost, wait_until_offloading_works
from cases import LENGTHS
from compare import check_equal, generate_all, with_split
from conftest import watched
from leftovers import wait_for_nothing_left
from servers import Group, scheduler_pid, wait_until
from test_deaths import RETRACT_ENV

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

DEATH_BOUND_S = 10.0


@pytest.fixture(scope="module")
def group(tiny_model, logs, reference) -> Iterator[Group]:
    pair = servers.adrenaline(
        tiny_model,
        logs,
        args=(*servers.SMALL_SERVER_ARGS, "--tp-size", "2"),
        prefill_args=("--chunked-prefill-size", "256"),
        decode_args=("--max-total-tokens", "5000", "--num-reserved-decode-tokens", "64"),
        adrenaline_args=("--adrenaline-offload-ratio", "auto"),
    )
    pair.servers["decode"].env |= RETRACT_ENV
    with watched(pair):
        yield pair.start()


def test_splits_of_all_lengths_and_choices_by_load_equal_stock(group, reference):
    """In the same batches; prompts are computed in chunks, cached, shared; some requests are retracted."""
    before = group.status("decode")["totals"]
    asked = [(f"length-{n}", split) for n in LENGTHS for split in (0, 1, n - 1, n) if split <= n]
    asked += [("long-answer", split) for split in (-1, 0, 30)]
    asked += [(f"length-{n}", None) for n in LENGTHS] * 3
    payloads = [with_split(reference.cases[name].payload, split) for name, split in asked]
    answers = generate_all(group.url, payloads, concurrency=12)
    for (name, split), choices in zip(asked, answers, strict=True):
        check_equal(choices[0], reference.single[name][0], label=f"{name}, split {split}, TP 2")
    wait_for_nothing_left(group)
    status = group.status("decode")
    rose = {kind: status["totals"][kind] - before[kind] for kind in before}
    assert rose["failed"] == 0 and rose["local"] + rose["offloaded"] == len(asked)
    assert rose["offloaded"] >= sum(bool(split) for _, split in asked)
    assert status["steps"] > 50 and sum(status["decisions"].values()) > 0, status


def test_kill_one_prefill_rank_ends_every_request_and_a_restart_serves_again(group):
    """The link of one decode rank dies at once, that of the other a moment later: both must end the same requests."""
    remote = [Client(group.url, split=-1, tokens=1200, seed=seed) for seed in (1, 2, 3)]
    local = [Client(group.url, split=0, tokens=300, seed=seed) for seed in (4, 5)]
    wait_until(lambda: sum(group.status("decode")["running"].values()) >= 5, 60, "all requests run")
    os.kill(scheduler_pid(group.servers["prefill"], rank=1), signal.SIGKILL)
    died = time.monotonic()
    expect_lost(remote, died, DEATH_BOUND_S)
    expect_answered(local, 60)
    group.restart("prefill")
    wait_until_offloading_works(group)
    wait_for_nothing_left(group)
