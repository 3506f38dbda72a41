"""The systems that are compared, as server groups on the same GPUs: stock DP2, stock PD, Adrenaline.

Named on the command line as `dp2`, `pd`, `pd:nixl`, `pd:local`, `pd:mooncake`, `adrenaline:0.7`, `adrenaline:0.7:nixl`
(offload ratio or `auto`, then transfer backend), `adrenaline:0.7:sms=48` (SMs that are the executor's alone).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "e2e"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "gpu"))

import gpu_servers
import servers
from gpu_servers import Gpus, without_strict_checks
from servers import Group

TRANSFERS = ("nixl", "local", "mooncake")


@dataclass(frozen=True)
class System:
    """`text` is how it was named; ratio None: a stock system."""

    text: str
    kind: str
    transfer: str | None = None
    ratio: float | Literal["auto"] | None = None
    executor_sms: int | None = None

    @staticmethod
    def parse(text: str) -> System:
        """Raises ValueError."""
        kind, *rest = text.split(":")
        transfer = rest.pop() if rest and rest[-1] in TRANSFERS else None
        sms = rest.pop().removeprefix("sms=") if rest and rest[-1].startswith("sms=") else None
        try:
            if kind == "adrenaline" and len(rest) == 1:
                ratio: float | Literal["auto"] = "auto" if rest[0] == "auto" else float(rest[0])
                if ratio == "auto" or 0 <= ratio <= 1:
                    return System(text, kind, transfer, ratio, None if sms is None else int(sms))
            if sms is not None:
                raise ValueError
            if kind == "dp2" and not rest and transfer is None:
                return System(text, kind)
            if kind == "pd" and not rest:
                return System(text, kind, transfer)
        except ValueError:
            pass
        raise ValueError(f"{text!r} is none of dp2, pd[:TRANSFER], adrenaline:RATIO|auto[:sms=N][:TRANSFER]")


@dataclass
class Deployment:
    """groups: what to start; urls: where clients send to, in turn; watched: each server's own address by name."""

    groups: list[Group]
    urls: list[str]
    watched: dict[str, str]
    decode: Group | None = None
    """The group with our status page, if it is ours."""

    def start(self, timeout_s: float) -> None:
        """Start all at once and wait until all serve. On failure stops them and raises ServerError with a log's end."""
        merged = {f"{i}-{name}": server for i, g in enumerate(self.groups) for name, server in g.servers.items()}
        Group(merged, front="").start(timeout_s)

    def stop(self) -> None:
        for group in self.groups:
            for server in group.servers.values():
                server.terminate()
        for group in self.groups:
            group.stop()


def deploy(system: System, model: str, logs: Path, gpus: Gpus, args: Sequence[str]) -> Deployment:
    """Not started yet. `args` go to every server."""
    logs.mkdir(parents=True, exist_ok=True)
    common = [*gpu_servers.GPU_ARGS, *args]
    if system.kind == "dp2":
        each = [
            gpu_servers.stock_server(f"stock-{side}", model, logs, [*common, *gpus.args(side)]) for side in range(2)
        ]
        groups = [Group({server.name: server}, front=server.name) for server in each]
        deployment = Deployment(groups, [s.url for s in each], {s.name: s.url for s in each})
    elif system.kind == "pd":
        pair = gpu_servers.stock_pd(model, logs, args=common, gpus=gpus, transfer=system.transfer)
        watched = {name: pair.servers[name].url for name in ("prefill", "decode")}
        deployment = Deployment([pair], [pair.url], watched)
    else:
        flags = [*common, "--adrenaline-offload-ratio", str(system.ratio)]
        if system.executor_sms is not None:
            flags += ["--adrenaline-executor-sms", str(system.executor_sms)]
        if system.transfer is not None:
            flags += ["--disaggregation-transfer-backend", system.transfer]
        flags += ["--prefill-args", shlex.join(gpus.args(0)), "--decode-args", shlex.join(gpus.args(1))]
        ours = servers.launcher(model, logs, args=flags)
        deployment = Deployment([ours], [ours.url], dict(ours.inner_urls), ours)
    for group in deployment.groups:
        without_strict_checks(group)
        for server in group.servers.values():
            server.env["OMP_NUM_THREADS"] = "4"
    return deployment
