"""The router against small HTTP servers that answer as told: what reaches whom, and how failures come out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.router.__main__ import parse
from sglang_adrenaline.router.app import Settings, create_app
from sglang_adrenaline.router.servers import MAX_ROOM, Fleet, Pair, Server
from sglang_adrenaline.router.servers_file import read_servers

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
TIMEOUT_S = 20


@dataclass
class Upstream:
    """A server that records what it gets. `dropped` is set when a client leaves before its answer is complete."""

    answer: Handler
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    dropped: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.paths.append(request.path)
        self.headers.append(dict(request.headers))
        if text:
            self.bodies.append(json.loads(text))
        try:
            return await self.answer(request, self.bodies[-1] if text else {})
        except (asyncio.CancelledError, ConnectionError):
            self.dropped.set()
            raise


async def ok(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    return web.json_response({"text": "hi", "meta_info": {}})


async def hang(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError("nobody waits this long")


def refuse(status: int, message: str) -> Handler:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": message}}, status=status)

    return answer


def stream(*events: dict[str, Any], then: str = "done") -> Handler:
    """Server-sent events, then the end: `done`, `break` (connection lost) or `hang`."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if then == "hang":
            await asyncio.sleep(3600)
        if then == "break":
            await asyncio.sleep(0.2)  # the reset must not overtake the events
            request.transport.abort()
            return response
        await response.write(b"data: [DONE]\n\n")
        return response

    return answer


@asynccontextmanager
async def serve(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@dataclass
class Bench:
    url: str
    prefill: Upstream
    decode: Upstream
    client: aiohttp.ClientSession

    async def post(self, body: Any, path: str = "/generate", **kwargs: Any) -> tuple[int, str]:
        data = body if isinstance(body, str) else json.dumps(body)
        async with self.client.post(self.url + path, data=data, **kwargs) as response:
            return response.status, await response.text()


@asynccontextmanager
async def bench(prefill: Handler = ok, decode: Handler = ok, prefill_url: str | None = None) -> AsyncIterator[Bench]:
    upstreams = Upstream(prefill), Upstream(decode)
    apps = []
    for upstream in upstreams:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", upstream.handle)
        apps.append(app)
    async with serve(apps[0]) as first, serve(apps[1]) as second:
        settings = Settings([Server(prefill_url or first, 8998)], [Server(second)], request_timeout_s=TIMEOUT_S)
        async with serve(create_app(settings)) as url, aiohttp.ClientSession() as client:
            yield Bench(url, *upstreams, client)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), TIMEOUT_S)

    asyncio.run(bounded())


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_generation_body_reaches_both_unchanged_but_for_the_bootstrap_fields(path):
    async def test():
        sent = {
            "text": ["a", "b"],
            "unknown": {"x": 1},
            "sampling_params": {"custom_params": {"adrenaline": {"remote_prefix_len": 3}}},
        }
        async with bench() as b:
            assert (await b.post(sent, path, headers={"Authorization": "Bearer k"}))[0] == 200
            (to_prefill,), (to_decode,) = b.prefill.bodies, b.decode.bodies
            assert {k: to_decode[k] for k in sent} == sent
            assert (to_decode["bootstrap_host"], to_decode["bootstrap_port"]) == ("127.0.0.1", 8998)
            assert 0 <= to_decode["bootstrap_room"] < MAX_ROOM
            assert to_prefill == {**to_decode, "stream": False}
            for upstream in (b.prefill, b.decode):
                assert upstream.paths == [path]
                assert upstream.headers[0]["Authorization"] == "Bearer k"

    run(test)


def test_generation_streamed_events_pass_and_prefill_is_asked_without_stream():
    async def test():
        async with bench(decode=stream({"i": 0}, {"i": 1})) as b:
            status, text = await b.post({"text": "x", "stream": True, "stream_options": {"include_usage": True}})
            assert (status, text) == (200, 'data: {"i": 0}\n\ndata: {"i": 1}\n\ndata: [DONE]\n\n')
            assert b.prefill.bodies[0]["stream"] is False
            assert "stream_options" not in b.prefill.bodies[0]

    run(test)


@pytest.mark.parametrize("streamed", [False, True])
def test_generation_refused_by_decode_gives_its_status_and_text(streamed):
    async def test():
        async with bench(prefill=hang, decode=refuse(400, "remote_prefix_len must be whole")) as b:
            status, text = await b.post({"text": "x", "stream": streamed})
            assert (status, json.loads(text)["error"]["message"]) == (400, "remote_prefix_len must be whole")
            await asyncio.wait_for(b.prefill.dropped.wait(), 5)

    run(test)


@pytest.mark.parametrize("streamed", [False, True])
def test_generation_refused_by_prefill_alone_ends_the_request_on_decode(streamed):
    async def test():
        async with bench(prefill=refuse(503, "out of memory"), decode=hang) as b:
            status, text = await b.post({"text": "x", "stream": streamed})
            assert (status, json.loads(text)["error"]["message"]) == (503, "out of memory")
            await asyncio.wait_for(b.decode.dropped.wait(), 5)

    run(test)


def test_generation_prefill_unreachable_names_the_server():
    async def test():
        async with bench(decode=hang, prefill_url="http://127.0.0.1:9") as b:
            status, text = await b.post({"text": "x"})
            assert status == 502
            assert "prefill server http://127.0.0.1:9 failed" in json.loads(text)["error"]["message"]

    run(test)


def test_generation_prefill_fails_before_the_first_token_ends_the_stream_with_an_error():
    async def test():
        async with bench(prefill=refuse(500, "lost"), decode=stream(then="hang")) as b:
            status, text = await b.post({"text": "x", "stream": True})
            assert status == 200
            event, done = text.split("\n\n")[:2]
            assert "prefill server" in json.loads(event[5:])["error"]["message"]
            assert done == "data: [DONE]"

    run(test)


def test_generation_decode_breaks_off_mid_stream_ends_with_an_error_event():
    async def test():
        async with bench(decode=stream({"i": 0}, then="break")) as b:
            status, text = await b.post({"text": "x", "stream": True})
            first, error, done = text.split("\n\n")[:3]
            assert (status, first, done) == (200, 'data: {"i": 0}', "data: [DONE]")
            assert "decode server" in json.loads(error[5:])["error"]["message"]

    run(test)


@pytest.mark.parametrize("decode", [hang, stream({"i": 0}, then="hang")])
def test_generation_client_leaves_closes_both_servers_requests(decode):
    async def test():
        async with bench(prefill=hang, decode=decode) as b:
            asking = asyncio.create_task(b.post({"text": "x", "stream": True}))
            while not (b.prefill.bodies and b.decode.bodies):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            asking.cancel()
            await asyncio.wait_for(asyncio.gather(b.prefill.dropped.wait(), b.decode.dropped.wait()), 5)

    run(test)


def logprob_answer(name: str, tokens: list[list[Any]]) -> dict[str, Any]:
    return {"text": name, "meta_info": {"input_token_logprobs": tokens, "output_token_logprobs": [[-1, 2, None]]}}


def test_generation_prompt_logprobs_come_from_prefill_for_each_of_a_batch():
    async def test():
        async def prefill(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return web.json_response([logprob_answer("p", [[None, 1, None]]), logprob_answer("p", [[None, 9, None]])])

        async def decode(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            return web.json_response([logprob_answer("d", []), logprob_answer("d", [])])

        async with bench(prefill, decode) as b:
            answers = json.loads((await b.post({"text": ["a", "b"], "return_logprob": True}))[1])
            assert [a["text"] for a in answers] == ["d", "d"]
            assert [a["meta_info"]["input_token_logprobs"] for a in answers] == [[[None, 1, None]], [[None, 9, None]]]

    run(test)


def test_generation_prompt_logprobs_are_put_in_streamed_events():
    async def test():
        async def prefill(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            await asyncio.sleep(0.2)
            return web.json_response(logprob_answer("p", [[None, 1, None]]))

        async with bench(prefill, stream(logprob_answer("d", []), logprob_answer("dd", []))) as b:
            text = (await b.post({"text": "a", "return_logprob": True, "stream": True}))[1]
            events = [json.loads(e[5:]) for e in text.split("\n\n") if e and "[DONE]" not in e]
            assert [e["text"] for e in events] == ["d", "dd"]
            assert all(e["meta_info"]["input_token_logprobs"] == [[None, 1, None]] for e in events)
            assert text.endswith("data: [DONE]\n\n")

    run(test)


@pytest.mark.parametrize(
    ("body", "why"), [("{", "not valid JSON"), ("[1]", "must be a JSON object"), ("", "not valid")]
)
def test_generation_malformed_body_is_refused_without_asking_anyone(body, why):
    async def test():
        async with bench() as b:
            status, text = await b.post(body)
            assert (status, why in json.loads(text)["error"]["message"]) == (400, True)
            assert not b.prefill.paths and not b.decode.paths

    run(test)


def test_health_tells_which_server_is_gone():
    async def test():
        async with bench(prefill_url="http://127.0.0.1:9") as b, b.client.get(b.url + "/health") as response:
            state = await response.json()
            assert response.status == 503
            assert state["servers"].pop("http://127.0.0.1:9") is False
            assert list(state["servers"].values()) == [True]

    run(test)


def test_flush_cache_goes_to_all_and_reports_a_refusal():
    async def test():
        async with bench(prefill=refuse(400, "pinned")) as b:
            status, text = await b.post("", "/flush_cache")
            assert (status, "pinned" in text) == (400, True)
            assert (b.prefill.paths, b.decode.paths) == (["/flush_cache"], ["/flush_cache"])

    run(test)


def test_status_collects_all_servers():
    async def test():
        async with bench() as b, b.client.get(b.url + "/adrenaline/status") as response:
            assert {role: len(answers) for role, answers in (await response.json()).items()} == {
                "prefill": 1,
                "decode": 1,
            }

    run(test)


def test_unknown_path_is_a_404_that_says_so():
    async def test():
        async with bench() as b:
            status, text = await b.post({}, "/v1/embeddings")
            assert (status, "/v1/embeddings" in text) == (404, True)

    run(test)


# ---- several servers ------------------------------------------------------------------------------------------------

DEAD = "http://127.0.0.1:9"


def test_choose_prefers_few_in_flight_and_passes_over_what_is_down():
    first, second = Server("http://a", 1), Server("http://b", 1)
    fleet = Fleet([first, second])

    def chosen() -> set[Server | None]:
        return {fleet.choose("prefill") for _ in range(64)}

    assert chosen() == {first, second}
    with Pair(first, Server("http://d")).busy():
        assert chosen() == {second}
        fleet.suspect(second, "refused")
        assert chosen() == {first}
        fleet.suspect(first, "refused")
        assert chosen() == {second}, "all are down: then the one with fewest requests"
    assert first.in_flight == 0
    assert fleet.choose("decode") is None


def test_replace_keeps_the_state_of_servers_that_stay():
    fleet = Fleet([Server("http://a", 1), Server("http://b", 1)], [Server("http://d")])
    stays, leaves = fleet.prefill
    stays.in_flight = 3
    fleet.replace([Server("http://c", 1), Server("http://a", 1)], [])
    assert stays in fleet.prefill and leaves not in fleet.prefill
    assert [server.url for server in fleet.servers] == ["http://c", "http://a"]


@asynccontextmanager
async def fleet_bench(app_settings: Settings) -> AsyncIterator[Bench]:
    async with serve(create_app(app_settings)) as url, aiohttp.ClientSession() as client:
        yield Bench(url, Upstream(ok), Upstream(ok), client)


@asynccontextmanager
async def upstream(answer: Handler = ok) -> AsyncIterator[tuple[str, Upstream]]:
    server = Upstream(answer)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    async with serve(app) as url:
        yield url, server


@pytest.mark.parametrize("dead_role", ["prefill", "decode"])
def test_generation_goes_to_another_server_if_one_takes_no_connection(dead_role):
    async def test():
        async with upstream() as (prefill_url, prefill), upstream() as (decode_url, decode):
            dead = Server(DEAD, 8998 if dead_role == "prefill" else None)
            prefills, decodes = [Server(prefill_url, 8998)], [Server(decode_url)]
            (prefills if dead_role == "prefill" else decodes).append(dead)
            async with fleet_bench(Settings(prefills, decodes, TIMEOUT_S)) as b:
                for _ in range(12):
                    assert (await b.post({"text": "x"}))[0] == 200
            rooms = [body["bootstrap_room"] for body in decode.bodies]
            assert len(set(rooms)) == len(rooms) >= 12
            assert {body["bootstrap_room"] for body in prefill.bodies} >= set(rooms[-1:])
            assert dead.down

    run(test)


def test_generation_that_breaks_off_is_not_repeated_and_its_server_is_passed_over_until_it_is_healthy():
    async def test():
        healthy = asyncio.Event()

        async def breaks(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            if request.path == "/health":
                return web.Response(status=200 if healthy.is_set() else 503)
            request.transport.abort()
            return web.Response()

        async with (
            upstream(breaks) as (bad_url, bad),
            upstream() as (good_url, good),
            upstream(hang) as (decode, _),
        ):
            prefills = [Server(bad_url, 1), Server(good_url, 2)]
            prefills[1].in_flight = 1  # so that the first request goes to the bad one
            async with fleet_bench(Settings(prefills, [Server(decode)], TIMEOUT_S)) as b:
                status, text = await b.post({"text": "x"})
                assert (status, bad_url in text) == (502, True)
                assert bad.paths.count("/generate") == 1 and not good.paths
                assert prefills[0].down
                healthy.set()
                while prefills[0].down:
                    await asyncio.sleep(0.02)
                assert prefills[0].in_flight == 0

    run(test)


def test_servers_file_servers_join_and_leave_and_a_wrong_file_changes_nothing(tmp_path):
    file = tmp_path / "servers"

    async def test():
        async with upstream() as (first_url, first), upstream() as (second_url, second), upstream() as (decode_url, _):
            file.write_text("# none yet\n")
            settings = Settings(*read_servers(file), TIMEOUT_S, file)
            async with fleet_bench(settings) as b:

                async def until(status: int, upstream: Upstream | None) -> None:
                    """Requests come to this end within some seconds."""
                    while True:
                        asked = len(upstream.paths) if upstream else 0
                        if (await b.post({"text": "x"}))[0] == status and (
                            upstream is None or len(upstream.paths) > asked
                        ):
                            return
                        await asyncio.sleep(0.1)

                await until(503, None)
                file.write_text(f"prefill {first_url} 8998\ndecode {decode_url}  # the only one\n")
                await until(200, first)
                file.write_text(f"prefill {second_url} 8998\ndecode {decode_url}\n")
                await until(200, second)
                asked = len(first.paths)
                file.write_text("prefill nonsense\n")
                await asyncio.sleep(1.5)
                for _ in range(8):
                    assert (await b.post({"text": "x"}))[0] == 200
                assert len(first.paths) == asked

    run(test)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("decode http://a\nprefill http://b", "line 2: expected"),
        ("prefill http://b many", "line 1: 'many' is not a port"),
        ("decode ftp://b", "line 1: 'ftp://b' is not the URL of a server"),
        ("router http://b", "line 1: expected"),
    ],
)
def test_servers_file_mistakes_are_named_with_their_line(tmp_path, text, why):
    (tmp_path / "servers").write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_servers(tmp_path / "servers")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        ([], "at least once each, or --servers-file"),
        (["--prefill", "http://a", "1"], "at least once each"),
        (["--prefill", "http://a", "x", "--decode", "http://b"], "--prefill: 'x' is not a port"),
        (["--servers-file", "/no/such/file"], "cannot be read"),
        (["--servers-file", "/no/such/file", "--decode", "http://b"], "not both"),
    ],
)
def test_command_line_mistakes_are_one_line(argv, why):
    with pytest.raises(ConfigError, match=why):
        parse(argv)


def test_file_limit_is_raised_as_far_as_it_may():
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (256, 4096)); "
        "from sglang_adrenaline.router.__main__ import raise_file_limit as f; f(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "(4096, 4096)", run
