"""Summing up recorded kernels, and samples of a running deployment."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmark"))

import kernel_trace
from timeline import Sample, spans


def event(name: str, stream: int, begin: float, duration: float) -> dict:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": duration, "args": {"stream": stream}}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    events = [
        event("gemm", 7, 0, 1000),
        event("gemm", 7, 2000, 1000),
        event("attention", 9, 500, 1000),
        {"ph": "X", "cat": "cpu_op", "name": "host", "ts": -5000, "dur": 1},
    ]
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_kernels_are_summed_by_stream_with_what_ran_beside_them(trace: Path) -> None:
    lines = kernel_trace.report(trace).splitlines()
    assert lines[0].endswith("3.0 ms, 3 kernels")
    assert lines[1] == "stream 7: busy 2.00 ms (67 %), 0.50 ms of it beside others"
    assert lines[2].split()[:4] == ["2.00", "ms", "2", "x"]
    assert lines[3] == "stream 9: busy 1.00 ms (33 %), 0.50 ms of it beside others"


def test_a_file_that_is_no_trace_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert kernel_trace.main([str(path), str(tmp_path / "missing.json")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_spans_are_means_over_the_steps_between_two_samples() -> None:
    first = Sample(
        at=1.0,
        local=1,
        offloaded=1,
        used_tokens=0,
        remote_tokens=0,
        steps_total=100,
        exposed_wait_ms_total=50.0,
        executor_wait_ms_total=1000.0,
        late_launches_total=0,
        prefill_load=0.5,
        prefill_used_tokens=0,
        executor_share=0.0,
        decisions={},
        executor_rate=1.0,
    )
    idle = replace(first, at=1.5)
    later = replace(idle, at=2.0, steps_total=120, exposed_wait_ms_total=60.0, executor_wait_ms_total=1200.0)
    (span,) = spans([first, idle, later])
    assert (span.at, span.step_ms, span.exposed_wait_ms, span.executor_wait_ms) == (2.0, 25.0, 0.5, 10.0)
