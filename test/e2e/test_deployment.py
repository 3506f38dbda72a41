"""The launcher with real servers: ready means it works, idle means idle, and nothing is left however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers

pytestmark = pytest.mark.servers

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Family:
    """The processes of one launch: those that carry its mark in their environment, and their sessions' members.

    SGLang's processes overwrite their environment with a title, so the sessions of marked ones are remembered.
    """

    def __init__(self) -> None:
        self.name, self.value = "ADRENALINE_TEST_MARK", f"{os.getpid()}-{time.monotonic_ns()}"
        self._sessions: set[int] = set()

    def members(self) -> dict[int, list[str]]:
        """Living processes: pid -> fields of /proc/PID/stat from the state on."""
        living, marked = {}, set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                    if fields[0] not in "ZX":
                        living[int(entry.name)] = fields
                        if f"{self.name}={self.value}".encode() in (entry / "environ").read_bytes():
                            marked.add(int(entry.name))
        self._sessions |= {int(living[pid][3]) for pid in marked} - {os.getsid(0)}
        return {pid: f for pid, f in living.items() if pid in marked or int(f[3]) in self._sessions}

    def cpu_seconds(self) -> float:
        return sum(int(fields[11]) + int(fields[12]) for fields in self.members().values()) / CLOCK_TICKS


class Launch:
    """The launcher as a user starts it: a child of this test, recognised with all its offspring by its environment."""

    def __init__(self, folder: Path, model: Path, *args: str) -> None:
        self.family = Family()
        self.output = folder / "launcher.out"
        self.logs = folder / "logs"
        router, prefill, decode = servers.free_ports(3)
        self.url, self.decode_url = (f"http://{servers.HOST}:{port}" for port in (router, decode))
        self.shared_memory: set[str] = set()
        ports = ("--port", str(router), "--prefill-port", str(prefill), "--decode-port", str(decode))
        command = [sys.executable, "-m", "sglang_adrenaline.launch_server", "--log-dir", str(self.logs)]
        command += ["--model-path", str(model), *ports, *args]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=os.environ | servers.STRICT_ENV | {self.family.name: self.family.value},
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = servers.START_TIMEOUT_S) -> None:
        servers.wait_until(lambda: text in self.text or self.process.poll() is not None, timeout_s, text)
        assert text in self.text, self.text

    def note_shared_memory(self) -> None:
        """Remember the files of /dev/shm that our processes have mapped or put their number in the name of."""
        for pid in self.family.members():
            self.shared_memory |= {name for name in os.listdir("/dev/shm") if str(pid) in re.split("[-_.]", name)}
            try:
                maps = Path(f"/proc/{pid}/maps").read_text()
            except OSError:
                continue
            self.shared_memory |= set(re.findall(r"/dev/shm/(\S+)", maps))

    def wait_gone(self, timeout_s: float) -> None:
        """All processes of the launch have ended, and so has the shared memory that came with them."""
        servers.wait_until(lambda: not self.family.members(), timeout_s, f"no process left of {self.output}")
        servers.wait_until(lambda: not self.shared_memory & set(os.listdir("/dev/shm")), 10, "no shared memory left")

    def end(self) -> None:
        """Whatever a failed test left."""
        for pid in self.family.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def launches(tmp_path: Path, tiny_model: Path) -> Iterator[Any]:
    started: list[Launch] = []

    def launch(*args: str, model: Path = tiny_model) -> Launch:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Launch(folder, model, *args))
        return started[-1]

    yield launch
    for one in started:
        one.end()


def generate(url: str, remote_prefix_len: Any) -> tuple[int, dict[str, Any]]:
    custom = {"adrenaline": {"remote_prefix_len": remote_prefix_len}}
    sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True, "custom_params": custom}
    return post(f"{url}/generate", {"text": "The prefill server keeps the prompt", "sampling_params": sampling})


@pytest.mark.timeout(900)
def test_launch_serves_idles_and_stops_when_a_child_dies(launches):
    launch = launches(*servers.SMALL_SERVER_ARGS, "--max-restarts", "0")
    launch.wait_for("(OpenAI API under /v1)")
    for stage in ("prefill-0", "decode-0"):
        for text in ("loading the model", "listening on http://", "warm"):
            assert any(stage in line and text in line for line in launch.text.splitlines()), (stage, text)
    for line in ("local request: 4 tokens", "offloaded request: 4 tokens"):
        assert line in launch.text

    (local_status, local), (remote_status, remote) = generate(launch.url, 0), generate(launch.url, -1)
    assert (local_status, remote_status) == (200, 200)
    assert local["output_ids"] == remote["output_ids"]
    status = servers.get_json(f"{launch.decode_url}/adrenaline/status")
    assert (status["local_total"], status["offloaded_total"]) == (2, 2)

    code, refused = generate(launch.url, "all of it")
    assert code == 400
    assert "remote_prefix_len" in json.dumps(refused)

    time.sleep(3)  # let the last request's bookkeeping end
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in launch.family.members()]
    assert sum("sglang::sched" in name for name in names) == 2, names
    before, started = launch.family.cpu_seconds(), time.monotonic()
    time.sleep(15)
    used = (launch.family.cpu_seconds() - before) / (time.monotonic() - started)
    assert used < 0.05, f"idle servers use {used:.1%} of a core"

    launch.note_shared_memory()
    assert launch.shared_memory, "SGLang keeps its load statistics there"
    (scheduler,) = (pid for pid in launch.family.members() if _is_scheduler_of(pid, launch))
    os.kill(scheduler, signal.SIGKILL)
    assert launch.process.wait(60) == 1
    last = launch.text.splitlines()[-1]
    assert last.startswith("sglang_adrenaline: error: decode-0 ")
    assert f"--- end of {launch.logs / 'decode-0.log'}" in launch.text
    launch.wait_gone(20)


def _is_scheduler_of(pid: int, launch: Launch) -> bool:
    """Whether `pid` is the decode server's scheduler (its title, and its parent's arguments, say so)."""
    try:
        if "sglang::sched" not in Path(f"/proc/{pid}/comm").read_text():
            return False
        parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
        return b"--disaggregation-mode\0decode" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.timeout(300)
def test_launch_interrupted_while_loading_leaves_nothing(launches):
    launch = launches(*servers.SMALL_SERVER_ARGS)
    launch.wait_for("loading the model")
    launch.note_shared_memory()
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.wait(30) == 0
    assert "on request" in launch.text.splitlines()[-1]
    launch.wait_gone(10)


@pytest.mark.timeout(300)
def test_launch_killed_hard_leaves_nothing(launches):
    launch = launches(*servers.SMALL_SERVER_ARGS)
    launch.wait_for("loading the model")
    launch.note_shared_memory()
    launch.process.kill()
    launch.process.wait(10)
    launch.wait_gone(20)


@pytest.mark.timeout(300)
def test_launch_unsupported_model_is_one_line_before_loading(launches, tmp_path):
    config = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "sliding_window": 64,
    } | dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 64)
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    launch = launches("--skip-tokenizer-init", model=tmp_path)
    assert launch.process.wait(200) == 1
    last = launch.text.splitlines()[-1]
    assert last.startswith("sglang_adrenaline: error: ")
    assert "sliding-window" in last
    assert "Traceback" not in launch.text and "loading the model" not in launch.text
    launch.wait_gone(20)
