"""From the client's records to figures. Pure functions.

*TPOT* of a request: (last - first event) / (tokens after the first event). Stock PD's first event holds two tokens, so
tokens are counted and not assumed. *Output tok/s* counts the tokens that arrived within the window over its length.
The window: for `saturated`, from a quarter of the time to the end; for `burst` and `rate`, from the first to the last
moment at which at least `PLATEAU` of the largest number of requests were being answered (first token in, last one not
yet); for `single`, everything. *Goodput*: requests within both limits a second, over the whole run; for `rate` over the
time in which requests came, since the drain at the end is not load. *Drift*: mean TPOT of requests that ended in the
last third of the window over that of the first third.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from load_client import Record
from workload import Workload

PLATEAU = 0.9
RAMP_SHARE = 0.25


@dataclass(frozen=True)
class Slo:
    ttft_s: float = 2.0
    tpot_s: float = 0.025


@dataclass(frozen=True)
class Summary:
    """nan where there was nothing to take a figure from."""

    finished: int
    failed: int
    output_tok_s: float
    window_s: tuple[float, float]
    all_tok_s: float
    """All tokens over all time, ramps included."""
    ttft_mean_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    tpot_drift: float
    goodput_req_s: float
    within_slo: float
    """Share of the requests that were answered or failed."""
    most_answering: int
    """Largest number of requests that were being answered at a time."""
    first_error: str | None


def ttft(record: Record) -> float:
    return record.events[0][0] - record.start if record.events else math.nan


def tpot(record: Record) -> float:
    if len(record.events) < 2:
        return math.nan
    (first, before), (last, tokens) = record.events[0], record.events[-1]
    return (last - first) / (tokens - before)


def summarize(records: Sequence[Record], workload: Workload, slo: Slo) -> Summary:
    end = max((record.events[-1][0] for record in records if record.events), default=0.0)
    window = find_window(records, workload, end)
    begin = window[0] if workload.kind == "saturated" else 0.0
    done = [record for record in records if record.finished and record.events[-1][0] >= begin]
    failed = [record for record in records if record.error is not None]
    ttfts = [ttft(record) for record in records if record.events and record.events[0][0] >= begin]
    tpots = [value for value in map(tpot, done) if not math.isnan(value)]
    good = [r for r in done if ttft(r) <= slo.ttft_s and (math.isnan(tpot(r)) or tpot(r) <= slo.tpot_s)]
    elapsed = max((r.start for r in records), default=0.0) if workload.kind == "rate" else end - begin
    return Summary(
        finished=len(done),
        failed=len(failed),
        output_tok_s=_ratio(tokens_within(records, *window), window[1] - window[0]),
        window_s=window,
        all_tok_s=_ratio(sum(record.events[-1][1] for record in records if record.events), end),
        ttft_mean_s=_mean(ttfts),
        ttft_p99_s=percentile(ttfts, 0.99),
        tpot_mean_s=_mean(tpots),
        tpot_p99_s=percentile(tpots, 0.99),
        tpot_drift=_drift(done, window),
        goodput_req_s=_ratio(len(good), elapsed),
        within_slo=_ratio(len(good), len(done) + len(failed)),
        most_answering=max((count for _, count in answering(records)), default=0),
        first_error=failed[0].error if failed else None,
    )


def answering(records: Sequence[Record]) -> list[tuple[float, int]]:
    """(time, requests being answered from then on), in order of time."""
    changes = [(record.events[0][0], 1) for record in records if record.events]
    changes += [(record.events[-1][0], -1) for record in records if record.events]
    changes.sort()
    level, levels = 0, []
    for time_, change in changes:
        level += change
        levels.append((time_, level))
    return levels


def find_window(records: Sequence[Record], workload: Workload, end: float) -> tuple[float, float]:
    """See the module's docstring. `end`: time of the last token."""
    if workload.kind == "saturated":
        return min(RAMP_SHARE * workload.seconds, end), end
    levels = answering(records)
    if workload.kind == "single" or not levels:
        return 0.0, end
    plateau = PLATEAU * max(level for _, level in levels)
    high = [i for i, (_, level) in enumerate(levels) if level >= plateau]
    after = min(high[-1] + 1, len(levels) - 1)
    return levels[high[0]][0], levels[after][0]


def tokens_within(records: Sequence[Record], begin: float, end: float) -> int:
    """Tokens that arrived in (begin, end]."""
    total = 0
    for record in records:
        before = 0
        for time_, tokens in record.events:
            if begin < time_ <= end:
                total += tokens - before
            before = tokens
    return total


def _drift(done: Sequence[Record], window: tuple[float, float]) -> float:
    third = (window[1] - window[0]) / 3
    parts: list[list[float]] = [[], [], []]
    for record in done:
        if window[0] <= record.events[-1][0] <= window[1] and third > 0 and not math.isnan(tpot(record)):
            parts[min(2, int((record.events[-1][0] - window[0]) / third))].append(tpot(record))
    return _ratio(_mean(parts[2]), _mean(parts[0]))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _ratio(value: float, by: float) -> float:
    return value / by if by > 0 else math.nan
