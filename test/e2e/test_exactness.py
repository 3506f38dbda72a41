"""Ours gives the tokens that stock SGLang gives: for every split, prompt length, batch and sampling option."""

from __future__ import annotations

import json
import random

import pytest
import requests
from cases import LENGTHS, SCHEMA, shared_prefix_cases
from compare import check_equal, generate_all, generate_streaming, with_split
from conftest import Reference
from servers import Group, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

WHOLE = -1


@pytest.fixture(autouse=True)
def all_given_back(request):
    """After each test nothing is pinned, no lane is taken, nothing runs."""
    yield
    if "deployment" not in request.fixturenames:
        return
    group: Group = request.getfixturevalue("deployment")

    def idle() -> bool:
        prefill, decode = group.status("prefill"), group.status("decode")
        counts = [prefill["pinned_tokens"], *prefill["running"].values(), *decode["running"].values()]
        return not any([*counts, prefill["lanes_in_use"], decode["lanes_in_use"], decode["tokens"]["remote"]])

    wait_until(idle, 15, f"idle servers after the test; prefill {group.status('prefill')}, {group.status('decode')}")


class Totals:
    """How many requests of each kind the decode server counts in a block of a test."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> Totals:
        self._before = self._counts()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            return
        answered = sum(self._before.values())
        wait_until(lambda: sum(self._counts().values()) > answered, 15, "requests of this block counted")
        after = self._counts()
        self.local = after["local"] - self._before["local"]
        self.offloaded = after["offloaded"] - self._before["offloaded"]
        self.failed = after["failed"] - self._before["failed"]

    def _counts(self) -> dict[str, int]:
        return self._group.status("decode")["totals"]


def flush(group: Group) -> None:
    """Empty both radix trees. Refused while anything runs or is pinned, hence the wait."""
    wait_until(lambda: requests.post(f"{group.url}/flush_cache", timeout=30).ok, 15, "flush_cache succeeds")


def check_all(group: Group, reference: Reference, asked: list[tuple[str, int | None]], *, concurrency: int) -> None:
    """Ask `(case, split)` pairs and compare every choice with both stock deployments."""
    payloads = [with_split(reference.cases[name].payload, split) for name, split in asked]
    answers = generate_all(group.url, payloads, concurrency=concurrency)
    for (name, split), choices in zip(asked, answers, strict=True):
        for stock in reference.stocks(name):
            assert len(choices) == len(stock)
            for ours, theirs in zip(choices, stock, strict=True):
                check_equal(ours, theirs, label=f"{name}, split {split}")


def splits(length: int) -> list[int]:
    """Every split of the issue that a prompt of this length has, once each."""
    return sorted({p for p in (0, 1, 7, length - 1, length) if 0 <= p <= length})


def test_stock_pd_equals_stock_single(reference):
    """What the harness compares with: without it, equality with both would mean nothing."""
    assert len(reference.pd) > 15
    for name, pd in reference.pd.items():
        if reference.cases[name].only_pd:
            continue
        for ours, theirs in zip(pd, reference.single[name], strict=True):
            check_equal(ours, theirs, label=name)


def test_reference_answers_are_worth_comparing(reference):
    """Varied tokens, decided logits, and answers that depend on the prompt's first token."""
    answers = [reference.single[f"length-{n}"][0] for n in LENGTHS]
    assert len({answer.token_ids for answer in answers}) == len(answers)
    assert all(len(answer.best_two) == len(answer.token_ids) for answer in answers)
    assert sum(len(set(answer.token_ids)) for answer in answers) > 6 * len(answers)


@pytest.mark.parametrize("kind", ["none", "one", "seven", "all but one", "all"])
def test_split_of_every_length_equals_stock(deployment, reference, kind):
    """Nothing cached; local and offloaded requests of all lengths share batches."""
    flush(deployment)
    place = {"none": lambda n: 0, "one": lambda n: 1, "seven": lambda n: 7, "all but one": lambda n: n - 1}
    asked = [(f"length-{n}", place.get(kind, lambda n: n)(n)) for n in LENGTHS]
    asked = [(name, split) for name, split in asked if 0 <= split <= reference.cases[name].prompt_len]
    with Totals(deployment) as totals:
        check_all(deployment, reference, asked, concurrency=8)
    assert totals.offloaded == sum(split > 0 for _, split in asked)
    assert totals.local == sum(split == 0 for _, split in asked)
    assert totals.failed == 0


def test_mixed_batches_and_prefix_hits_equal_stock(deployment, reference):
    """Every split of every length at once, in random order: prompts are cached on either side by then."""
    asked = [(f"length-{n}", split) for n in LENGTHS for split in splits(n)]
    random.Random(0).shuffle(asked)
    with Totals(deployment) as totals:
        check_all(deployment, reference, asked, concurrency=12)
    assert totals.offloaded == sum(split > 0 for _, split in asked)
    assert totals.failed == 0


@pytest.mark.parametrize("split", [0, 7, WHOLE])
def test_request_alone_equals_stock(deployment, reference, split):
    flush(deployment)
    check_all(deployment, reference, [("length-40", split), ("length-1000", split)], concurrency=1)


def test_default_ratio_offloads_some_and_equals_stock(deployment, reference):
    asked = [(f"length-{n}", None) for n in LENGTHS] * 2
    with Totals(deployment) as totals:
        check_all(deployment, reference, asked, concurrency=6)
    assert totals.offloaded > 0 and totals.local > 0 and totals.failed == 0


def test_same_prompt_twice_is_a_prefix_hit_and_equals_stock(deployment, reference):
    flush(deployment)
    case = reference.cases["length-1000"]
    for round_ in range(2):
        body = requests.post(f"{deployment.url}/generate", json=with_split(case.payload, WHOLE), timeout=120).json()
        assert tuple(body["output_ids"]) == reference.single[case.name][0].token_ids
        if round_:
            assert body["meta_info"]["cached_tokens"] >= case.prompt_len - 1, "the executor's prompt was not cached"


@pytest.mark.parametrize("split", [0, 7, WHOLE])
def test_shared_prefixes_at_once_equal_stock(deployment, reference, split):
    """Two or more requests of one prefix, fresh, in the same batches."""
    flush(deployment)
    names = [case.name for case in shared_prefix_cases()]
    check_all(deployment, reference, [(name, split) for name in names + names], concurrency=10)


def test_same_prompt_with_different_splits_at_once_equals_stock(deployment, reference):
    flush(deployment)
    check_all(deployment, reference, [("length-257", split) for split in (*splits(257), 100, 200)], concurrency=7)


@pytest.mark.parametrize("split", [0, 7, WHOLE])
@pytest.mark.parametrize("name", ["n-2", "penalties", "min-tokens", "one-token", "two-tokens", "long-answer"])
def test_sampling_option_equals_stock(deployment, reference, name, split):
    check_all(deployment, reference, [(name, split)], concurrency=1)


@pytest.mark.parametrize("split", [0, 7, WHOLE])
@pytest.mark.parametrize("name", ["stop-string", "stop-token"])
def test_stop_equals_stock(deployment, reference, name, split):
    assert reference.single[name][0].finish["type"] == "stop"
    assert len(reference.single[name][0].token_ids) < len(reference.single["length-257"][0].token_ids)
    check_all(deployment, reference, [(name, split)], concurrency=1)


@pytest.mark.parametrize("split", [0, 7, WHOLE])
def test_json_schema_equals_stock(deployment, reference, split):
    check_all(deployment, reference, [("schema", split)] * 2, concurrency=2)
    value = json.loads(reference.single["schema"][0].text)
    assert set(value) == set(json.loads(SCHEMA)["properties"])


@pytest.mark.parametrize("split", [0, 7, WHOLE])
def test_streaming_equals_stock(deployment, reference, split):
    case = reference.cases["long-answer"]
    answer, events = generate_streaming(deployment.url, with_split(case.payload, split))
    assert events > 10
    check_equal(answer, reference.single[case.name][0], label=f"streamed, split {split}")


@pytest.mark.parametrize("split", [0, 7, WHOLE])
def test_input_logprobs_equal_stock(deployment, reference, split):
    """Log-probabilities of the prompt come from the prefill server, those of the answer from decode."""
    case = reference.cases["input-logprobs"]
    for stock in reference.stocks(case.name):
        prompt = stock[0].prompt_logprobs
        assert len(prompt) == case.prompt_len and all(value is not None and value < 0 for value, _ in prompt[1:])
    flush(deployment)
    check_all(deployment, reference, [(case.name, split)], concurrency=1)
