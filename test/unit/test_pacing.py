"""How far ahead of prefill requests are decided: the rule, and the order of turns under it."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_decode_auto import LIMIT, RESERVE, decider, there

from sglang_adrenaline import compat, policy
from sglang_adrenaline.decode.by_load import ByLoad
from sglang_adrenaline.decode.memory import ConstantReserve
from sglang_adrenaline.decode.offload import Offload

A, B = ("10.0.0.1", 8998), ("10.0.0.2", 8998)
SMALL_POOL = 8_192


def request(rid: str) -> SimpleNamespace:
    """New ids each, so that none shares anything."""
    number = int(rid[1:])
    return SimpleNamespace(rid=rid, ids=list(range(1_000 * number, 1_000 * number + 1_000)))


def offload_of(rid: str) -> Offload:
    return Offload(request(rid), 0, A, 0, 1_000, 0.0, forced=False, split_open=True)


def link(index: int, address: tuple[str, int]) -> SimpleNamespace:
    return SimpleNamespace(index=index, lanes=8, peer=SimpleNamespace(name="ab"[index], address=address))


@pytest.fixture
def transfers(monkeypatch) -> list:
    """Requests whose KV is on the way. Nothing runs, and decode's pool is otherwise empty.

    A scheduler cannot be built without a server, so what `compat` reads from it is told here; everything above that is
    the real thing, and with servers the same path runs in test/e2e/test_auto.py.
    """
    coming: list = []
    told = {
        "requests_in_transfer": lambda _: [req for req, _ in coming],
        "bootstrap_address": lambda req: next(address for one, address in coming if one is req),
        "ran_decode_step": lambda _: False,
        "rid": lambda req: req.rid,
        "prompt_ids": lambda req: req.ids,
        "locked_prefix_len": lambda *_: 0,
        "answer_limit": lambda _: LIMIT,
        "running_requests": lambda _: [],
        "num_admitted": lambda _: len(coming),
        "unclaimed_tokens": lambda _: SMALL_POOL - 1_000 * len(coming),
    }
    for name, function in told.items():
        monkeypatch.setattr(compat, name, function)
    return coming


def turns(transfers: list, pool_tokens: int) -> tuple[ByLoad, list[bool]]:
    """Four requests of prefill instance a and one of b, all of which stay here: who was decided."""
    by_load = ByLoad(decider(min_tokens=5_000), None, pool_tokens, ConstantReserve(RESERVE, lambda: len(transfers)))
    by_load._there = there() | {"b": there()["a"]}
    links = {"a": link(0, A), "b": link(1, B)}
    offloads = [offload_of(f"r{number}") for number in range(5)]
    decided = [
        by_load.decide(offload, links[name], offloads, []) is not None
        for offload, name in zip(offloads, "aaaab", strict=True)
    ]
    return by_load, decided


def test_decide_third_prompt_of_a_prefill_waits_and_others_pass_it(transfers):
    by_load, decided = turns(transfers, SMALL_POOL)
    assert decided == [True, True, False, False, True]
    assert not by_load.turns_over


def test_decide_prompts_that_take_little_of_the_pool_do_not_wait(transfers):
    assert all(turns(transfers, 100_000)[1])


def test_decide_prompts_on_their_way_count_until_they_run(transfers):
    by_load, _ = turns(transfers, SMALL_POOL)
    for rid in ("r0", "r1"):
        by_load.decider.admission.placed(rid, 1_000)
        transfers.append((request(rid), A))

    def third() -> policy.Decision | None:
        by_load.new_loop([], [], [])
        by_load._there = there()
        return by_load.decide(offload_of("r2"), link(0, A), [], [])

    assert third() is None
    transfers.pop()
    assert third() is not None


@given(st.integers(0, 9), st.integers(0, 10_000), st.integers(1, 10_000), st.integers(0, 9), st.integers(0, 10_000))
def test_has_enough_never_leaves_a_prefill_idle_and_more_under_way_never_lets_more_in(
    prompts, held, pool, more, tokens
):
    enough = policy.has_enough(prompts, held, pool)
    if enough:
        assert prompts >= 2 and held > 0
        assert policy.has_enough(prompts + more, held + tokens, pool)
        assert not policy.has_enough(1, held, pool)
