"""Server groups on GPUs, for tests and benchmarks: the stock deployments and ours, with equal arguments.

Built from the end-to-end tests' harness, whose processes die with their starter and log to files. Two GPUs serve one
role each; one GPU serves both. Stock servers load our plugin only for the transfer backend `local`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "e2e"))

import servers
from servers import HOST, Group, Server, free_ports

GPU_ARGS = (
    *("--attention-backend", "flashinfer"),
    *("--cuda-graph-backend-prefill", "disabled"),
    *("--grammar-backend", "none"),
    *("--dtype", "bfloat16"),
    *("--random-seed", "0"),
)
STOCK_ENV = {"SGLANG_PLUGINS": "adrenaline"}
LOCAL_TRANSFER_ENV = {"SGLANG_ADRENALINE_TRANSFER": "local"}


@dataclass(frozen=True)
class Gpus:
    """Which GPUs the two sides take: `size` each (TP), from `first` and `second` on; equal on a machine of one GPU."""

    first: int
    second: int
    size: int = 1

    @staticmethod
    def of(count: int, size: int = 1) -> Gpus:
        """`count`: GPUs of the machine. Raises ValueError if one side does not fit."""
        if count < size:
            raise ValueError(f"TP {size} needs {size} GPUs, there are {count}")
        return Gpus(0, size if count >= 2 * size else 0, size)

    @property
    def shared(self) -> bool:
        return self.first == self.second

    def args(self, side: int) -> list[str]:
        tp = ["--tp-size", str(self.size)] if self.size > 1 else []
        return ["--base-gpu-id", str((self.first, self.second)[side]), *tp]


@functools.cache
def stock_transfer() -> str:
    """`nixl` where it is installed, else our `local`."""
    return "nixl" if importlib.util.find_spec("nixl") is not None else "local"


def without_strict_checks(group: Group) -> Group:
    """SGLang's strict memory checks cost time in every loop; they belong to tests."""
    for server in group.servers.values():
        server.env = {key: value for key, value in server.env.items() if key not in servers.STRICT_ENV}
    return group


def stock_server(name: str, model: Path | str, logs: Path, args: Sequence[str], transfer: str = "") -> Server:
    """An unmodified server, not started yet."""
    env = STOCK_ENV | (LOCAL_TRANSFER_ENV if transfer == "local" else {})
    return servers.sglang_server(name, "sglang.launch_server", model, logs, args, env)


def stock_pd(model: Path | str, logs: Path, *, args: Sequence[str], gpus: Gpus, transfer: str | None = None) -> Group:
    """Stock prefill and decode servers behind our router, which adds nothing that stock servers do not know."""
    transfer = transfer or stock_transfer()
    bootstrap_port = free_ports(1)[0]
    common = [*args, "--disaggregation-transfer-backend", transfer]
    common += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    sides = [
        stock_server(f"stock-{role}", model, logs, [*common, *gpus.args(side), "--disaggregation-mode", role], transfer)
        for side, role in enumerate(("prefill", "decode"))
    ]
    router = router_server("stock-router", sides[0], bootstrap_port, sides[1], logs)
    return Group({"prefill": sides[0], "decode": sides[1], "router": router}, front="router")


def add_prefill(group: Group, name: str) -> None:
    """Another prefill server like the one of `adrenaline`, known to the group's router; before they are started."""
    first = group.servers["prefill"]
    port, bootstrap_port = free_ports(1)[0], free_ports(1, also_free=1000)[0]
    command = list(first.command)
    for flag, value in (("--port", port), ("--disaggregation-bootstrap-port", bootstrap_port)):
        command[command.index(flag) + 1] = str(value)
    log = first.log.with_name(f"{name}.log")
    added = dataclasses.replace(first, name=name, command=command, port=port, log=log)
    group.servers["router"].command += ["--prefill", added.url, str(bootstrap_port)]
    group.servers[name] = added


def router_server(name: str, prefill: Server, bootstrap_port: int, decode: Server, logs: Path) -> Server:
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "sglang_adrenaline.router", "--host", HOST, "--port", str(port)]
    command += ["--prefill", prefill.url, str(bootstrap_port), "--decode", decode.url]
    return Server(name, command, port, logs / f"{name}.log", ready_path="/health")


def adrenaline(
    model: Path | str, logs: Path, *, args: Sequence[str], gpus: Gpus, adrenaline_args: Sequence[str] = ()
) -> Group:
    """Our servers and router, each a process group of its own, so that each can be killed by itself."""
    return servers.adrenaline(
        model,
        logs,
        args=args,
        prefill_args=gpus.args(0),
        decode_args=gpus.args(1),
        adrenaline_args=adrenaline_args,
    )
