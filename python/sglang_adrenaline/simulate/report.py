"""Figures of a simulated run, the table, and the plot."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import numpy as np

from sglang_adrenaline.simulate.trace import Req


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One system's figures. Times in seconds unless named _ms; rates per second."""

    system: str
    gpus: int
    requests: int
    span_s: float
    """From the first arrival to the last token."""
    output_tokens_s: float
    output_tokens_s_gpu: float
    ttft_ms_mean: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_mean: float
    tpot_ms_p99: float
    goodput_s: float | None
    """Requests within both SLOs; None without SLOs."""
    within_slo: float | None
    offloaded: float
    """Share of prompt tokens that stayed remote."""
    exposed_ms_step: float
    retractions: int
    decisions: dict[str, int]
    events: int
    cpu_s: float
    """Processor time of the simulation itself."""


class Samples(msgspec.Struct):
    """Per request, for plots: [n] seconds."""

    ttft: np.ndarray
    tpot: np.ndarray


def summarise(
    system: str,
    requests: list[Req],
    fleet: Any,
    *,
    gpus: int,
    slo_ttft_s: float | None,
    slo_tpot_s: float | None,
    cpu_s: float,
) -> tuple[Result, Samples]:
    """Figures of a finished run. Raises AssertionError if a request was lost: the simulator's own fault."""
    count = len(requests)
    raw = np.fromiter(
        (x for r in requests for x in (r.arrival, r.first, r.finish, r.output, r.prompt, max(r.split, 0))),
        dtype=np.float64,
        count=6 * count,
    ).reshape(count, 6)
    arrival, first, finish, output, prompt, split = raw.T
    assert (first >= arrival).all() and (finish >= first).all(), "a request was lost"
    ttft, tpot = first - arrival, (finish - first) / np.maximum(output - 1, 1)
    span = max(float(finish.max() - arrival.min()), 1e-9)
    good = np.ones(count, dtype=bool)
    if slo_ttft_s is not None:
        good &= ttft <= slo_ttft_s
    if slo_tpot_s is not None:
        good &= tpot <= slo_tpot_s
    has_slo = slo_ttft_s is not None or slo_tpot_s is not None
    several = tpot[output > 1] if (output > 1).any() else tpot
    instances = fleet.instances()
    steps = sum(instance.batch.steps_total for instance in instances)
    decisions: dict[str, int] = {}
    for instance in instances:
        for reason, number in getattr(instance, "reasons", {}).items():
            decisions[reason] = decisions.get(reason, 0) + number
    tokens_s = float(output.sum()) / span
    result = Result(
        system=system,
        gpus=gpus,
        requests=count,
        span_s=span,
        output_tokens_s=tokens_s,
        output_tokens_s_gpu=tokens_s / gpus,
        ttft_ms_mean=float(ttft.mean()) * 1e3,
        ttft_ms_p50=float(np.percentile(ttft, 50)) * 1e3,
        ttft_ms_p99=float(np.percentile(ttft, 99)) * 1e3,
        tpot_ms_mean=float(several.mean()) * 1e3,
        tpot_ms_p99=float(np.percentile(several, 99)) * 1e3,
        goodput_s=float(good.sum()) / span if has_slo else None,
        within_slo=float(good.mean()) if has_slo else None,
        offloaded=float(split.sum() / prompt.sum()),
        exposed_ms_step=sum(instance.batch.exposed_s for instance in instances) / steps * 1e3 if steps else 0.0,
        retractions=sum(instance.retracted for instance in instances),
        decisions=dict(sorted(decisions.items())),
        events=fleet.events.handled,
        cpu_s=cpu_s,
    )
    return result, Samples(ttft, several)


HEADER = (
    "system", "GPUs", "output tok/s", "tok/s/GPU", "TTFT ms mean", "P50", "P99", "TPOT ms mean", "P99",
    "in SLO", "goodput req/s", "offloaded", "exposed ms/step", "retractions", "CPU s",
)  # fmt: skip


def table(results: list[Result]) -> str:
    """A Markdown table, columns aligned."""
    lines = [HEADER] + [_cells(result) for result in results]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _cells(r: Result) -> tuple[str, ...]:
    return (
        r.system, f"{r.gpus}", f"{r.output_tokens_s:,.0f}", f"{r.output_tokens_s_gpu:,.0f}", f"{r.ttft_ms_mean:,.0f}",
        f"{r.ttft_ms_p50:,.0f}", f"{r.ttft_ms_p99:,.0f}", f"{r.tpot_ms_mean:.1f}", f"{r.tpot_ms_p99:.1f}",
        "-" if r.within_slo is None else f"{r.within_slo:.1%}", "-" if r.goodput_s is None else f"{r.goodput_s:,.2f}",
        f"{r.offloaded:.0%}", f"{r.exposed_ms_step:.2f}", f"{r.retractions}", f"{r.cpu_s:.1f}",
    )  # fmt: skip


def plot(results: list[Result], samples: list[Samples], title: str) -> bytes:
    """PNG: throughput, and how TTFT and TPOT are distributed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    bars, ttft, tpot = figure.subplots(1, 3)
    names = [result.system for result in results]
    colours = [f"C{index % 10}" for index in range(len(results))]
    bars.bar(names, [result.output_tokens_s for result in results], color=colours)
    bars.set_ylabel("output tokens/s")
    bars.tick_params(axis="x", rotation=30)
    for axis, label in ((ttft, "TTFT, s"), (tpot, "TPOT, ms")):
        for result, sample, colour in zip(results, samples, colours, strict=True):
            values = np.sort(sample.ttft if axis is ttft else sample.tpot * 1e3)
            points = np.linspace(0, len(values) - 1, min(len(values), 2000)).astype(int)
            axis.plot(values[points], (points + 1) / len(values), label=result.system, color=colour)
        axis.set_xlabel(label)
        axis.set_ylabel("share of requests")
        axis.grid(alpha=0.3)
    ttft.set_xscale("symlog", linthresh=0.1)
    tpot.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
