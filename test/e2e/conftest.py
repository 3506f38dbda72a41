"""Server groups shared by all end-to-end tests of a session, and the stock servers' answers.

The stock servers are started once, asked everything, and stopped before ours start: a machine of two cores cannot
serve all of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests
import servers
from cases import Case, all_cases, stop_cases
from compare import Answer, generate_all
from servers import Group
from tiny_model import build_tiny_model

SMALL_CHUNK = "256"
"""Prefill of ours works in chunks this small, so that longer prompts take several."""
TOOL_CALL_PARSER = "qwen25"


@dataclass
class Reference:
    """Answers of the stock servers by case name; one answer for each of the request's n choices."""

    cases: dict[str, Case] = field(default_factory=dict)
    single: dict[str, list[Answer]] = field(default_factory=dict)
    pd: dict[str, list[Answer]] = field(default_factory=dict)
    """Without the cases of several choices: stock PD never answers those (all of them share one bootstrap room)."""

    def stocks(self, name: str) -> list[list[Answer]]:
        """What each stock deployment said whose answer to the case ours must equal."""
        asked = (self.pd,) if self.cases[name].only_pd else (self.single, self.pd)
        return [answers[name] for answers in asked if name in answers]


_running: list[Group] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.extend(("logs of the servers", group.logs(40)) for group in _running)


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    """Folder for server logs and key files; pytest keeps it for a while after the session."""
    return tmp_path_factory.mktemp("server-logs")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def reference(tiny_model, logs) -> Reference:
    """What a single stock server and a stock PD pair answer to all cases, one request at a time."""
    single, pair = servers.stock_single(tiny_model, logs), servers.stock_pd(tiny_model, logs)
    both = Group(single.servers | pair.servers, front="router")
    with watched(both):
        both.start()
        known = {case.name: case for case in all_cases()}
        alone = _ask(single.url, known.values())
        plain = alone["length-257"][0]
        more = {case.name: case for case in stop_cases(plain.text, plain.token_ids)}
        alone |= _ask(single.url, more.values())
        apart = _ask(pair.url, [case for case in [*known.values(), *more.values()] if case.choices == 1])
    return Reference(known | more, alone, apart)


FIXED_RATIO = ("--adrenaline-offload-ratio", "0.7")
"""So that a certain share is offloaded on idle servers, too; ratio auto is tested in test_auto.py."""


@pytest.fixture(scope="session")
def deployment(tiny_model, logs, request) -> Iterator[Group]:
    """Our prefill server, decode server and router with the tiny model; chunked prefill."""
    if any("reference" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("reference")
    args = (*servers.SMALL_SERVER_ARGS, "--tool-call-parser", TOOL_CALL_PARSER, *FIXED_RATIO)
    group = servers.adrenaline(tiny_model, logs, args=args, prefill_args=("--chunked-prefill-size", SMALL_CHUNK))
    with watched(group):
        yield group.start()


DEMO_ARGS = servers.SMALL_SERVER_ARGS
DEMO_CHATS = (
    "What is the capital of France? Answer in one sentence.",
    "Write a short list of three fruits.",
    "Explain in simple words why the sky is blue. " * 12,
)
DEMO_TOKENS = 32


@pytest.fixture(scope="session")
def demo_reference(logs) -> list[str]:
    """What a single stock server with the demo model answers to `DEMO_CHATS`."""
    from sglang_adrenaline.demo_model import ensure_demo_model

    group = servers.stock_single(ensure_demo_model(), logs, args=DEMO_ARGS, name="stock-demo")
    with watched(group):
        group.start()
        return [_chat(group.url, text) for text in DEMO_CHATS]


@pytest.fixture(scope="session")
def demo(demo_reference, logs) -> Iterator[Group]:
    """What a user gets: the launcher without a model path."""
    group = servers.launcher(None, logs, args=(*DEMO_ARGS, *FIXED_RATIO))
    with watched(group):
        yield group.start()


def _chat(url: str, text: str) -> str:
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": DEMO_TOKENS,
        "temperature": 0,
    }
    reply = requests.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


class watched:  # noqa: N801 - used as a keyword would be
    """Stops the group at the end; failing tests in between show its logs."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> Group:
        _running.append(self._group)
        return self._group

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            print(self._group.logs())
        self._group.stop()
        _running.remove(self._group)


def _ask(url: str, cases: Iterable[Case]) -> dict[str, list[Answer]]:
    cases = list(cases)
    answers = generate_all(url, [case.payload for case in cases], concurrency=1)
    return {case.name: answer for case, answer in zip(cases, answers, strict=True)}
