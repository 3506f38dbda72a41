"""Fixtures of the GPU tests: the server groups of both model variants, started once, all at the same time.

A start takes more than a minute and the models are tiny. Tests of this folder skip, with the reason, where there is no
NVIDIA GPU. Failing tests show the ends of our servers' logs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from bf16_model import VARIANTS, build_bf16_model
from gpu_fleet import Fleet, started
from gpu_servers import Gpus

HERE = Path(__file__).parent
TEST_TIMEOUT_S = 120
TP_ENV = "ADRENALINE_TEST_TP"
"""GPUs a server, 1 by default."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.servers)
            if item.get_closest_marker("timeout") is None:
                # func_only: the first test also waits for the servers, whose start has a deadline of its own.
                item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S, func_only=True))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, there is none"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    fleet = getattr(item, "funcargs", {}).get("fleet")
    if report.failed and fleet is not None:
        for name in ("prefill", "decode"):
            report.sections.append((f"log of {name}", fleet.ours.servers[name].log_end(25)))


@pytest.fixture(scope="session")
def fleets(tmp_path_factory, request) -> Iterator[dict[str, Fleet]]:
    """By name of the model variant; only of those that the selected tests need (`-k gqa`)."""
    params = [getattr(item, "callspec", None) and item.callspec.params for item in request.session.items]
    needed = {p.get("fleet", p.get("variant")) for p in params if p}
    gpus = Gpus.of(torch.cuda.device_count(), int(os.environ.get(TP_ENV, "1")))
    made = {}
    for variant in (variant for variant in VARIANTS if variant.name in needed):
        folder = tmp_path_factory.mktemp(f"gpu-{variant.name}")
        made[variant.name] = Fleet.make(build_bf16_model(folder / "model", variant), folder, gpus)
    with started(list(made.values())):
        yield made


@pytest.fixture(params=[variant.name for variant in VARIANTS])
def fleet(fleets, request) -> Fleet:
    return fleets[request.param]
