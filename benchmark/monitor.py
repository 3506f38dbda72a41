"""Watches servers and GPUs while a workload runs: KV tokens in use, running requests, GPU memory. A thread of its own.

Of our servers, the status pages as well, as a timeline.

Servers are asked for `/v1/loads`, which SGLang answers from a snapshot without disturbing its scheduler; GPUs through
NVML where its Python binding is there. What cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from servers import get_json
from timeline import Sample, sample

INTERVAL_S = 0.5
TIMEOUT_S = 2.0


@dataclass
class ServerUse:
    """Peaks of one server: KV tokens and requests."""

    most_tokens: int = 0
    pool_tokens: int = 0
    most_running: int = 0
    samples: int = 0

    def add(self, load: Mapping[str, Any]) -> None:
        self.most_tokens = max(self.most_tokens, int(load["num_used_tokens"]))
        self.pool_tokens = int(load["max_total_num_tokens"])
        self.most_running = max(self.most_running, int(load["num_running_reqs"]))
        self.samples += 1


@dataclass
class GpuUse:
    """Memory in MiB; busy shares as NVML counts them: percent of time in which a kernel ran, or memory was accessed."""

    most_memory_mib: int = 0
    compute_busy: list[int] = field(default_factory=list)
    memory_busy: list[int] = field(default_factory=list)


class Monitor:
    """A context manager; `servers`, `gpus` and `timeline` may be read after it."""

    def __init__(self, urls: Mapping[str, str], *, ours: bool) -> None:
        """ours: `urls` has `decode` and `prefill`, which have status pages."""
        self.servers = {name: ServerUse() for name in urls}
        self.gpus: dict[int, GpuUse] = {}
        self.timeline: list[Sample] = []
        self._urls = dict(urls)
        self._ours = ours
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_S * (len(self._urls) + 1) + 5)

    def _run(self) -> None:
        nvml = _nvml()
        began = time.monotonic()
        while not self._stop.wait(INTERVAL_S):
            if self._ours:
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                    decode, prefill = (self._status(name) for name in ("decode", "prefill"))
                    self.timeline.append(sample(time.monotonic() - began, decode, prefill))
            for name, url in self._urls.items():
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError, IndexError):
                    self.servers[name].add(get_json(f"{url}/v1/loads?include=core", TIMEOUT_S)["loads"][0])
            if nvml is not None:
                with contextlib.suppress(Exception):  # NVML has errors of its own; figures are not worth a run
                    self._read_gpus(nvml)

    def _status(self, name: str) -> dict[str, Any]:
        return dict(get_json(f"{self._urls[name]}/adrenaline/status", TIMEOUT_S))

    def _read_gpus(self, nvml: Any) -> None:
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            use = self.gpus.setdefault(index, GpuUse())
            use.most_memory_mib = max(use.most_memory_mib, nvml.nvmlDeviceGetMemoryInfo(handle).used >> 20)
            busy = nvml.nvmlDeviceGetUtilizationRates(handle)
            use.compute_busy.append(busy.gpu)
            use.memory_busy.append(busy.memory)


def _nvml() -> Any:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml
