"""What our servers do from half second to half second while a workload runs: sampled from their status pages, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """Counters of one moment. `at`: seconds since the workload began; `*_total` only grow."""

    at: float
    local: int
    """Running requests whose KV is all on decode."""
    offloaded: int
    used_tokens: int
    """Of decode's pool."""
    remote_tokens: int
    steps_total: int
    exposed_wait_ms_total: float
    executor_wait_ms_total: float
    """Time in which the executor's stream waited for q, the first layer of a step excepted."""
    late_launches_total: int
    prefill_load: float
    prefill_used_tokens: int
    """Of prefill's pool: not free to a new prompt."""
    executor_share: float
    """Of prefill's SMs, left to the executor."""
    decisions: Mapping[str, int]
    """So far, by reason."""
    executor_rate: float
    """The slowest executor's, as share of what its share of SMs promises."""


def sample(at: float, decode: Mapping[str, Any], prefill: Mapping[str, Any]) -> Sample:
    """From the two status pages. Raises KeyError where they are not ours."""
    tokens = decode["tokens"]
    return Sample(
        at=round(at, 3),
        local=decode["running"]["local"],
        offloaded=decode["running"]["offloaded"],
        used_tokens=tokens["pool"] - tokens["free"],
        remote_tokens=tokens["remote"],
        steps_total=decode["steps"],
        exposed_wait_ms_total=decode["exposed_wait_ms_total"],
        executor_wait_ms_total=prefill["executor_wait_ms_total"],
        late_launches_total=prefill["late_launches"],
        prefill_load=prefill["prefill_load"],
        prefill_used_tokens=prefill["tokens"]["pool"] - prefill["tokens"]["free"],
        executor_share=prefill["executor_share"],
        decisions=decode["decisions"],
        executor_rate=min(decode.get("executor_rates", {}).values(), default=1.0),
    )


@dataclass(frozen=True)
class Span:
    """Between two samples. Times are means over its steps that had offloaded rows, in ms."""

    at: float
    step_ms: float
    exposed_wait_ms: float
    executor_wait_ms: float


def spans(samples: Sequence[Sample]) -> list[Span]:
    """Those in which there were steps; a span in which only some steps exchanged shows longer steps than there were."""
    found = []
    for before, after in pairwise(samples):
        steps = after.steps_total - before.steps_total
        if steps > 0:
            found.append(
                Span(
                    after.at,
                    1e3 * (after.at - before.at) / steps,
                    (after.exposed_wait_ms_total - before.exposed_wait_ms_total) / steps,
                    (after.executor_wait_ms_total - before.executor_wait_ms_total) / steps,
                )
            )
    return found


def draw(samples: Sequence[Sample], title: str, path: Path) -> None:
    """Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(9, 10), sharex=True)
    at = [s.at for s in samples]
    axes[0].stackplot(at, [s.local for s in samples], [s.offloaded for s in samples], labels=("local", "offloaded"))
    axes[0].set_ylabel("running requests")
    axes[1].plot(at, [s.used_tokens for s in samples], label="on decode")
    axes[1].plot(at, [s.remote_tokens for s in samples], label="on prefill, offloaded")
    axes[1].plot(at, [s.prefill_used_tokens for s in samples], label="on prefill")
    axes[1].set_ylabel("KV tokens")
    seen = spans(samples)
    for name, label in (
        ("step_ms", "step"),
        ("exposed_wait_ms", "decode waits"),
        ("executor_wait_ms", "executor waits"),
    ):
        axes[2].plot([s.at for s in seen], [getattr(s, name) for s in seen], label=label)
    axes[2].set_ylabel("ms a step")
    axes[3].plot(at, [s.prefill_load for s in samples], label="load of prefill")
    axes[3].plot(at, [s.executor_share for s in samples], label="executor's SMs, share")
    axes[3].set_xlabel("s")
    for axis in axes:
        axis.legend(loc="upper right")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
