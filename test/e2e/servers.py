"""Real server groups for tests and benchmarks: stock single, stock PD, and ours, started, watched and ended.

Every server is a process group of its own, dies with the test process, logs to a file that `Group.logs()` and failing
starts show, and gets one core's worth of threads. All waits are bounded. Nothing here imports SGLang or the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
START_TIMEOUT_S = 480.0
STOP_TIMEOUT_S = 5.0
"""What servers get to end by themselves."""
KILL_TIMEOUT_S = 15.0

STOCK_PLUGIN_ENV = {"SGLANG_PLUGINS": "adrenaline", "SGLANG_ADRENALINE_CPU_ATTENTION": "upstream"}
"""Our package gives stock servers the CPU platform, nothing else: attention is SGLang's own."""

LAUNCHER_READY = "(OpenAI API under /v1)"

COMPARED_ENV = ("SGLANG_ADRENALINE_CONFIG", "SGLANG_ADRENALINE_TRANSFER", "SGLANG_ADRENALINE_CPU_ATTENTION")
"""Settings of the caller that no server of ours may inherit."""

STRICT_ENV = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}

SMALL_SERVER_ARGS = (
    *("--dtype", "float32"),
    *("--context-length", "4096"),
    *("--max-total-tokens", "24000"),
    *("--max-running-requests", "16"),
    *("--random-seed", "0"),
)

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ServerError(Exception):
    """A server did not start, answer or stop in time; the text holds the end of its log."""


@dataclass
class Server:
    """One server's command and, while it runs, its process. `port` answers `ready_path` with 200 once it serves."""

    name: str
    command: list[str]
    port: int
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    host: str = HOST
    ready_path: str = "/health"
    ready_line: str | None = None
    """What the log holds once it serves, if `ready_path` cannot tell."""
    cores: Sequence[int] = ()
    """Of this machine, which all its processes may use; none: all."""
    own_ports: Sequence[str] = ()
    """Flags that get a free port at each start. For what would else take one of the kernel's range for outgoing
    connections, let go of it and listen there seconds later, when somebody's connection may have it."""
    process: subprocess.Popen[bytes] | None = None
    _log_begins: int = 0
    """Where in the log, which others may have written to before, its newest start begins."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self.name} is not running"
        return self.process.pid

    def start(self) -> None:
        assert self.process is None, f"{self.name} runs already"
        command = [*self.command]
        for flag in self.own_ports:
            command += [flag, str(free_ports(1)[0])]
        with self.log.open("ab") as log:
            self._log_begins = log.tell()
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_base_env() | self.env,
                start_new_session=True,
                preexec_fn=partial(_become_server, self.cores),
            )

    def wait_ready(self, deadline: float) -> None:
        """`deadline` is a time of `time.monotonic`. Raises ServerError."""
        while True:
            if not self.alive():
                code = self.process.returncode if self.process else None
                raise ServerError(f"{self.name} ended with code {code} while starting\n{self.log_end()}")
            if self._is_ready():
                return
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} did not get ready in time\n{self.log_end()}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        if self.ready_line is not None:
            return self.ready_line in self.log_text()
        return _answers(self.url + self.ready_path)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """`kill -9` of the server and all its children, and wait until the kernel has removed them."""
        if self.process is None:
            return
        _signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait(KILL_TIMEOUT_S)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while members := session_members(self.process.pid):
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name}: processes {members} outlive it")
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process = None

    def terminate(self) -> None:
        if self.alive():
            assert self.process is not None
            self.process.terminate()

    def stop(self, deadline: float | None = None) -> None:
        """SIGTERM; after `deadline` (of `time.monotonic`) SIGKILL to whatever of its session is left."""
        if self.process is None:
            return
        self.terminate()
        left = (deadline or time.monotonic() + STOP_TIMEOUT_S) - time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, left))
        self.kill()

    def log_text(self) -> str:
        """What it has said since its newest start."""
        return self.log.read_bytes()[self._log_begins :].decode(errors="replace")

    def log_end(self, lines: int = 60) -> str:
        text = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return f"--- end of {self.log}\n" + "\n".join(text[-lines:])


@dataclass
class Group:
    """Servers that belong together. Clients send to `url`; a context manager that stops all of them."""

    servers: dict[str, Server]
    front: str
    """Name of the server that clients talk to."""
    inner_urls: dict[str, str] = field(default_factory=dict)
    """Of servers that one of `servers` started by itself."""

    @property
    def url(self) -> str:
        return self.servers[self.front].url

    def start(self, timeout_s: float = START_TIMEOUT_S) -> Group:
        """Start all at once and wait until all serve. On failure stops them and raises ServerError."""
        deadline = time.monotonic() + timeout_s
        try:
            for server in self.servers.values():
                server.start()
            for server in self.servers.values():
                server.wait_ready(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self, name: str) -> None:
        self.servers[name].kill()

    def restart(self, name: str, timeout_s: float = START_TIMEOUT_S) -> None:
        server = self.servers[name]
        server.stop()
        server.start()
        server.wait_ready(time.monotonic() + timeout_s)

    def status(self, name: str = "decode") -> dict[str, Any]:
        """`GET /adrenaline/status` of one of our servers."""
        url = self.inner_urls.get(name) or self.servers[name].url
        return get_json(url + "/adrenaline/status")

    def logs(self, lines: int = 60) -> str:
        return "\n".join(server.log_end(lines) for server in self.servers.values())

    def stop(self) -> None:
        errors = []
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for server in self.servers.values():
            server.terminate()
        for server in self.servers.values():
            try:
                server.stop(deadline)
            except (ServerError, subprocess.TimeoutExpired) as error:
                errors.append(str(error))
        if errors:
            raise ServerError("; ".join(errors))

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def stock_single(
    model: Path | str, logs: Path, *, args: Sequence[str] = SMALL_SERVER_ARGS, name: str = "stock-single"
) -> Group:
    """One aggregated stock server, not started yet."""
    return Group({name: _stock_server(name, model, logs, args, {})}, front=name)


def stock_pd(model: Path | str, logs: Path, *, args: Sequence[str] = SMALL_SERVER_ARGS) -> Group:
    """Stock prefill and decode servers behind the stock router, not started yet."""
    backend, env = stock_transfer()
    bootstrap_port = free_ports(1)[0]
    common = [
        *args,
        "--disaggregation-transfer-backend",
        backend,
        "--disaggregation-bootstrap-port",
        str(bootstrap_port),
    ]
    prefill = _stock_server("stock-prefill", model, logs, [*common, "--disaggregation-mode", "prefill"], env)
    decode = _stock_server("stock-decode", model, logs, [*common, "--disaggregation-mode", "decode"], env)
    router = _stock_router(prefill, bootstrap_port, decode, logs)
    return Group({"prefill": prefill, "decode": decode, "router": router}, front="router")


@cache
def stock_transfer() -> tuple[str, dict[str, str]]:
    """(transfer backend, environment) of the stock PD pair: Mooncake over TCP where it is installed and loads, else
    our `local`, which is all of our plugin that is then active."""
    probe = [sys.executable, "-c", "import mooncake.engine"]
    if subprocess.run(probe, capture_output=True, timeout=60).returncode == 0:
        return "mooncake", {"MC_FORCE_TCP": "1"}
    return "local", {"SGLANG_ADRENALINE_TRANSFER": "local"}


def adrenaline(
    model: Path | str,
    logs: Path,
    *,
    args: Sequence[str] = SMALL_SERVER_ARGS,
    prefill_args: Sequence[str] = (),
    decode_args: Sequence[str] = (),
    adrenaline_args: Sequence[str] = (),
    prefill_host: str = HOST,
    decode_host: str = HOST,
) -> Group:
    """Our prefill server, decode server and router, each started by itself, not started yet.

    `adrenaline_args` are `--adrenaline-*` flags of both servers. The transfer backend is the package's default.
    """
    bootstrap_port = free_ports(1, also_free=1000)[0]
    key_file = logs / "key"
    key_file.write_text(secrets.token_hex(32))
    key_file.chmod(0o600)
    common = [*args, *adrenaline_args, "--adrenaline-key-file", str(key_file)]
    common += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    module = "sglang_adrenaline.launch_server"
    of_prefill = [*common, *prefill_args, "--disaggregation-mode", "prefill"]
    of_decode = [*common, *decode_args, "--disaggregation-mode", "decode"]
    prefill = sglang_server("prefill", module, model, logs, of_prefill, {}, host=prefill_host)
    decode = sglang_server("decode", module, model, logs, of_decode, {}, host=decode_host)
    router = _router(prefill, bootstrap_port, decode, logs)
    return Group({"prefill": prefill, "decode": decode, "router": router}, front="router")


def add_decode(group: Group, name: str, adrenaline_args: Sequence[str]) -> None:
    """One more decode server to a group that `adrenaline` made and that is not started: like the first, with further
    flags, behind a router of its own, `router-{name}`."""
    decode = _like(group.servers["decode"], name)
    decode.command += adrenaline_args
    router = _like(group.servers["router"], f"router-{name}")
    router.command[router.command.index("--decode") + 1] = decode.url
    group.servers |= {name: decode, router.name: router}


def _like(server: Server, name: str) -> Server:
    """Of the same command, at another port."""
    port = free_ports(1)[0]
    command = list(server.command)
    command[command.index("--port") + 1] = str(port)
    return replace(server, name=name, command=command, port=port, log=server.log.with_name(f"{name}.log"))


def launcher(
    model: Path | str | None,
    logs: Path,
    *,
    args: Sequence[str] = SMALL_SERVER_ARGS,
    num_prefill: int = 1,
    num_decode: int = 1,
) -> Group:
    """Everything through our launcher, as one process group, not started yet. `model` None: the demo model."""
    counts = {"prefill": num_prefill, "decode": num_decode}
    ports = {role: free_ports_in_a_row(count) for role, count in counts.items()}
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "sglang_adrenaline.launch_server", "--host", HOST, "--port", str(port)]
    for role, count in counts.items():
        command += [f"--{role}-port", str(ports[role]), f"--num-{role}", str(count)]
    command += ["--log-dir", str(logs / "launcher-logs"), *args]
    if model is not None:
        command += ["--model-path", str(model)]
    # The router listens before the warm-up is over, so its answer is no sign that the launcher is done.
    server = Server("launcher", command, port, logs / "launcher.log", STRICT_ENV, ready_line=LAUNCHER_READY)
    inner = {
        f"{role}-{index}" if counts[role] > 1 else role: f"http://{HOST}:{first + index}"
        for role, first in ports.items()
        for index in range(counts[role])
    }
    return Group({"launcher": server}, front="launcher", inner_urls=inner)


def _stock_server(name: str, model: Path | str, logs: Path, args: Sequence[str], env: dict[str, str]) -> Server:
    return sglang_server(name, "sglang.launch_server", model, logs, args, STOCK_PLUGIN_ENV | env)


def sglang_server(
    name: str,
    module: str,
    model: Path | str,
    logs: Path,
    args: Sequence[str],
    env: dict[str, str],
    *,
    host: str = HOST,
) -> Server:
    """One server of `module`, stock or ours, not started yet; `env` beside SGLang's strict memory checks."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", module, "--model-path", str(model), "--host", host, "--port", str(port), *args]
    log = logs / f"{name}.log"
    return Server(name, command, port, log, STRICT_ENV | env, host=host, own_ports=("--nccl-port",))


def _stock_router(prefill: Server, bootstrap_port: int, decode: Server, logs: Path) -> Server:
    port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation"]
    command += ["--prefill", prefill.url, str(bootstrap_port), "--decode", decode.url]
    command += ["--host", HOST, "--port", str(port), "--prometheus-port", str(metrics_port)]
    command += ["--policy", "round_robin", "--disable-retries", "--disable-circuit-breaker"]
    command += ["--health-check-interval-secs", "2", "--health-failure-threshold", "1"]
    command += ["--health-success-threshold", "1", "--request-timeout-secs", "600"]
    return Server("stock-router", command, port, logs / "stock-router.log", ready_path="/readiness")


def _router(prefill: Server, bootstrap_port: int, decode: Server, logs: Path) -> Server:
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "sglang_adrenaline.router", "--host", HOST, "--port", str(port)]
    command += ["--prefill", prefill.url, str(bootstrap_port), "--decode", decode.url]
    return Server("router", command, port, logs / "router.log", ready_path="/health")


_taken_ports: set[int] = set()


def free_ports(count: int, *, also_free: int | None = None) -> list[int]:
    """Ports nobody listens on, below the kernel's range for outgoing connections, never given twice by this process.

    also_free: an offset at which a port must be free, too.
    """
    chosen: list[int] = []
    for _ in range(1000):
        port = random.SystemRandom().randint(20_000, 31_000)
        needed = {port} if also_free is None else {port, port + also_free}
        if needed & _taken_ports or not all(map(_is_free, needed)):
            continue
        _taken_ports.update(needed)
        chosen.append(port)
        if len(chosen) == count:
            return chosen
    raise ServerError("no free port found")


def free_ports_in_a_row(count: int) -> int:
    """The first of `count` such ports."""
    for _ in range(1000):
        first = free_ports(1)[0]
        others = set(range(first + 1, first + count))
        if not others & _taken_ports and all(map(_is_free, others)):
            _taken_ports.update(others)
            return first
    raise ServerError(f"no {count} free ports in a row found")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True


def _base_env() -> dict[str, str]:
    """The caller's environment, without settings that would change what is compared, and with no way out."""
    env = {key: value for key, value in os.environ.items() if key not in COMPARED_ENV}
    return env | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_HOST_IP": HOST,
        "PYTHONUNBUFFERED": "1",
    }


def _become_server(cores: Sequence[int]) -> None:
    """In the child: it dies with its parent, and keeps to `cores`, if any are given."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if cores:
        os.sched_setaffinity(0, cores)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def session_members(session: int) -> list[int]:
    """PIDs of the session's processes that still run (zombies do not)."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members


def scheduler_pid(server: Server, rank: int) -> int:
    """PID of the scheduler of one tensor-parallel rank; SGLang names its processes."""
    name = f"scheduler_TP{rank}".encode()
    for pid in session_members(server.pid):
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise ServerError(f"{server.name} has no TP rank {rank}\n{server.log_end()}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def get_json(url: str, timeout_s: float = 10) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        return json.load(answer)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until `condition()`; raises ServerError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"not so within {timeout_s} s: {what}")
        time.sleep(0.1)


@contextlib.contextmanager
def log_folder() -> Iterator[Path]:
    """A folder for logs and keys; kept, and named, if the block fails."""
    folder = Path(tempfile.mkdtemp(prefix="adrenaline-test-"))
    try:
        yield folder
    except BaseException:
        print(f"server logs are in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder, ignore_errors=True)
