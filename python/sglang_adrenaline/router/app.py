"""The router's HTTP interface: which path goes where.

One event loop, one thread. Servers are not polled while nobody waits for them, so an idle deployment stays idle. One
that cannot be reached is found out by the request that needed it, which goes to another one. One that hangs is found
out by asking it now and then while there are requests. From then on either is asked until it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from sglang_adrenaline.router.relay import Relay, UnreachableError, error_response, forwarded_headers
from sglang_adrenaline.router.servers import Fleet, Pair, Role, Server
from sglang_adrenaline.router.servers_file import follow

GENERATION = ("/generate", "/v1/chat/completions", "/v1/completions")
ONE_SERVER = ("/v1/models", "/v1/models/{name}", "/model_info", "/get_model_info", "/tokenize", "/detokenize")
ONE_SERVER_V1 = ("/v1/tokenize", "/v1/detokenize")
"""Answered by decode alone: all servers would say the same."""
ALL_SERVERS = ("/flush_cache", "/abort_request", "/pause_generation", "/continue_generation", "/health_generate")
ALL_SERVERS_PROFILING = ("/start_profile", "/stop_profile", "/slow_down", "/configure_logging")
"""Sent to every server; the answer is the first failure, else decode's."""

PROBE_TIMEOUT_S = 3.0
ALIVE_TIMEOUT_S = 5.0
"""For a server's front end, which computes nothing, to answer: a batch of long prompts does not hold that up."""
RETURN_TIMEOUT_S = 10.0
"""For a server that was down to show that it is up; on a busy one that takes as long as a step."""
MAX_TRIES = 8
"""How many pairs a request is given to that cannot be connected to."""
MAX_BODY_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Settings:
    prefill: Sequence[Server]
    decode: Sequence[Server]
    request_timeout_s: float
    servers_file: Path | None = None
    """Takes the place of both lists, now and whenever it changes."""


class NoServerError(Exception):
    """There is no server of a role; the text says so."""


class Router:
    """Handlers and what they share. `create_app` wires it to paths."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._fleet = Fleet(settings.prefill, settings.decode)
        self._session: aiohttp.ClientSession | None = None

    async def lifetime(self, app: web.Application) -> Any:
        timeout = aiohttp.ClientTimeout(total=self._settings.request_timeout_s, sock_connect=5.0)
        # No connection is reused: a kept one to a server that was restarted would fail a good request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session:
            self._session = session
            tasks = [
                asyncio.create_task(self._fleet.watch(self._is_back)),
                asyncio.create_task(self._fleet.notice_hangs(partial(self._answers, timeout_s=ALIVE_TIMEOUT_S))),
            ]
            if self._settings.servers_file is not None:
                tasks.append(asyncio.create_task(follow(self._settings.servers_file, self._fleet)))
            yield
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None
        return self._session

    async def generate(self, request: web.Request) -> web.StreamResponse:
        try:
            body = msgspec.json.decode(await request.read())
        except msgspec.DecodeError as error:
            return error_response(400, f"the request body is not valid JSON: {error}")
        if not isinstance(body, dict):
            return error_response(400, "the request body must be a JSON object")
        for tries_left in reversed(range(MAX_TRIES)):
            try:
                pair = Pair(self._choose("prefill"), self._choose("decode"))
                with pair.busy():
                    return await Relay(self.session, pair, request, body, self._fleet.suspect).run()
            except NoServerError as error:
                return error_response(503, str(error))
            except UnreachableError as error:  # it is passed over from now on
                if not tries_left or not self._fleet.others_are_up(error.server):
                    return error_response(502, str(error))
        raise AssertionError("the last try returns")

    def _choose(self, role: Role) -> Server:
        server = self._fleet.choose(role)
        if server is not None:
            return server
        if hanging := [server.url for server in self._fleet.servers if server.role == role]:
            raise NoServerError(f"no {role} server answers: {', '.join(hanging)}")
        raise NoServerError(f"the router has no {role} server; {self._settings.servers_file} lists none")

    async def one_server(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._forward(request, self._choose("decode"), await request.read())
        except NoServerError as error:
            return error_response(503, str(error))

    async def all_servers(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        servers = [*self._fleet.decode, *self._fleet.prefill]
        answers = await asyncio.gather(*(self._forward(request, server, body) for server in servers))
        if not answers:
            return error_response(503, "the router has no servers")
        return next((answer for answer in answers if answer.status >= 400), answers[0])

    async def health(self, request: web.Request) -> web.StreamResponse:
        """200 while a prefill and a decode server answer; 503 with the state of each otherwise. Costs them nothing."""
        prefill, decode = list(self._fleet.prefill), list(self._fleet.decode)
        alive = await asyncio.gather(*(self._is_alive(request, server) for server in [*prefill, *decode]))
        state = {server.url: ok for server, ok in zip([*prefill, *decode], alive, strict=True)}
        ok = all(any(state[server.url] for server in group) for group in (prefill, decode))
        return web.json_response({"healthy": ok, "servers": state}, status=200 if ok else 503)

    async def server_info(self, request: web.Request) -> web.StreamResponse:
        return await self._collect(request, "/server_info")

    async def status(self, request: web.Request) -> web.StreamResponse:
        return await self._collect(request, "/adrenaline/status")

    async def unknown(self, request: web.Request) -> web.StreamResponse:
        return error_response(404, f"the router does not serve {request.path}; ask a prefill or decode server itself")

    async def _forward(self, request: web.Request, server: Server, body: bytes) -> web.Response:
        headers = forwarded_headers(request.headers)
        if content_type := request.headers.get("Content-Type"):
            headers["Content-Type"] = content_type
        try:
            url = server.url + request.path_qs
            async with (
                server.awaited(),
                self.session.request(request.method, url, data=body or None, headers=headers) as answer,
            ):
                kind = answer.headers.get("Content-Type", "text/plain")
                return web.Response(status=answer.status, body=await answer.read(), headers={"Content-Type": kind})
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return error_response(502, f"server {server.url} failed: {error or type(error).__name__}")

    async def _is_alive(self, request: web.Request, server: Server) -> bool:
        headers = forwarded_headers(request.headers)
        return await self._answers(server, PROBE_TIMEOUT_S, headers)

    async def _answers(self, server: Server, timeout_s: float, headers: dict[str, str] | None = None) -> bool:
        """Whether its front end does; a refusal for want of a key is an answer."""
        status = await self._status_of(server.url + "/model_info", timeout_s, headers)
        return status is not None and status < 500

    async def _is_back(self, server: Server) -> bool:
        """Not before SGLang's own warm-up is over; /health needs no key."""
        return await self._status_of(server.url + "/health", RETURN_TIMEOUT_S) == 200

    async def _status_of(self, url: str, timeout_s: float, headers: dict[str, str] | None = None) -> int | None:
        """None if nothing answers in time."""
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self.session.get(url, headers=headers, timeout=timeout) as answer:
                return answer.status
        return None

    async def _collect(self, request: web.Request, path: str) -> web.StreamResponse:
        """{"prefill": [...], "decode": [...]}, each server's URL and what it says, or {"error": ...}."""

        async def ask(server: Server) -> Any:
            try:
                headers = forwarded_headers(request.headers)
                async with server.awaited(), self.session.get(server.url + path, headers=headers) as answer:
                    said = msgspec.json.decode(await answer.read())
                    return {"url": server.url} | said if isinstance(said, dict) else said
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
                return {"url": server.url, "error": str(error) or type(error).__name__}

        prefill, decode = list(self._fleet.prefill), list(self._fleet.decode)
        answers = await asyncio.gather(*map(ask, [*prefill, *decode]))
        return web.json_response({"prefill": answers[: len(prefill)], "decode": answers[len(prefill) :]})


def create_app(settings: Settings) -> web.Application:
    router = Router(settings)
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.cleanup_ctx.append(router.lifetime)
    app.router.add_get("/health", router.health)
    app.router.add_get("/adrenaline/status", router.status)
    for path in ("/server_info", "/get_server_info"):
        app.router.add_get(path, router.server_info)
    for path in GENERATION:
        app.router.add_post(path, router.generate)
    for path in (*ONE_SERVER, *ONE_SERVER_V1):
        app.router.add_route("*", path, router.one_server)
    for path in (*ALL_SERVERS, *ALL_SERVERS_PROFILING):
        app.router.add_route("*", path, router.all_servers)
    app.router.add_route("*", "/{path:.*}", router.unknown)
    return app
