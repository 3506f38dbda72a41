"""What the long run calls a finding: growth, slower tokens, failures, leftovers; and what it lets pass."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))

from soak import Cycle, findings

CYCLE = Cycle(
    seconds=60.0,
    finished=900,
    left=100,
    failed=0,
    tokens_s=5000.0,
    tpot_ms=20.0,
    probe_ms=10.0,
    offloaded=400,
    host_mib=6000.0,
    gpu_mib=90_000.0,
    threads=100,
    files=300,
    held=(),
    first_error=None,
)
COLD = replace(CYCLE, tpot_ms=40.0, host_mib=5000.0, gpu_mib=80_000.0, threads=60, files=200)
"""A first cycle: everything is used for the first time in it."""


def run(**last: float) -> list[str]:
    """Findings of ten cycles that lead to `last` evenly."""
    cycles = [COLD]
    for n in range(9):
        now = {}
        for name, end in last.items():
            begin = getattr(CYCLE, name)
            now[name] = type(begin)(begin + (end - begin) * n / 8)
        cycles.append(replace(CYCLE, **now))
    return findings(cycles)


def test_level_cycles_after_a_cold_one_are_no_finding():
    assert run() == []
    assert run(tpot_ms=21.0, probe_ms=10.3, host_mib=6060.0, gpu_mib=90_060.0, threads=104, files=304) == []


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"host_mib": 6200.0}, "host memory grew from 6000 to 6200 MiB"),
        ({"gpu_mib": 92_000.0}, "GPU memory grew"),
        ({"threads": 120}, "threads grew from 100 to 120"),
        ({"files": 330}, "files grew"),
        ({"probe_ms": 11.0}, "a token alone took"),
        ({"tpot_ms": 24.0}, "a token under load took"),
    ],
)
def test_growth_is_named(last, words):
    (found,) = run(**last)
    assert words in found


def test_failures_and_leftovers_of_any_cycle_are_named():
    found = findings([replace(COLD, held=("decode has 1 lanes in use",)), CYCLE, replace(CYCLE, failed=2), CYCLE])
    assert found == ["cycle 1: decode has 1 lanes in use", "cycle 3: 2 failed, first: None"]


def test_too_few_cycles_say_so():
    assert findings([COLD, CYCLE]) == ["fewer than three cycles: nothing can be said about growth"]
