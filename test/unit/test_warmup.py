"""The launcher's warm-up against small HTTP servers: each pair is asked once, and what goes wrong is said."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sglang_adrenaline.launcher import warmup
from sglang_adrenaline.launcher.stages import StartFailed
from sglang_adrenaline.router.servers import Server


class Answers(ThreadingHTTPServer):
    """Answers as a server does. `local_ports`: where it does not offload to; `fails`: status of all its answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.totals = Counter(local=0, offloaded=0)
        self.asked: list[dict[str, Any]] = []
        self.local_ports: set[int] = set()
        self.fails: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        peers = [{"address": f"127.0.0.1:{port}", "refused": "no memory"} for port in self.server.local_ports]
        self._answer(200, {"totals": self.server.totals, "peers": peers})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.fails is not None:
            self._answer(self.server.fails, {"error": "out of memory"})
            return
        split = body["sampling_params"]["custom_params"]["adrenaline"]["remote_prefix_len"]
        kind = "offloaded" if split and body.get("bootstrap_port") not in self.server.local_ports else "local"
        self.server.totals[kind] += 1
        self._answer(200, {"meta_info": {"completion_tokens": 4}})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class Deployment:
    def __init__(self, prefill: list[Answers], decode: list[Answers]) -> None:
        self.prefill, self.decode = prefill, decode
        self.said: list[str] = []

    def warm_up(self) -> None:
        """The first decode server stands for the router, too: it counts what comes by way of it."""
        prefill = [Server(one.url, 1 + index) for index, one in enumerate(self.prefill)]
        decode = [Server(one.url) for one in self.decode]
        warmup.run(self.decode[0].url, prefill, decode, None, lambda name, text: self.said.append(text))


@contextmanager
def deployment(num_prefill: int, num_decode: int) -> Iterator[Deployment]:
    with ExitStack() as stack:
        servers = []
        for _ in range(num_prefill + num_decode):
            server = stack.enter_context(Answers())
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            servers.append(server)
        yield Deployment(servers[:num_prefill], servers[num_prefill:])


def test_every_pair_offloads_once_after_a_local_request():
    with deployment(2, 3) as one:
        one.warm_up()
        assert [server.totals["offloaded"] for server in one.decode] == [2, 2, 2]
        assert one.decode[0].totals["local"] == 1
        for index, server in enumerate(one.prefill):
            assert [body["bootstrap_port"] for body in server.asked] == [1 + index] * 3
            prompts = [tuple(body["input_ids"]) for body in server.asked]
            assert len({prompt[0] for prompt in prompts}) == 3, "no prompt is in the cache of another"
        rooms = [body["bootstrap_room"] for server in one.decode for body in server.asked if "bootstrap_room" in body]
        assert len(set(rooms)) == 6
        assert len(one.said) == 7 and all("4 tokens in" in line for line in one.said)


def test_a_pair_that_cannot_offload_is_told_and_the_others_suffice():
    with deployment(2, 1) as one:
        one.decode[0].local_ports = {2}
        one.warm_up()
        (line,) = (line for line in one.said if "stayed local" in line)
        assert "no memory" in line and one.prefill[1].url in line


def test_a_decode_server_that_offloads_to_nobody_fails_the_start():
    with deployment(1, 1) as one:
        one.decode[0].local_ports = {1}
        with pytest.raises(StartFailed, match=f"{one.decode[0].url} offloaded none"):
            one.warm_up()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_request_that_fails_fails_the_start_with_the_reason(role):
    with deployment(1, 2) as one:
        getattr(one, role)[-1].fails = 500
        with pytest.raises(StartFailed, match=r"offloaded request from .* failed: HTTP 500: .*out of memory"):
            one.warm_up()
