"""Starts a deployment, has its processes kept running, and stops all of them together. The launcher's main."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sglang_adrenaline import refusals
from sglang_adrenaline.config import HOST_SERVERS_ENV
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.launcher import gpus, groups, stages, warmup
from sglang_adrenaline.launcher.guard import Guard
from sglang_adrenaline.launcher.keeper import Keeper, Kept
from sglang_adrenaline.launcher.model import check_model_path
from sglang_adrenaline.launcher.options import Plan, ServerPlan, threads_per_rank
from sglang_adrenaline.launcher.ports import choose_inner_port
from sglang_adrenaline.launcher.processes import ERROR_PREFIX, Child, start_child, stop_all
from sglang_adrenaline.launcher.stages import Progress, StartFailed
from sglang_adrenaline.router.servers import make_server

GRACE_S = 2.0
"""For the servers to end by themselves after SIGTERM. Short: SGLang looks at that signal only every 5 s and then drains
for up to 15 s more, and what a kill leaves (shared memory) we remove."""
SHARED_MEMORY_LOOK_S = 5.0
RESTART_HEALTH_TIMEOUT_S = 3.0
"""For a restarted server to answer one look at its health: shorter than at start, as others are watched meanwhile."""
LOG_LINES = 25


class StopRequests:
    """Ctrl-C, SIGTERM and SIGHUP, counted, and readable as a file descriptor."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count = 0
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in self.SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.count += 1
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_fd, b"s")

    def came(self) -> bool:
        return self.count > 0


def launch(plan: Plan) -> int:
    """Run until asked to stop (returns 0) or until something fails (returns 1). Raises ConfigError before starting."""
    refusals.check_sglang_version()
    stop = StopRequests()
    progress = Progress()
    model_path = _model_path(plan, progress)
    log_dir = _log_dir(plan)
    private_dir = Path(tempfile.mkdtemp(prefix="sglang-adrenaline-key-"))  # mkdtemp: for this user only
    try:
        deployment = Deployment(plan, model_path, private_dir, log_dir, stop, progress)
        return deployment.run()
    finally:
        shutil.rmtree(private_dir, ignore_errors=True)


class Deployment:
    """The children of one launch. Owner of all of them."""

    def __init__(
        self,
        plan: Plan,
        model_path: str | None,
        private_dir: Path,
        log_dir: Path,
        stop: StopRequests,
        progress: Progress,
    ) -> None:
        self._plan = plan
        self._model_path = model_path
        self._key_file = _key_file(plan, private_dir)
        self._log_dir = log_dir
        self._stop = stop
        self._progress = progress
        self._children: dict[str, Child] = {}
        """By name, the newest process of each."""
        self._starts: dict[str, int] = {}
        self._inner_ports: dict[str, int] = {}
        """By name of the server, of its newest start."""
        self._guard = Guard()
        self._guard.tell("folder", str(private_dir))
        self._shared_memory: set[str] = set()
        self._next_look = 0.0

    def run(self) -> int:
        try:
            if self._start():
                self._progress("ready", f"{self._url(self._plan.port)} (OpenAI API under /v1), Ctrl-C stops")
                self._watch()
            self._progress("stopping", "on request")
            return 0
        except StartFailed as failure:
            self._report(failure)
            return 1
        finally:
            self._stop_children()

    def _start(self) -> bool:
        """True once warm; False if a stop was asked for. Raises StartFailed."""
        deadline = time.monotonic() + self._plan.startup_timeout
        if self._plan.gpus_are_shared:
            how = (
                "run on it side by side (NVIDIA MPS)"
                if gpus.has_mps()
                else "take turns on it: offloaded layers take milliseconds; with NVIDIA MPS they would run side by side"
            )
            self._progress("GPUs", f"prefill and decode share one and {how}")
        servers = [self._start_server(server) for server in self._plan.servers]
        if not stages.wait_for(servers, self._progress, deadline, self._looked_after):
            return False
        router = self._start_router()
        if not stages.wait_for([router], self._progress, deadline, self._stop.came):
            return False
        prefill = [make_server(self._url(s.port), s.bootstrap_port) for s in self._plan.of_role("prefill")]
        decode = [make_server(self._url(s.port)) for s in self._plan.of_role("decode")]
        warmup.run(self._url(self._plan.port), prefill, decode, self._plan.api_key, self._progress)
        self._note_shared_memory()
        return not self._stop.came()

    def _watch(self) -> None:
        """Until a stop is asked for. Raises StartFailed when a role has lost its last server for good."""
        starts: dict[str, tuple[str, Callable[[], stages.Starting]]] = {
            server.name: (server.role, partial(self._start_server, server, RESTART_HEALTH_TIMEOUT_S))
            for server in self._plan.servers
        }
        starts["router"] = ("router", self._start_router)
        kept = [Kept(name, role, start, self._children[name]) for name, (role, start) in starts.items()]
        plan = self._plan
        keeper = Keeper(
            kept, self, self._progress, max_restarts=plan.max_restarts, start_timeout_s=plan.startup_timeout
        )
        keeper.run(self._stop)

    def ended(self, child: Child) -> None:
        """End what is left of a lost server, before another one takes its ports and its GPU."""
        if stop_all([child], grace_s=0.0):
            raise StartFailed(f"{child.name} could not be ended", child)
        self._guard.forget_group(child.group)
        groups.remove_shared_memory(self._shared_memory)

    def serves(self, child: Child) -> None:
        self._note_shared_memory()

    def _looked_after(self) -> bool:
        """Called now and then while servers start; True if a stop was asked for."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SHARED_MEMORY_LOOK_S
            self._note_shared_memory()
        return self._stop.came()

    def _note_shared_memory(self) -> None:
        """Remember what the servers hold, to remove it once they are gone, however they went."""
        self._shared_memory |= groups.shared_memory({child.group for child in self._children.values()})
        for path in self._shared_memory:
            self._guard.tell("file", path)

    def _start_server(self, server: ServerPlan, health_timeout_s: float = 30.0) -> stages.Starting:
        argv = ["-m", "sglang_adrenaline.launch_server", *server.argv, "--adrenaline-key-file", self._key_file]
        if self._model_path is not None:
            argv += ["--model-path", self._model_path]
        if not any(text.partition("=")[0] == "--nccl-port" for text in argv):
            # What SGLang would choose may be an outgoing connection's by the time it listens.
            port = self._inner_ports[server.name] = choose_inner_port(self._taken_ports())
            argv += ["--nccl-port", str(port)]
        threads = threads_per_rank(sum(each.ranks for each in self._plan.servers))
        defaults = {"OMP_NUM_THREADS": str(threads), HOST_SERVERS_ENV: str(len(self._plan.servers))}
        if self._client_host == self._plan.host:
            defaults["SGLANG_HOST_IP"] = self._plan.host  # KV transfer listens there, too, and nowhere else
        env = {name: value for name, value in defaults.items() if name not in os.environ}
        child = self._start_child(server.name, argv, env)
        return stages.server_stages(child, self._client_host, server.port, health_timeout_s)

    def _taken_ports(self) -> set[int]:
        plan = self._plan
        outer = {port for server in plan.servers for port in (server.port, server.bootstrap_port)}
        return {plan.port, *outer, *self._inner_ports.values()}

    def _start_router(self) -> stages.Starting:
        argv = ["-m", "sglang_adrenaline.router", "--host", self._plan.host, "--port", str(self._plan.port)]
        for server in self._plan.of_role("prefill"):
            argv += ["--prefill", self._url(server.port), str(server.bootstrap_port)]
        for server in self._plan.of_role("decode"):
            argv += ["--decode", self._url(server.port)]
        return stages.router_stages(self._start_child("router", argv, {}), self._client_host, self._plan.port)

    def _start_child(self, name: str, argv: list[str], env: dict[str, str]) -> Child:
        number = self._starts.get(name, 0)
        self._starts[name] = number + 1
        log = f"{name}.{number}.log" if number else f"{name}.log"
        child = start_child(name, argv, self._log_dir / log, env)
        self._guard.tell("group", child.group)
        self._children[name] = child
        return child

    def _report(self, failure: StartFailed) -> None:
        """The end of the log of the child to blame, then the one line that says what happened."""
        child = failure.child
        message = str(failure)
        if child is not None:
            told = child.error_line()
            if told is not None:
                message = f"{child.name}: {told}"
            else:
                print(f"--- end of {child.log}", *child.log_tail(LOG_LINES), "---", sep="\n", file=sys.stderr)
        logs = f" (logs: {self._log_dir})"
        print(f"{ERROR_PREFIX}{message}{logs}", file=sys.stderr, flush=True)

    def _stop_children(self) -> None:
        self._note_shared_memory()
        asked_before = self._stop.count
        # A signal that comes while we are stopping means: now.
        stuck = stop_all([*self._children.values()][::-1], GRACE_S, lambda: self._stop.count > asked_before)
        if stuck:
            self._progress("stopping", f"could not end {', '.join(stuck)}")
            return  # the guard goes on when we are gone
        groups.remove_shared_memory(self._shared_memory)
        self._guard.dismiss()

    @property
    def _client_host(self) -> str:
        """Where this host's own clients reach the servers."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._plan.host, self._plan.host)

    def _url(self, port: int) -> str:
        host = self._client_host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _model_path(plan: Plan, progress: Progress) -> str | None:
    if plan.model_path is not None:
        check_model_path(plan.model_path)
        return plan.model_path
    if plan.names_model_elsewhere:
        return None
    from sglang_adrenaline.demo_model import ensure_demo_model

    return str(ensure_demo_model(progress=lambda text: progress("model", text)))


def _log_dir(plan: Plan) -> Path:
    if plan.log_dir is None:
        return Path(tempfile.mkdtemp(prefix="sglang-adrenaline-"))
    try:
        Path(plan.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {plan.log_dir}: {error.strerror}") from None
    return Path(plan.log_dir)


def _key_file(plan: Plan, private_dir: Path) -> str:
    from sglang_adrenaline import keys

    if plan.key_file is not None:
        keys.load_key_file(plan.key_file)
        return plan.key_file
    path = private_dir / "adrenaline.key"
    keys.create_key_file(path)
    return str(path)
