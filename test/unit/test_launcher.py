"""Launcher without SGLang: the command line, ports, and what is left of processes however they end."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.launcher import groups, options, ports, warmup
from sglang_adrenaline.launcher.model import check_model_path
from sglang_adrenaline.launcher.processes import PARENT_ENV, Child, start_child, stop_all
from sglang_adrenaline.launcher.server_entry import one_line_errors
from sglang_adrenaline.router.servers import Server


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


# ---- command line -------------------------------------------------------------------------------------------------

PORTS = ("--port", "23100", "--prefill-port", "23110", "--decode-port", "23120", "--bootstrap-port", "23130")


def test_parse_servers_get_their_ports_our_flags_and_all_that_is_unknown():
    plan = options.parse(
        [
            *PORTS,
            *("--adrenaline-lanes", "7", "--context-length", "64", "--api-key", "secret"),
            *("--prefill-args", "--chunked-prefill-size 32", "--decode-args=--disable-overlap-schedule"),
        ]
    )
    prefill, decode = plan.servers
    assert (prefill.name, prefill.port, decode.name, decode.port) == ("prefill-0", 23110, "decode-0", 23120)
    assert (plan.port, plan.api_key, plan.model_path) == (23100, "secret", None)
    for server in plan.servers:
        text = " ".join(server.argv)
        for part in (
            f"--disaggregation-mode {server.role}",
            f"--port {server.port}",
            "--disaggregation-bootstrap-port 23130",
            "--adrenaline-lanes 7",
            "--context-length 64",
        ):
            assert part in text
    assert ("--chunked-prefill-size" in prefill.argv, "--chunked-prefill-size" in decode.argv) == (True, False)
    assert ("--disable-overlap-schedule" in prefill.argv, "--disable-overlap-schedule" in decode.argv) == (False, True)


def test_parse_children_understand_what_they_are_given():
    plan = options.parse([*PORTS, "--adrenaline-offload-ratio", "0.3", "--context-length", "64"])
    for server in plan.servers:
        assert options.role_of(list(server.argv)) == server.role
        config, rest = options.split_server_argv(list(server.argv), server.role)
        assert (config.role, config.offload_ratio) == (server.role, 0.3)
        assert "--context-length" in rest and not any("adrenaline" in text for text in rest)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--num-prefill", "0"], "at least 1"),
        (["--max-restarts", "-1"], "--max-restarts must be at least 0, not -1"),
        (["--num-prefill", "101"], r"--decode-port and --prefill-port \+ 100 cannot both have port 30200"),
        (["--decode-port", "65535", "--num-decode", "2"], r"--decode-port \+ 1: 65536 is not a port"),
        (
            ["--num-prefill", "3", "--bootstrap-port", "23130", "--adrenaline-control-port-offset", "2"],
            r"--bootstrap-port \+ 2 and control port .* cannot both have port 23132",
        ),
        (["--adrenaline-offload-ratio", "1.5"], "--adrenaline-offload-ratio must be a number in 0..1"),
        (["--adrenaline-offload-ratio", "much"], "must be a number in 0..1, or auto"),
        (["--port", "0"], "'0' is not a port"),
        (["--port", "70000"], "'70000' is not a port"),
        (["--port", "23110", "--prefill-port", "23110"], "cannot both have port 23110"),
        (["--bootstrap-port", "65000", "--adrenaline-control-port-offset", "1000"], "= 66000 is not in 1..65535"),
        (["--bootstrap-port", "23130", "--port", "24130"], "cannot both have port 24130"),
        (["--startup-timeout", "0"], "--startup-timeout"),
        (["--host", "no such host"], "no such address"),
    ],
)
def test_parse_bad_value_is_refused_by_name(argv, why):
    with pytest.raises(ConfigError, match=why):
        options.parse(argv)


def test_parse_several_servers_get_ports_of_their_own():
    plan = options.parse([*PORTS, "--num-prefill", "2", "--num-decode", "3", "--adrenaline-control-port-offset", "50"])
    assert [(s.name, s.port) for s in plan.servers] == [
        ("prefill-0", 23110),
        ("prefill-1", 23111),
        ("decode-0", 23120),
        ("decode-1", 23121),
        ("decode-2", 23122),
    ]
    assert [s.bootstrap_port for s in plan.of_role("prefill")] == [23130, 23131]
    for server in plan.servers:
        text = " ".join(server.argv)
        assert f"--port {server.port}" in text and f"--disaggregation-bootstrap-port {server.bootstrap_port}" in text


def test_parse_bootstrap_ports_leave_room_for_each_rank():
    tp = ["--tp-size", "2", "--num-prefill", "2"]
    assert [s.bootstrap_port for s in options.parse([*PORTS, *tp]).of_role("prefill")] == [23130, 23132]
    first, second = (s.bootstrap_port for s in options.parse(tp).of_role("prefill"))
    offset = 1000
    assert len({first, second, *(port + offset + rank for port in (first, second) for rank in (0, 1))}) == 6


def test_parse_port_in_use_is_named(listening):
    with pytest.raises(ConfigError, match=f"--decode-port: port {listening} on 127.0.0.1 is in use"):
        options.parse(["--decode-port", str(listening)])


def test_choose_bootstrap_port_passes_over_ports_whose_control_port_is_taken(listening):
    offset = 100
    chosen = ports.choose_bootstrap_port("127.0.0.1", listening - offset, offset, taken={listening - offset + 1})
    assert chosen > listening - offset + 1


def test_choose_inner_port_is_free_and_of_no_outgoing_connection(monkeypatch):
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chosen = [ports.choose_inner_port(set()) for _ in range(20)]
    assert len(set(chosen)) > 10 and all(port < first_outgoing and ports.is_free("127.0.0.1", port) for port in chosen)
    monkeypatch.setattr(ports, "_first_outgoing", lambda: ports._LOWEST + 3)
    monkeypatch.setattr(ports, "is_free", lambda host, port: True)
    taken = {ports._LOWEST, ports._LOWEST + 2}
    assert ports.choose_inner_port(taken) == ports._LOWEST + 1
    with pytest.raises(ConfigError, match="no free port"):
        ports.choose_inner_port({*taken, ports._LOWEST + 1})


@pytest.mark.parametrize(
    ("argv", "shared"),
    [
        ([], False),
        (["--prefill-args", "--base-gpu-id 1"], True),
        (["--prefill-args", "--base-gpu-id 1", "--decode-args", "--base-gpu-id 1"], True),
        (["--tp-size", "2", "--prefill-args", "--base-gpu-id 2", "--decode-args", "--base-gpu-id 0"], False),
        (["--tp-size", "2", "--prefill-args", "--base-gpu-id 1", "--decode-args", "--base-gpu-id 0"], True),
    ],
)
def test_parse_knows_whether_prefill_and_decode_share_a_gpu(monkeypatch, argv, shared):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert options.parse([*PORTS, *argv]).gpus_are_shared is shared
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert options.parse(PORTS).gpus_are_shared
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not options.parse(PORTS).gpus_are_shared


def test_threads_per_rank_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert options.threads_per_rank(1) == cores
    assert options.threads_per_rank(10 * cores) == 1


@pytest.mark.parametrize("flag", ["--tp-size", "--tp", "--tensor-parallel-size"])
def test_parse_tensor_parallel_servers_know_their_ranks(flag):
    assert [server.ranks for server in options.parse([*PORTS, flag, "2"]).servers] == [2, 2]
    assert [server.ranks for server in options.parse([*PORTS]).servers] == [1, 1]


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 1), (2, 2), (3, 2), (1, 4)])
def test_warm_up_rounds_have_every_pair_once_and_no_server_twice(num_prefill, num_decode):
    prefill = [Server(f"http://p{index}", 1) for index in range(num_prefill)]
    decode = [Server(f"http://d{index}") for index in range(num_decode)]
    rounds = list(warmup.rounds(prefill, decode))
    assert len(rounds) == max(num_prefill, num_decode)
    pairs = [(pair.prefill, pair.decode) for pairs in rounds for pair in pairs]
    assert sorted(pairs, key=str) == sorted(itertools.product(prefill, decode), key=str)
    for one in rounds:
        assert len({pair.prefill for pair in one}) == len({pair.decode for pair in one}) == len(one)


@pytest.mark.parametrize(
    ("content", "why"), [(None, "no config.json"), ("{", "cannot be read"), ("[]", "holds no object"), ("{}", None)]
)
def test_check_model_path_folder(tmp_path, content, why):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    if why is None:
        check_model_path(str(tmp_path))
    else:
        with pytest.raises(ConfigError, match=why):
            check_model_path(str(tmp_path))


def test_check_model_path_missing_folder_is_refused_and_remote_name_passes():
    check_model_path("some-org/some-model")
    with pytest.raises(ConfigError, match="no such folder"):
        check_model_path("/no/such/folder")


@pytest.mark.parametrize(
    "argv", [["--num-decode", "0"], ["--model-path", "/no/such/folder"], ["--disaggregation-mode", "both"]]
)
def test_command_bad_input_is_one_line_and_exit_code_1(argv):
    command = [sys.executable, "-m", "sglang_adrenaline.launch_server", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("sglang_adrenaline: error: ") and done.stderr.count("\n") == 1


def test_one_line_errors_whatever_goes_wrong_is_one_line():
    def unknown_flag() -> None:
        argparse.ArgumentParser().parse_args(["--no-such-flag"])

    def unreadable() -> None:
        raise OSError("no such model\nlook here\nand there")

    for act, text in ((unknown_flag, "unrecognized arguments: --no-such-flag"), (unreadable, "no such model")):
        with pytest.raises(ConfigError) as caught, one_line_errors():
            act()
        assert str(caught.value) == text
    with pytest.raises(SystemExit):  # outside, argparse is what it was
        unknown_flag()


def test_command_help_tells_of_sglangs_arguments():
    command = [sys.executable, "-m", "sglang_adrenaline.launch_server", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for part in ("Any argument of SGLang's server", "--adrenaline-offload-ratio", "--prefill-args", "--num-decode"):
        assert part in done.stdout


# ---- processes ----------------------------------------------------------------------------------------------------

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print("pid", child.pid, flush=True)
time.sleep(600)
"""

OBEDIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("up", flush=True)
time.sleep(600)
"""

DIES_WITH_LAUNCHER = """
import time
from sglang_adrenaline.launcher.processes import die_with_launcher
die_with_launcher()
print("up", flush=True)
time.sleep(600)
"""

HOLDS_SHARED_MEMORY = """
import mmap, sys, time
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
time.sleep(600)
"""


def started(tmp_path: Path, code: str, *argv: str, until: str = "") -> Child:
    child = start_child("child", ["-c", textwrap.dedent(code), *argv], tmp_path / "child.log", {})
    wait_until(lambda: not until or child.log_contains(until))
    return child


def shm_file(name: str) -> Path:
    return Path(f"/dev/shm/adrenaline-test-{os.getpid()}-{name}")


def test_stop_all_kills_a_stubborn_child_and_its_children(tmp_path):
    child = started(tmp_path, STUBBORN, until="pid")
    assert not groups.is_empty(child.group)
    assert stop_all([child], grace_s=0.2) == []
    assert groups.is_empty(child.group)
    assert child.fate() == "was killed by SIGKILL"


def test_stop_all_child_that_obeys_is_not_killed(tmp_path):
    child = started(tmp_path, OBEDIENT, until="up")
    assert stop_all([child], grace_s=20.0) == []
    assert child.fate() == "exited with code 0"


def test_stop_all_ends_what_a_dead_child_left_behind(tmp_path):
    child = started(tmp_path, STUBBORN, until="pid")
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait(10)
    assert not groups.is_empty(child.group)
    assert stop_all([child], grace_s=0.0) == []
    assert groups.is_empty(child.group)


def test_remove_shared_memory_takes_files_of_the_dead_only(tmp_path):
    path = shm_file("group")
    child = started(tmp_path, HOLDS_SHARED_MEMORY, str(path), until="mapped")
    try:
        found = groups.shared_memory({child.group})
        assert str(path) in found
        groups.remove_shared_memory(found)
        assert path.exists(), "in use"
        stop_all([child], grace_s=0.0)
        groups.remove_shared_memory(found)
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_shared_memory_finds_files_named_after_a_member(tmp_path):
    child = started(tmp_path, OBEDIENT, until="up")
    path = shm_file(f"{child.process.pid}-x")
    try:
        path.touch()
        assert str(path) in groups.shared_memory({child.group})
    finally:
        path.unlink()
        stop_all([child], grace_s=0.0)
    assert groups.shared_memory({child.group}) == set()


def test_error_line_is_the_last_the_child_said(tmp_path):
    code = (
        "import sys; sys.exit('noise\\nsglang_adrenaline: error: first\\nsglang_adrenaline: error: port 1 is in use')"
    )
    child = started(tmp_path, code)
    child.process.wait(20)
    assert child.error_line() == "port 1 is in use"
    assert child.fate() == "exited with code 1"
    assert child.log_tail(1) == ["sglang_adrenaline: error: port 1 is in use"]


LAUNCHER = """
import sys, time
from pathlib import Path
from sglang_adrenaline.launcher import groups
from sglang_adrenaline.launcher.guard import Guard
from sglang_adrenaline.launcher.processes import start_child
folder, shm = Path(sys.argv[1]), sys.argv[2]
guard = Guard()
(folder / "private").mkdir()
guard.tell("folder", str(folder / "private"))
code = (folder / "child.py").read_text()
child = start_child("child", ["-c", code, shm], folder / "child.log", {})
guard.tell("group", child.group)
while not child.log_contains("mapped"):
    time.sleep(0.02)
for path in groups.shared_memory({child.group}):
    guard.tell("file", path)
if sys.argv[3] == "dismiss":
    guard.dismiss()
if sys.argv[3] == "forget":
    guard.forget_group(child.group)
print(child.group, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("what", ["stay", "dismiss", "forget"])
def test_guard_cleans_up_after_a_killed_launcher_but_leaves_alone_what_is_not_its_own(tmp_path, what):
    path = shm_file(f"guard-{what}")
    (tmp_path / "child.py").write_text(HOLDS_SHARED_MEMORY)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), str(path), what]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        group = int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait(10)
        if what == "stay":
            wait_until(lambda: groups.is_empty(group))
            wait_until(lambda: not path.exists())
        if what != "dismiss":
            wait_until(lambda: not (tmp_path / "private").exists())
        if what != "stay":
            time.sleep(1.0 if what == "dismiss" else 0.0)
            assert not groups.is_empty(group) and path.exists()
    finally:
        launcher.kill()
        groups.kill(group)
        path.unlink(missing_ok=True)


def test_die_with_launcher_ends_a_child_whose_launcher_died(tmp_path):
    outer = f"""
    import sys, time
    from pathlib import Path
    from sglang_adrenaline.launcher.processes import start_child
    child = start_child("inner", ["-c", {DIES_WITH_LAUNCHER!r}], Path(sys.argv[1]), {{}})
    while not child.log_contains("up"):
        time.sleep(0.02)
    print(child.group, flush=True)
    time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(outer), str(tmp_path / "inner.log")]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    group = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait(10)
    wait_until(lambda: groups.is_empty(group))


def test_die_with_launcher_does_nothing_without_one(monkeypatch):
    monkeypatch.delenv(PARENT_ENV, raising=False)
    code = "from sglang_adrenaline.launcher.processes import die_with_launcher; die_with_launcher(); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "alive\n"
