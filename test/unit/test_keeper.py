"""Servers of a deployment that end: when they are started again, and when all is given up. Real, small processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_adrenaline.launcher.keeper import Keeper, Kept
from sglang_adrenaline.launcher.processes import Child, start_child, stop_all
from sglang_adrenaline.launcher.stages import StartFailed, Starting

SERVES = "import time; print('up', flush=True); time.sleep(600)"
ENDS = "import sys; sys.exit('sglang_adrenaline: error: no memory')"


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Fleet:
    """Processes that a Keeper looks after in a thread; each is up at once. `said` is what the user is told."""

    def __init__(self, folder: Path, codes: dict[str, list[str]], max_restarts: int = 3) -> None:
        self.said: list[str] = []
        self.ended_children: list[Child] = []
        self.serving: list[Child] = []
        self.failure: StartFailed | None = None
        self.folder, self._codes, self.children = folder, codes, dict[str, Child]()
        self.fd, self._write_fd = os.pipe()
        self._stop = False
        kept = [self._kept(name) for name in codes]
        keeper = Keeper(kept, self, self._tell, max_restarts=max_restarts, start_timeout_s=20.0)
        self._thread = threading.Thread(target=self._run, args=(keeper,))
        self._thread.start()

    def _kept(self, name: str) -> Kept:
        return Kept(name, name.partition("-")[0], lambda: self._start(name), self._start(name).child)

    def _start(self, name: str) -> Starting:
        code = self._codes[name].pop(0) if len(self._codes[name]) > 1 else self._codes[name][0]
        child = start_child(name, ["-c", code], self.folder / f"{name}.log", {})
        self.children[name] = child
        return Starting(child, "", 0, [("up", lambda: child.log_contains("up"))])

    def _tell(self, name: str, text: str) -> None:
        self.said.append(f"{name} {text}")

    def _run(self, keeper: Keeper) -> None:
        try:
            keeper.run(self)
        except StartFailed as failure:
            self.failure = failure

    def came(self) -> bool:
        return self._stop

    def ended(self, child: Child) -> None:
        stop_all([child], grace_s=0.0)
        self.ended_children.append(child)

    def serves(self, child: Child) -> None:
        self.serving.append(child)

    def kill(self, name: str) -> None:
        os.kill(self.children[name].process.pid, signal.SIGKILL)

    def wait_failed(self) -> StartFailed:
        self._thread.join(20)
        assert self.failure is not None, self.said
        return self.failure

    def stop(self) -> None:
        if self._stop:
            return
        self._stop = True
        os.write(self._write_fd, b"s")
        self._thread.join(20)
        assert not self._thread.is_alive()
        stop_all([*self.children.values()], grace_s=0.0)
        os.close(self.fd)
        os.close(self._write_fd)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fleet]]:
    monkeypatch.setattr("sglang_adrenaline.launcher.keeper.FIRST_DELAY_S", 0.02)
    started: list[Fleet] = []

    def start(codes: dict[str, list[str]], **settings: int) -> Fleet:
        started.append(Fleet(tmp_path, codes, **settings))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_keeper_starts_a_killed_server_again(fleet):
    kept = fleet({"prefill-0": [SERVES], "decode-0": [SERVES]})
    first = kept.children["prefill-0"]
    kept.kill("prefill-0")
    wait_until(lambda: len(kept.serving) == 1)
    assert kept.ended_children == [first] and kept.serving[0] is kept.children["prefill-0"]
    assert kept.said[0] == "prefill-0 was killed by SIGKILL; restart 1 of 3 in 0.02 s"
    assert "serves again" in kept.said[-1]
    assert kept.children["decode-0"].is_alive() and kept.failure is None


def test_keeper_gives_up_a_server_that_keeps_ending_while_another_of_its_role_is_left(fleet):
    kept = fleet({"prefill-0": [ENDS], "prefill-1": [SERVES], "decode-0": [SERVES]}, max_restarts=2)
    wait_until(lambda: any("given up" in line for line in kept.said))
    assert kept.said[-1] == "prefill-0 no memory; given up after 2 restarts (prefill servers left: 1)"
    assert len(kept.ended_children) == 3
    kept.kill("prefill-1")
    wait_until(lambda: any(line.startswith("prefill-1 serves again") for line in kept.said))
    assert kept.failure is None


def test_keeper_a_server_that_served_for_long_has_its_tries_anew(fleet, monkeypatch):
    monkeypatch.setattr("sglang_adrenaline.launcher.keeper.STEADY_S", 0.0)
    kept = fleet({"prefill-0": [SERVES], "decode-0": [SERVES]}, max_restarts=1)
    for count in (1, 2, 3):
        kept.kill("prefill-0")
        wait_until(lambda count=count: len(kept.serving) == count)
    assert kept.failure is None and sum("restart 1 of 1" in line for line in kept.said) == 3


def test_keeper_ends_when_the_last_server_of_a_role_is_given_up(fleet):
    kept = fleet({"prefill-0": [SERVES], "decode-0": [ENDS]}, max_restarts=0)
    failure = kept.wait_failed()
    assert str(failure) == "decode-0 no memory" and failure.child is kept.children["decode-0"]


def test_keeper_stops_on_request_while_a_restart_is_due(fleet, monkeypatch):
    monkeypatch.setattr("sglang_adrenaline.launcher.keeper.FIRST_DELAY_S", 60.0)
    kept = fleet({"prefill-0": [SERVES, ENDS], "decode-0": [SERVES]})
    kept.kill("prefill-0")
    wait_until(lambda: kept.said)
    kept.stop()
    assert kept.failure is None and len(kept.said) == 1
