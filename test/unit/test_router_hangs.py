"""The router before servers that are stopped, so that their connections stand and nothing answers, and go on later."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from test_router import TIMEOUT_S, Bench, fleet_bench, hang, run, upstream

from sglang_adrenaline.router import app, servers
from sglang_adrenaline.router.app import Settings
from sglang_adrenaline.router.servers import Server

ASK_S, ALIVE_TIMEOUT_S, RETURN_TIMEOUT_S = 0.1, 1.0, 2.0
NOTICED_S = servers.MISSES * (ASK_S + ALIVE_TIMEOUT_S) + 2.0
"""The processes of these tests share a machine with others."""


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(servers, "ASK_S", ASK_S)
    monkeypatch.setattr(app, "ALIVE_TIMEOUT_S", ALIVE_TIMEOUT_S)
    monkeypatch.setattr(app, "RETURN_TIMEOUT_S", RETURN_TIMEOUT_S)


class Process:
    """A stand-in server in a process of its own, which `stop` and `go_on` stop and let go on."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(Path(__file__).with_name("stand_in_server.py")), str(port)]
        self.process = subprocess.Popen(command)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def ready(self) -> Process:
        async with aiohttp.ClientSession() as client:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with client.get(self.url + "/health") as answer:
                        if answer.status == 200:
                            return self
                await asyncio.sleep(0.05)


@pytest.fixture
def processes() -> Iterator[Callable[[], Process]]:
    started: list[Process] = []

    def start() -> Process:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        started.append(Process(port))
        return started[-1]

    yield start
    for process in started:
        process.process.kill()
        process.process.wait(10)


def streamed(tokens: int) -> dict[str, Any]:
    return {"text": "x", "stream": True, "sampling_params": {"max_new_tokens": tokens}}


async def soon(condition: Callable[[], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def under_way(b: Bench, body: dict[str, Any], server: Server) -> AsyncIterator[asyncio.Task]:
    """A request that `server` has got."""
    asking = asyncio.create_task(b.post(body))
    await soon(lambda: server.in_flight == 1, 5)
    await asyncio.sleep(0.3)
    yield asking
    assert asking.done()


def test_stopped_decode_ends_its_stream_with_an_error_is_passed_over_and_comes_back(processes):
    async def test():
        first, second = await processes().ready(), await processes().ready()
        async with upstream() as (prefill, _):
            hung, other = Server(first.url), Server(second.url)
            other.in_flight = 1  # so that the first request goes to the other one
            async with fleet_bench(Settings([Server(prefill, 1)], [hung, other], TIMEOUT_S)) as b:
                async with under_way(b, streamed(10**6), hung) as asking:
                    first.stop()
                    stopped = time.monotonic()
                    status, text = await asyncio.wait_for(asking, NOTICED_S)
                event, done = text.split("\n\n")[-3:-1]
                error = json.loads(event[5:])["error"]
                assert (status, error["code"], done) == (200, 503, "data: [DONE]")
                assert f"decode server {first.url} failed: it does not answer any more" in error["message"]
                assert hung.down and hung.in_flight == 0
                print(f"noticed after {time.monotonic() - stopped:.2f} s")
                for _ in range(8):
                    assert (await b.post(streamed(2)))[0] == 200
                first.go_on()
                await soon(lambda: not hung.down, RETURN_TIMEOUT_S + servers.PROBE_S + 2)
                other.in_flight += 1
                status, text = await b.post(streamed(2))
                assert status == 200 and "error" not in text

    run(test)


def test_stopped_prefill_is_a_503_that_names_it_and_the_next_request_does_not_wait(processes):
    async def test():
        prefill = await processes().ready()

        async def decode(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return await hang(request, body) if request.path == "/generate" else web.Response()

        async with upstream(decode) as (decode_url, decodes):
            hung = Server(prefill.url, 1)
            prefill.stop()  # before any request: its kernel takes connections all the same
            async with fleet_bench(Settings([hung], [Server(decode_url)], TIMEOUT_S)) as b:
                status, text = await asyncio.wait_for(b.post({"text": "x"}), NOTICED_S)
                message = json.loads(text)["error"]["message"]
                assert status == 503 and message.startswith(f"prefill server {prefill.url} failed"), message
                await asyncio.wait_for(decodes.dropped.wait(), 2)
                begun = time.monotonic()
                status, text = await b.post({"text": "x"})
                assert (status, f"no prefill server answers: {prefill.url}" in text) == (503, True)
                assert time.monotonic() - begun < 0.5
                async with b.client.post(b.url + "/flush_cache") as answer:
                    assert answer.status == 502 and time.monotonic() - begun < 1.0
                prefill.go_on()
                await soon(lambda: not hung.down, RETURN_TIMEOUT_S + servers.PROBE_S + 2)

    run(test)


def test_server_that_computes_for_long_is_not_taken_to_hang():
    async def test():
        async def busy(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            if request.path == "/generate":
                await asyncio.sleep(NOTICED_S)
            return web.json_response({"text": "at last", "meta_info": {}})

        async with upstream(busy) as (prefill, asked), upstream(busy) as (decode, _):
            async with fleet_bench(Settings([Server(prefill, 1)], [Server(decode)], TIMEOUT_S)) as b:
                assert (await b.post({"text": "x"}))[0] == 200
            assert asked.paths.count("/model_info") > servers.MISSES
            idle = len(asked.paths)
            await asyncio.sleep(5 * ASK_S)
            assert len(asked.paths) == idle, "nobody waits for it any more"

    run(test)


def test_server_that_left_the_file_is_watched_while_it_has_requests(processes):
    async def test():
        decode = await processes().ready()
        async with upstream() as (prefill, _):
            fleet = servers.Fleet([Server(prefill, 1)], [Server(decode.url)])
            (left,) = fleet.decode
            watching = asyncio.create_task(fleet.notice_hangs(lambda server: asyncio.sleep(0, server is not left)))
            with pytest.raises(servers.HungError):
                async with left.awaited():
                    fleet.replace([], [])
                    await asyncio.sleep(NOTICED_S)
            assert left.hangs
            watching.cancel()

    run(test)
