"""The comparison's results: one table per workload, a JSON that is written after every run, and a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from load_stats import Slo, Summary
from timeline import Sample, draw

HEADER = (
    "system",
    "out tok/s",
    "vs first",
    "TTFT ms",
    "p99",
    "TPOT ms",
    "p99",
    "drift",
    "good req/s",
    "within",
    "done/fail",
    "answering",
    "KV tokens at most",
    "GPU MiB",
    "offl.",
    "wait us/layer",
)


@dataclass
class Run:
    """One workload on one system, or the reason why there is none."""

    system: str
    workload: str
    round: int
    summary: Summary | None = None
    error: str | None = None
    servers: dict[str, dict[str, int]] = field(default_factory=dict)
    gpus: dict[int, dict[str, Any]] = field(default_factory=dict)
    offloaded: int | None = None
    requests: int | None = None
    exposed_wait_us_per_layer: float | None = None
    launch_lag_us: float | None = None
    """Mean of all steps so far: from decode's announcement of a step to the executor's launch."""
    plans_per_step: float | None = None
    decisions: dict[str, int] = field(default_factory=dict)
    """Of ratio auto, by reason."""
    timeline: list[Sample] = field(default_factory=list)
    """Of our servers while the workload ran."""
    left_over: list[str] = field(default_factory=list)
    """What was still held for offloaded requests after all had ended."""


@dataclass
class Report:
    """about: machine, commit, arguments; whatever is needed to do it again."""

    about: dict[str, Any]
    slo: Slo
    runs: list[Run] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Whole or not at all: a reader never sees half a file."""
        runs = [asdict(run) for run in self.runs]
        text = json.dumps({"about": self.about, "slo": asdict(self.slo), "runs": _finite(runs)}, indent=1)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, path)

    def tables(self) -> str:
        """Of several rounds the one with the median output tok/s."""
        parts = []
        for workload in dict.fromkeys(run.workload for run in self.runs):
            runs = [run for run in self.runs if run.workload == workload]
            systems = dict.fromkeys(run.system for run in runs)
            chosen = [median_run(self._of(system, workload)) for system in systems]
            base = chosen[0].summary.output_tok_s if chosen[0].summary else math.nan
            rows = [HEADER, *(_row(run, base) for run in chosen)]
            widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
            lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
            lines += [f"  {run.system}: {run.error}" for run in chosen if run.error]
            lines += [f"  {r.system}: {r.summary.first_error}" for r in chosen if r.summary and r.summary.first_error]
            lines += [f"  {run.system}: LEFT OVER {', '.join(run.left_over)}" for run in runs if run.left_over]
            parts.append("\n".join([f"== {workload}", *lines]))
        return "\n\n".join(parts)

    def plot(self, path: Path) -> None:
        """Output tok/s and mean TPOT of each workload and system as bars. Raises ImportError without matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        workloads = list(dict.fromkeys(run.workload for run in self.runs))
        systems = list(dict.fromkeys(run.system for run in self.runs))
        figure, axes = pyplot.subplots(2, 1, figsize=(max(6, 1.6 * len(workloads) + 3), 8), sharex=True)
        for place, system in enumerate(systems):
            chosen = [median_run(self._of(system, w)) if self._of(system, w) else None for w in workloads]
            summaries = [run.summary if run else None for run in chosen]
            at = [i + (place - (len(systems) - 1) / 2) * 0.8 / len(systems) for i in range(len(workloads))]
            width = 0.8 / len(systems)
            axes[0].bar(at, [s.output_tok_s if s else 0 for s in summaries], width, label=system)
            axes[1].bar(at, [1e3 * s.tpot_mean_s if s else 0 for s in summaries], width, label=system)
        axes[0].set_ylabel("output tokens / s")
        axes[1].set_ylabel("mean TPOT, ms")
        axes[0].legend()
        axes[1].set_xticks(range(len(workloads)), workloads, rotation=20, ha="right")
        figure.suptitle(str(self.about.get("model", "")))
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def plot_timelines(self, folder: Path) -> None:
        """A picture for each run of ours that was watched. Raises ImportError without matplotlib."""
        for number, run in enumerate(self.runs):
            if len(run.timeline) > 2:
                title = f"{run.system}, {run.workload}"
                system = run.system.replace(":", "-").replace("=", "")
                draw(run.timeline, title, folder / f"timeline-{number}-{system}.png")

    def _of(self, system: str, workload: str) -> list[Run]:
        return [run for run in self.runs if run.system == system and run.workload == workload]


def median_run(runs: Sequence[Run]) -> Run:
    """The run with the median output tok/s; the first one if none has any."""
    done = [(run.summary.output_tok_s, i) for i, run in enumerate(runs) if run.summary is not None]
    return runs[sorted(done)[(len(done) - 1) // 2][1]] if done else runs[0]


def _row(run: Run, base: float) -> tuple[str, ...]:
    s = run.summary
    if s is None:
        return (run.system, *["-"] * (len(HEADER) - 1))
    uses = [(name.removeprefix("stock-"), use) for name, use in run.servers.items()]
    tokens = " ".join(f"{name} {use['most_tokens']}/{use['pool_tokens']}" for name, use in uses)
    return (
        run.system,
        _text(s.output_tok_s, 0),
        _text(s.output_tok_s / base if base else math.nan, 2),
        _text(1e3 * s.ttft_mean_s, 0),
        _text(1e3 * s.ttft_p99_s, 0),
        _text(1e3 * s.tpot_mean_s, 2),
        _text(1e3 * s.tpot_p99_s, 2),
        _text(s.tpot_drift, 2),
        _text(s.goodput_req_s, 2),
        _text(100 * s.within_slo, 0) + " %",
        f"{s.finished}/{s.failed}",
        str(s.most_answering),
        tokens or "-",
        " ".join(str(use["most_memory_mib"]) for use in run.gpus.values()) or "-",
        "-" if run.offloaded is None else f"{run.offloaded}/{run.requests}",
        "-" if run.exposed_wait_us_per_layer is None else f"{run.exposed_wait_us_per_layer:.1f}",
    )


def _text(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    """JSON knows no nan: null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
