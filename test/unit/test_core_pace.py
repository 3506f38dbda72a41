"""The pace of cores beside a benchmark, and what it takes out of rates."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

# Behind everything else: both folders have a module `compare`.
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmark"))

from core_pace import CorePace, at_even_pace

SPIN = "import os, time; os.sched_setaffinity(0, {%d}); end = time.monotonic() + 20\nwhile time.monotonic() < end: pass"


def test_slowness_is_sampled_on_each_core_while_it_is_open():
    cores = sorted(os.sched_getaffinity(0))
    begin = time.monotonic()
    with CorePace(cores) as pace:
        time.sleep(1.5)
        end = time.monotonic()
    for core in cores:
        assert 1.0 <= pace.slowness({core}, begin, end) < 50.0
    with pytest.raises(ValueError, match="nothing was sampled"):
        pace.slowness(cores, begin - 2.0, begin - 1.0)


def test_slowness_does_not_count_time_in_which_others_have_the_core():
    core = min(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", SPIN % core]) for _ in range(5)]
    try:
        begin = time.monotonic()
        with CorePace([core]) as pace:
            time.sleep(3.0)
            slowness = pace.slowness({core}, begin, time.monotonic())
    finally:
        for other in others:
            other.kill()
            other.wait(10)
    assert slowness < 4.0, "6 if waiting counted"


@given(st.integers(0, 1000), st.floats(-1.5, 0.0), st.floats(-1.5, 0.0))
def test_rates_that_differ_by_name_and_pace_alone_are_found(seed, first, second):
    rng = random.Random(seed)
    true = {"a": 100.0, "b": 130.0}
    names = [name for name in true for _ in range(6)]
    slowness = [(rng.uniform(1, 2), rng.uniform(1, 2)) for _ in names]
    rates = [true[name] * one**first * two**second for name, (one, two) in zip(names, slowness, strict=True)]
    even = at_even_pace(names, rates, slowness)
    assert even["b"] / even["a"] == pytest.approx(1.3)
    assert min(rates) <= even["b"] and even["a"] <= max(rates)


def test_noise_that_the_pace_explains_is_taken_out():
    rng = random.Random(0)
    names = [name for name in ("x", "y") for _ in range(6)]
    slowness = [(rng.uniform(1, 2), rng.uniform(1, 2)) for _ in names]
    true = {"x": 100.0, "y": 110.0}
    rates = [true[n] * two**-0.8 * rng.uniform(0.99, 1.01) for n, (_, two) in zip(names, slowness, strict=True)]
    even = at_even_pace(names, rates, slowness)
    assert even["y"] / even["x"] == pytest.approx(1.1, rel=0.02)


def test_too_few_measurements_are_refused():
    with pytest.raises(ValueError, match="4 measurements are too few for 4 parameters"):
        at_even_pace(["a", "a", "b", "b"], [1.0] * 4, [(1.0, 1.1)] * 4)
