"""The status of a rank as Prometheus metrics, `sglang_adrenaline:*`, on the server's /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Gauge

GAUGES = {
    "running_requests": "Requests that decode works on now, by kind.",
    "tokens": "Tokens by kind: remote (decode: attended elsewhere), pinned and reserved (prefill).",
    "lanes_in_use": "Lanes of the channels that belong to a request.",
    "peers": "Connected peers.",
}
COUNTERS = {
    "requests": "Requests by kind (local, offloaded, failed).",
    "steps": "Decode steps with offloaded rows.",
    "exposed_wait_seconds": "Time that decode steps were blocked on the executor.",
    "nacks": "Offers that were refused, by reason.",
    "decisions": "Requests that were decided by load, by reason.",
}


class StatusMetrics:
    """Publishes numbers by name and kind; created in the scheduler process once metrics are on."""

    def __init__(self, role: str) -> None:
        labels = ("role", "kind")
        self._role = role
        self._gauges = {
            name: Gauge(f"sglang_adrenaline:{name}", text, labels, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._counters = {name: Counter(f"sglang_adrenaline:{name}", text, labels) for name, text in COUNTERS.items()}
        self._seen: dict[tuple[str, str], float] = {}

    def publish(self, gauges: Mapping[str, Mapping[str, float]], counters: Mapping[str, Mapping[str, float]]) -> None:
        """`{name: {kind: value}}`; counters are totals since start."""
        for name, kinds in gauges.items():
            for kind, value in kinds.items():
                self._gauges[name].labels(self._role, kind).set(value)
        for name, kinds in counters.items():
            for kind, total in kinds.items():
                grown = total - self._seen.get((name, kind), 0.0)
                if grown > 0:
                    self._counters[name].labels(self._role, kind).inc(grown)
                    self._seen[name, kind] = total


def publish_status(metrics: StatusMetrics, status: Mapping[str, Any]) -> None:
    """Publish a status object as `GET /adrenaline/status` shows it."""
    gauges = {
        "running_requests": status["running"],
        "tokens": status["tokens"],
        "lanes_in_use": {"": status["lanes_in_use"]},
        "peers": {"": sum(peer["connected"] for peer in status["peers"])},
    }
    counters = {
        "requests": status["totals"],
        "steps": {"": status["steps"]},
        "nacks": status["nacks"],
        "decisions": status.get("decisions", {}),
        "exposed_wait_seconds": {"": status["exposed_wait_ms_total"] / 1e3},
    }
    metrics.publish(gauges, counters)
