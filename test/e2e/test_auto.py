"""Offloading by load (`--adrenaline-offload-ratio auto`): decode servers with a small pool overflow to prefill.

One prefill server serves four decode servers, two of which have an objective.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import servers
from background import Client
from cases import LENGTHS
from compare import check_equal, generate_all
from conftest import Reference, watched
from leftovers import leftovers, wait_for_nothing_left
from servers import Group, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

OTHERS = {"tpot": ("--adrenaline-slo-tpot-ms", "2"), "ttft": ("--adrenaline-slo-ttft-ms", "5"), "fresh": ()}
"""Further decode servers. About what a step takes at the least, so that no batch may grow by offloading; less than a
long prompt takes, so that prefill has no time to spare for others; and one that has measured nothing yet, by which
offloading may not pay here."""
BUSY = 0.15
"""Three times the share of prefill's time that the policy lets prompts have at the least."""
POOL_TOKENS = "3000"
"""Of decode, with room for one of the longest prompts; 64 tokens are kept for each answer."""


@pytest.fixture(scope="module")
def group(reference: Reference, tiny_model, logs) -> Iterator[Group]:
    decode_args = ("--max-total-tokens", POOL_TOKENS, "--num-reserved-decode-tokens", "64")
    ours = servers.adrenaline(
        tiny_model,
        logs,
        prefill_args=("--chunked-prefill-size", "256"),
        decode_args=decode_args,
        adrenaline_args=("--adrenaline-offload-ratio", "auto"),
    )
    for name, flags in OTHERS.items():
        servers.add_decode(ours, name, flags)
    with watched(ours):
        yield ours.start()


def ask(
    group: Group, reference: Reference, names: list[str], concurrency: int, decode: str = "decode"
) -> dict[str, int]:
    """Compare every answer with stock; how much decode's counters of decisions, and its totals, rose."""
    before = group.status(decode)
    url = group.url if decode == "decode" else group.servers[f"router-{decode}"].url
    answers = generate_all(url, [reference.cases[name].payload for name in names], concurrency=concurrency)
    for name, choices in zip(names, answers, strict=True):
        for stock in reference.stocks(name):
            for ours, theirs in zip(choices, stock, strict=True):
                check_equal(ours, theirs, label=name)
    wait_until(lambda: not leftovers(group, [decode]), 20, "everything given back")
    after = group.status(decode)
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
    """More answers than decode has room for: they wait or, longer than those before and so than forecast, are retracted
    and come back."""
    rose = ask(group, reference, ["long-answer"] * 12, concurrency=12)
    assert rose["failed"] == 0 and rose["local"] + rose["offloaded"] == 12


def test_choices_of_one_request_are_decided_each(group, reference):
    rose = ask(group, reference, ["n-2", "length-1000"], concurrency=2)
    # Of n > 1 SGLang makes n requests and one ahead of them, which puts the prompt into the cache.
    assert rose["failed"] == 0 and rose["local"] + rose["offloaded"] == 4


def test_tpot_objective_keeps_requests_that_do_not_fit_from_enlarging_the_batch(group, reference):
    """The same requests as above, by which decode's memory overflows: now they wait."""
    rose = ask(group, reference, [f"length-{n}" for n in LENGTHS] * 4, concurrency=16, decode="tpot")
    assert rose["failed"] == 0 and rose.get("overflow", 0) == 0
    assert rose["local"] > rose["offloaded"]


def test_ttft_objective_leaves_prefill_the_time_for_prompts_while_they_come(group, reference):
    """Prompts for another decode server keep prefill busy for a part of the time. Of two equal bursts that do not fit
    into decode's memory, what overflows to prefill without an objective waits with one that needs all of its time."""
    names = ["length-257", "length-1000", "length-2000"] * 5
    with prompts_coming(group.servers["router-tpot"].url):
        wait_until(lambda: group.status("prefill")["prefill_load"] > BUSY, 30, "prefill has something to do")
        without = ask(group, reference, names, concurrency=15, decode="fresh")
        between = group.status("prefill")["prefill_load"]
        within = ask(group, reference, names, concurrency=15, decode="ttft")
        after = group.status("prefill")["prefill_load"]
    print(f"load of prefill {between}, {after}")
    wait_for_nothing_left(group, names=("prefill", "decode", *OTHERS))
    assert without["failed"] == within["failed"] == 0
    assert without["offloaded"] > 0 and within["offloaded"] == 0
    assert within.get("prefill", 0) > 0, "nothing stayed here for prefill's sake"


@contextlib.contextmanager
def prompts_coming(url: str) -> Iterator[None]:
    """One prompt after another that stays local, as long with a pause as without."""
    over = threading.Event()

    def client() -> None:
        for seed in itertools.count(1000):
            begun = time.monotonic()
            sent = Client(url, split=0, tokens=1, seed=seed, prompt_len=1500)
            sent.thread.join(60)
            if over.wait(time.monotonic() - begun):
                return

    thread = threading.Thread(target=client)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(90)
