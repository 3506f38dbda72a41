"""Figures of the benchmark from records whose figures are known."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

# Behind everything else: both folders have a module `compare`.
sys.path.append(str(Path(__file__).resolve().parents[1] / "e2e"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmark"))

from compare_report import Report, Run, median_run
from load_client import Record
from load_stats import Slo, find_window, percentile, summarize, tokens_within, tpot, ttft
from systems import System
from workload import Workload

BURST = Workload("burst", 8, 11, requests=2)


def record(start: float, first: float, gap: float, tokens: int, *, first_tokens: int = 1) -> Record:
    """Finished; one token an event after the first event."""
    counts = range(first_tokens, tokens + 1)
    return Record(start, [(first + i * gap, count) for i, count in enumerate(counts)], finished=True)


def test_ttft_and_tpot_count_the_tokens_of_the_first_event():
    one = record(1.0, 3.0, 0.1, 11)
    assert ttft(one) == pytest.approx(2.0) and tpot(one) == pytest.approx(0.1)
    assert tpot(record(1.0, 3.0, 0.1, 11, first_tokens=2)) == pytest.approx(0.1)
    assert math.isnan(tpot(record(0, 1, 0.1, 1))) and math.isnan(ttft(Record(0.0)))


def test_window_of_a_burst_is_where_most_requests_are_answered():
    """Ten requests; the first tokens come from 0 to 0.9 s, the last ones from 10 to 10.9 s."""
    records = [record(0.0, 0.1 * i, 1.0, 11) for i in range(10)]
    begin, end = find_window(records, BURST, 10.9)
    assert begin == pytest.approx(0.8) and end == pytest.approx(10.1)


def test_window_of_a_saturated_run_leaves_the_ramp_out():
    workload = Workload("saturated", 8, 11, concurrency=2, seconds=8.0)
    records = [record(0.0, 0.5, 0.5, 11), record(0.0, 0.5, 0.5, 16)]
    summary = summarize(records, workload, Slo())
    assert summary.window_s == (2.0, 8.0)
    assert tokens_within(records, 2.0, 8.0) == 7 + 12
    assert summary.output_tok_s == pytest.approx(19 / 6)


def test_tokens_within_is_open_at_the_begin_and_closed_at_the_end():
    records = [record(0.0, 1.0, 1.0, 4)]
    assert tokens_within(records, 1.0, 3.0) == 2
    assert tokens_within(records, 0.0, 4.0) == 4


def test_percentile_is_a_value_that_occurred():
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([5.0], 0.99) == 5.0 and percentile([3, 1, 2], 0.5) == 2
    assert math.isnan(percentile([], 0.5))


def test_goodput_counts_requests_within_both_limits():
    records = [
        record(0.0, 1.0, 0.01, 11),  # good
        record(0.0, 3.0, 0.01, 11),  # late
        record(2.0, 2.5, 0.10, 11),  # slow
        Record(4.0, error="503: full"),
    ]
    workload = Workload("rate", 8, 11, rate=1.0, requests=4)
    summary = summarize(records, workload, Slo(ttft_s=2.0, tpot_s=0.025))
    assert summary.goodput_req_s == pytest.approx(1 / 4.0) and summary.within_slo == pytest.approx(1 / 4)
    assert (summary.finished, summary.failed, summary.first_error) == (3, 1, "503: full")


def test_drift_compares_the_ends_of_the_window():
    workload = Workload("saturated", 8, 11, concurrency=1, seconds=12.0)
    steady = [record(i, i + 0.1, 0.05, 11) for i in range(12)]
    slower = [record(i, i + 0.1, 0.05 if i < 6 else 0.1, 11) for i in range(11)]
    assert summarize(steady, workload, Slo()).tpot_drift == pytest.approx(1.0)
    assert summarize(slower, workload, Slo()).tpot_drift == pytest.approx(2.0)


def test_nothing_answered_gives_no_figures():
    summary = summarize([Record(0.0, error="refused")], BURST, Slo())
    assert math.isnan(summary.output_tok_s) and math.isnan(summary.ttft_mean_s) and summary.failed == 1


def report() -> Report:
    made = Report({"model": "m"}, Slo())
    summary = summarize([record(0.0, 0.1 * i, 0.5, 11) for i in range(4)], BURST, Slo())
    use = {"decode": {"most_tokens": 5, "pool_tokens": 9, "most_running": 4, "samples": 2}}
    made.runs = [
        Run("pd", BURST.title, 0, summary, servers=use),
        Run("adrenaline:0.7", BURST.title, 0, summary, offloaded=3, requests=4, exposed_wait_us_per_layer=1.25),
        Run("dp2", BURST.title, 0, error="did not start"),
    ]
    return made


def test_report_is_written_whole_and_without_nan(tmp_path):
    made = report()
    made.runs.append(Run("x", "w", 0, summarize([Record(0.0, error="refused")], BURST, Slo())))
    made.write(tmp_path / "out.json")
    read = json.loads((tmp_path / "out.json").read_text())
    assert read["runs"][3]["summary"]["output_tok_s"] is None and len(read["runs"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_table_holds_each_system_and_why_one_failed():
    text = report().tables()
    assert "1.00" in text and "5/9" in text and "3/4" in text and "1.2" in text and "dp2: did not start" in text


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report().plot(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_median_run_is_by_output_speed():
    def run(speed: float | None) -> Run:
        if speed is None:
            return Run("a", "w", 0, error="failed")
        return Run("a", "w", 0, summarize([record(0.0, 1.0, 1 / speed, 11)] * 2, BURST, Slo()))

    runs = [run(5.0), run(None), run(1.0), run(3.0)]
    assert median_run(runs) is runs[3]
    assert median_run([run(None)]).error == "failed"


def test_system_names_are_parsed():
    assert System.parse("pd:nixl") == System("pd:nixl", "pd", "nixl")
    assert System.parse("adrenaline:0.7") == System("adrenaline:0.7", "adrenaline", None, 0.7)
    assert System.parse("adrenaline:0:local").transfer == "local"
    assert System.parse("adrenaline:auto:sms=48") == System("adrenaline:auto:sms=48", "adrenaline", None, "auto", 48)
    for text in ("", "dp3", "dp2:nixl", "pd:carrier", "adrenaline", "adrenaline:2", "adrenaline:much", "pd:0.5"):
        with pytest.raises(ValueError):
            System.parse(text)
