"""Offloading by load (`--adrenaline-offload-ratio auto`): a decode server with a small pool overflows to prefill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from cases import LENGTHS
from compare import check_equal, generate_all
from conftest import Reference, watched
from servers import Group
from test_lifecycle import wait_for_nothing_left

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

STRICT = ("--adrenaline-slo-tpot-ms", "2")
"""About what a step takes here at the least, so no batch may grow by offloading."""
POOL_TOKENS = "3000"
"""Of decode, with room for one of the longest prompts; 64 tokens are kept for each answer."""


def small_decode(model: Path, logs: Path, objectives: tuple[str, ...] = ()) -> Group:
    decode_args = ("--max-total-tokens", POOL_TOKENS, "--num-reserved-decode-tokens", "64")
    return servers.adrenaline(
        model,
        logs,
        prefill_args=("--chunked-prefill-size", "256"),
        decode_args=decode_args,
        adrenaline_args=("--adrenaline-offload-ratio", "auto", *objectives),
    )


@pytest.fixture(scope="module")
def group(reference: Reference, tiny_model, logs) -> Iterator[Group]:
    ours = small_decode(tiny_model, logs)
    with watched(ours):
        yield ours.start()


def ask(group: Group, reference: Reference, names: list[str], concurrency: int) -> dict[str, int]:
    """Compare every answer with stock; how much decode's counters of decisions, and its totals, rose."""
    before = group.status("decode")
    answers = generate_all(group.url, [reference.cases[name].payload for name in names], concurrency=concurrency)
    for name, choices in zip(names, answers, strict=True):
        for stock in reference.stocks(name):
            for ours, theirs in zip(choices, stock, strict=True):
                check_equal(ours, theirs, label=name)
    wait_for_nothing_left(group, timeout_s=20)
    after = group.status("decode")
    rose = {name: count - before["decisions"].get(name, 0) for name, count in after["decisions"].items()}
    rose |= {name: after["totals"][name] - before["totals"][name] for name in after["totals"]}
    print(rose)
    return rose


def test_requests_beyond_decode_memory_are_offloaded_and_equal_stock(group, reference):
    names = [f"length-{n}" for n in LENGTHS] * 4
    rose = ask(group, reference, names, concurrency=16)
    assert rose["failed"] == 0
    assert rose["local"] + rose["offloaded"] == len(names)
    assert rose["offloaded"] > 0, "nothing was offloaded though decode was full"
    assert rose["local"] > 0


def test_short_prompts_on_an_idle_server_stay_local(group, reference):
    rose = ask(group, reference, ["length-7", "length-8"], concurrency=1)
    assert (rose["local"], rose["offloaded"], rose["failed"]) == (2, 0, 0)


def test_long_answers_that_outgrow_decode_equal_stock(group, reference):
    """More answers than decode has room for: by the forecast those that do not fit wait, and none is retracted."""
    rose = ask(group, reference, ["long-answer"] * 12, concurrency=12)
    assert rose["failed"] == 0 and rose["local"] + rose["offloaded"] == 12
    assert "#retracted_reqs" not in group.servers["decode"].log_text()


def test_choices_of_one_request_are_decided_each(group, reference):
    rose = ask(group, reference, ["n-2", "length-1000"], concurrency=2)
    # Of n > 1 SGLang makes n requests and one ahead of them, which puts the prompt into the cache.
    assert rose["failed"] == 0 and rose["local"] + rose["offloaded"] == 4


def test_tpot_objective_keeps_requests_that_do_not_fit_from_enlarging_the_batch(reference, tiny_model, logs):
    """The same requests as above, by which decode's memory overflows: now they wait."""
    ours = small_decode(tiny_model, logs, STRICT)
    with watched(ours):
        rose = ask(ours.start(), reference, [f"length-{n}" for n in LENGTHS] * 4, concurrency=16)
    assert rose["failed"] == 0 and rose.get("overflow", 0) == 0
    assert rose["local"] > rose["offloaded"]
