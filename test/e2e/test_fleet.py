"""Two prefill and two decode servers of one launch: all of them at work, one dies under load and comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from background import Client, expect_lost
from compare import check_equal, generate_all, with_split
from conftest import Reference, watched
from leftovers import wait_for_nothing_left
from servers import Group, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]

PREFILL, DECODE = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")
ALL = (*PREFILL, *DECODE)
VICTIM, SURVIVOR = "prefill-1", "prefill-0"
DEATH_BOUND_S = 10.0
BACK_BOUND_S = 180.0


@pytest.fixture(scope="module")
def fleet(reference: Reference, tiny_model, logs) -> Iterator[Group]:
    group = servers.launcher(tiny_model, logs, num_prefill=2, num_decode=2)
    with watched(group):
        yield group.start()


def statuses(group: Group) -> dict[str, dict[str, Any]]:
    return {name: group.status(name) for name in ALL}


def offloaded_totals(group: Group) -> dict[str, int]:
    return {name: status["totals"]["offloaded"] for name, status in statuses(group).items()}


def ask(group: Group, reference: Reference) -> dict[str, int]:
    """Compare answers at several splits with stock; how many of these requests each server had offloaded."""
    before = offloaded_totals(group)
    asked = [("length-40", 7), ("length-257", -1), ("length-257", None), ("length-1000", 999), ("shared-120", -1)]
    asked += [("length-8", 0), ("length-2000", -1), ("shared-30", 150)]
    asked *= 3
    payloads = [with_split(reference.cases[name].payload, split) for name, split in asked]
    for (name, split), choices in zip(asked, generate_all(group.url, payloads, concurrency=8), strict=True):
        check_equal(choices[0], reference.single[name][0], label=f"{name}, split {split}")
    wait_for_nothing_left(group, names=ALL)
    return {name: count - before[name] for name, count in offloaded_totals(group).items()}


def used(group: Group, url: str) -> set[str]:
    """The servers that eight requests to the router at `url` go to; none of them fails."""
    before = offloaded_totals(group)
    clients = [Client(url, split=-1, tokens=3, seed=seed) for seed in range(60, 68)]
    for client in clients:
        client.thread.join(60)
        assert client.status == 200, client.text
    wait_for_nothing_left(group, names=ALL)
    return {name for name, count in offloaded_totals(group).items() if count > before[name]}


def test_all_servers_are_used_and_answers_equal_stock(fleet, reference):
    rose = ask(fleet, reference)
    assert all(rose.values()), rose
    assert sum(rose[name] for name in PREFILL) == sum(rose[name] for name in DECODE) >= 18
    for name, status in statuses(fleet).items():
        assert [peer["connected"] for peer in status["peers"]] == [True, True], (name, status["peers"])
        assert all(peer["steps"] > 0 for peer in status["peers"]), (name, status["peers"])
    assert launcher_text(fleet).count("offloaded request: 4 tokens") == 4, "the warm-up has each pair once"


def test_kill_prefill_its_offloaded_requests_end_in_time_and_the_load_moves(fleet, reference):
    before = statuses(fleet)
    offloaded = [Client(fleet.url, split=-1, tokens=1200, seed=seed) for seed in range(20, 28)]
    local = [Client(fleet.url, split=0, tokens=1200, seed=seed) for seed in (30, 31)]
    wait_until(lambda: sum(sum(fleet.status(name)["running"].values()) for name in DECODE) == 10, 60, "all run")
    held = fleet.status(VICTIM)["running"]["offloaded"]
    assert 0 < held < 8
    computing = [Client(fleet.url, split=0, tokens=3, seed=seed, prompt_len=2000) for seed in range(40, 46)]
    os.kill(main_process(fleet, VICTIM), signal.SIGKILL)
    died = time.monotonic()

    # A request of the first moments can still reach the dying process; after that none does.
    wait_until(lambda: "prefill-1  was killed by SIGKILL; restart 1 of 3 in 1 s" in launcher_text(fleet), 10, "noticed")
    moved = [Client(fleet.url, split=split, tokens=3, seed=50 + split) for split in (-1, 0, 60)]
    for client in moved:
        client.thread.join(60)
        assert client.status == 200, client.text
    for client in [*computing, *offloaded, *local]:
        client.thread.join(120)
    lost = [client for client in offloaded if client.status != 200]
    assert len(lost) == held, [client.text[:200] for client in lost]
    expect_lost(lost, died, DEATH_BOUND_S)
    assert [client.status for client in local] == [200, 200], "their KV was on decode already"
    for client in computing:
        assert client.status == 200 or (client.status >= 500 and client.ended - died < DEATH_BOUND_S), client
    print("lost", [round(client.ended - died, 2) for client in lost], "computing", [c.status for c in computing])

    wait_until(lambda: "prefill-1  serves again" in launcher_text(fleet), BACK_BOUND_S, "it is started again")
    print(f"back after {time.monotonic() - died:.1f} s")
    after = statuses(fleet)
    assert {name for name in ALL if after[name]["instance"] != before[name]["instance"]} == {VICTIM}


def test_restarted_prefill_is_used_again_without_a_restart_of_the_others(fleet, reference):
    def reconnected() -> bool:
        return all(peer["connected"] for name in DECODE for peer in fleet.status(name)["peers"])

    wait_until(reconnected, 30, "decode servers are connected to both prefill servers")
    # The router asks servers that were down once a second; on a fast machine all of `ask` is over before that.
    wait_until(lambda: VICTIM in used(fleet, fleet.url), 20, "the router sends it requests")
    rose = ask(fleet, reference)
    assert all(rose.values()), rose


def test_router_by_itself_follows_its_file_of_servers(fleet, logs):
    bootstrap_ports = sorted(int(peer["address"].rpartition(":")[2]) for peer in fleet.status(DECODE[0])["peers"])
    lines = {name: f"decode {fleet.inner_urls[name]}" for name in DECODE}
    for name, port in zip(PREFILL, bootstrap_ports, strict=True):
        lines[name] = f"prefill {fleet.inner_urls[name]} {port}"
    file, port = logs / "servers", servers.free_ports(1)[0]
    command = [sys.executable, "-m", "sglang_adrenaline.router", "--port", str(port), "--servers-file", str(file)]
    nobody = "decode http://127.0.0.1:1"
    file.write_text("\n".join([lines["prefill-0"], nobody, lines["decode-0"]]))

    url = f"http://{servers.HOST}:{port}"
    router = servers.Server("router", command, port, logs / "router-by-itself.log")
    with Group({"router": router}, front="router") as group:
        group.start()
        assert used(fleet, url) == {"prefill-0", "decode-0"}
        file.write_text("\n".join(lines.values()))
        wait_until(lambda: used(fleet, url) == set(ALL), 20, "servers that join are used")
        file.write_text("\n".join([lines["prefill-1"], lines["decode-1"]]))
        wait_until(lambda: used(fleet, url) == {"prefill-1", "decode-1"}, 20, "servers that leave are not")


def launcher_text(group: Group) -> str:
    return group.servers["launcher"].log_text()


def main_process(group: Group, name: str) -> int:
    """Process id of one of the launcher's servers, found by the port in its command."""
    port = group.inner_urls[name].rpartition(":")[2]
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                if "sglang_adrenaline.launch_server" in words and words[words.index("--port") + 1] == port:
                    found.append(int(entry.name))
    (pid,) = found
    return pid
