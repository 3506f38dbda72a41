"""What a starting deployment goes through, one progress line per stage, each wait with a deadline."""

from __future__ import annotations

import http.client
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sglang_adrenaline.launcher.processes import Child
from sglang_adrenaline.launcher.server_entry import LOADING_MARK

POLL_S = 0.3


class StartFailed(Exception):  # noqa: N818 - a verdict on the start, not an error of its own
    """A child ended or a deadline passed. `child` is the one to blame, if there is one."""

    def __init__(self, message: str, child: Child | None = None) -> None:
        super().__init__(message)
        self.child = child


@dataclass
class Progress:
    """Prints `[ 12.3 s] NAME  TEXT` lines; the clock starts with the launcher."""

    started: float = field(default_factory=time.monotonic)

    def __call__(self, name: str, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {name:<10} {text}", file=sys.stderr, flush=True)


@dataclass
class Starting:
    """A child on its way up: the stages it has still to go through."""

    child: Child
    host: str
    port: int
    stages: list[tuple[str, Callable[[], bool]]]


def http_status(host: str, port: int, path: str, timeout_s: float) -> int | None:
    """Status of GET `path`, or None if nothing answers."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def server_stages(child: Child, host: str, port: int, health_timeout_s: float = 30.0) -> Starting:
    """Stages of an SGLang server. `warm`: SGLang's own warm-up is over and its health check generates a token."""
    return Starting(
        child,
        host,
        port,
        [
            ("loading the model", lambda: child.log_contains(LOADING_MARK)),
            (f"listening on http://{host}:{port}", lambda: http_status(host, port, "/model_info", 5.0) is not None),
            ("warm", lambda: http_status(host, port, "/health", health_timeout_s) == 200),
        ],
    )


def router_stages(child: Child, host: str, port: int) -> Starting:
    listening = f"listening on http://{host}:{port}"
    return Starting(child, host, port, [(listening, lambda: http_status(host, port, "/health", 5.0) == 200)])


def wait_for(starting: Iterable[Starting], progress: Progress, deadline: float, stopped: Callable[[], bool]) -> bool:
    """Take all children through their stages. False if `stopped` said so; raises StartFailed."""
    pending = list(starting)
    for one in pending:
        progress(one.child.name, f"starting, log: {one.child.log}")
    while pending:
        for one in list(pending):
            for text in advance(one):
                progress(one.child.name, text)
            if not one.stages:
                pending.remove(one)
        if stopped():
            return False
        for one in pending:
            if not one.child.is_alive():
                raise StartFailed(f"{one.child.name} {one.child.fate()} while starting", one.child)
        if time.monotonic() > deadline:
            late = ", ".join(f"{one.child.name} (not yet {one.stages[0][0]})" for one in pending)
            raise StartFailed(f"not ready within the start-up time-out: {late}", pending[0].child if pending else None)
        time.sleep(POLL_S)
    return True


def advance(one: Starting) -> list[str]:
    """Names of the stages that `one` has passed since the last call."""
    passed = []
    while one.stages and one.stages[0][1]():
        passed.append(one.stages.pop(0)[0])
    return passed
