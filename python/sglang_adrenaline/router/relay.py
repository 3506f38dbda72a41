"""Relays one generation request to a pair of servers: both get the body, the client gets decode's answer.

Runs in the router's event loop. Both upstream requests live exactly as long as the client's: whoever fails or leaves
first, the connections to the others are closed, upon which SGLang aborts the request there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from sglang_adrenaline.router import logprobs
from sglang_adrenaline.router.servers import HungError, Pair, Server

_HOP_HEADERS = frozenset(
    {
        *("connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "expect"),
        *("host", "content-length", "content-type", "accept-encoding", "proxy-authorization", "proxy-authenticate"),
    }
)
"""Headers that belong to one connection, not to the request."""
_LINGER_S = 0.5
"""When prefill fails first, decode gets this long to say why (it checks requests more strictly)."""


class UpstreamError(Exception):
    """A server could not be reached or broke off."""

    def __init__(self, role: str, server: Server, cause: BaseException) -> None:
        if isinstance(cause, aiohttp.ClientPayloadError):
            text = "it closed the connection before its answer was complete"
        else:
            text = str(cause) or type(cause).__name__
        super().__init__(f"{role} server {server.url} failed: {text}")
        self.server = server
        self.status = 503 if isinstance(cause, HungError) else 502


class UnreachableError(UpstreamError):
    """No connection to the server, so nothing has happened there: another one may be asked."""


@dataclass(frozen=True)
class Answer:
    """A complete answer of one server."""

    status: int
    content_type: str
    body: bytes

    def to_response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body, headers={"Content-Type": self.content_type})


def forwarded_headers(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_HEADERS}


def error_response(status: int, message: str) -> web.Response:
    """An error in the OpenAI shape, which SGLang uses too."""
    return web.json_response(_error_body(status, message), status=status)


def _error_body(status: int, message: str) -> dict[str, Any]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"object": "error", "message": message, "error": {"message": message, "type": kind, "code": status}}


class Relay:
    """One request on its way. Use once."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pair: Pair,
        request: web.Request,
        body: dict[str, Any],
        suspect: Callable[[Server, str], None],
    ) -> None:
        """`suspect` is told of a server that refused or broke a connection, and how."""
        self._session = session
        self._pair = pair
        self._suspect = suspect
        self._request = request
        self._stream = bool(body.get("stream"))
        self._decode_body = {**body, **pair.bootstrap_fields()}
        # Prefill's answer is one token that nobody reads; unstreamed, its status says whether it went well.
        self._prefill_body = {k: v for k, v in self._decode_body.items() if k != "stream_options"} | {"stream": False}
        self._wants_logprobs = request.path == "/generate" and bool(body.get("return_logprob"))
        self._headers = forwarded_headers(request.headers) | {"Content-Type": "application/json"}

    async def run(self) -> web.StreamResponse:
        """Failures become error responses, or error events in a started stream.

        Raises UnreachableError, before the client's answer has begun, if one of the servers took no connection.
        """
        prefill = asyncio.create_task(self._fetch_prefill())
        decode = asyncio.create_task(self._post("decode", self._pair.decode, self._decode_body))
        try:
            return await self._answer(prefill, decode)
        except UnreachableError:
            raise
        except UpstreamError as error:
            return error_response(error.status, str(error))
        finally:
            for task in (prefill, decode):
                task.cancel()
            await asyncio.gather(prefill, decode, return_exceptions=True)
            if not decode.cancelled() and decode.exception() is None:
                decode.result().close()

    async def _answer(self, prefill: asyncio.Task[Answer], decode: asyncio.Task[Any]) -> web.StreamResponse:
        failed = await self._wait_unless_prefill_fails(prefill, decode)
        if failed is not None:
            if isinstance(cause := prefill.exception(), UnreachableError):
                raise cause
            return failed
        upstream: aiohttp.ClientResponse = decode.result()
        if upstream.status >= 400 or not self._stream:
            return await self._whole(prefill, upstream)
        return await self._streamed(prefill, upstream)

    async def _wait_unless_prefill_fails(self, prefill: asyncio.Task[Answer], decode: asyncio.Task[Any]) -> Any:
        """Wait for `decode` to be done; returns an error response instead if prefill failed and decode is silent."""
        await asyncio.wait({prefill, decode}, return_when=asyncio.FIRST_COMPLETED)
        if not decode.done() and _failed(prefill):
            if isinstance(prefill.exception(), UnreachableError):
                return _prefill_failure(prefill)
            await asyncio.wait({decode}, timeout=_LINGER_S)
            if not decode.done():
                return _prefill_failure(prefill)
        await asyncio.wait({decode})
        return None

    async def _whole(self, prefill: asyncio.Task[Answer], upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        reading = asyncio.create_task(self._read("decode", self._pair.decode, upstream))
        try:
            failed = await self._wait_unless_prefill_fails(prefill, reading)
            if failed is not None:
                return failed
            answer = reading.result()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if self._wants_logprobs and answer.status == 200:
            source = await prefill
            if source.status != 200:
                return source.to_response()
            answer = Answer(200, answer.content_type, logprobs.merge_body(answer.body, source.body))
        return answer.to_response()

    async def _streamed(self, prefill: asyncio.Task[Answer], upstream: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": upstream.content_type, "Cache-Control": "no-cache"})
        await response.prepare(self._request)
        try:
            chunks = self._chunks(prefill, upstream)
            if self._wants_logprobs:
                chunks = logprobs.merge_events(chunks, prefill)
            async for chunk in chunks:
                await response.write(chunk)
        except UpstreamError as error:
            # The status is out already: say it in the stream, where clients look for "error", then end it properly.
            await response.write(
                b"data: " + msgspec.json.encode(_error_body(error.status, str(error))) + b"\n\ndata: [DONE]\n\n"
            )
        await response.write_eof()
        return response

    async def _chunks(self, prefill: asyncio.Task[Answer], upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Decode's bytes as they come. Raises UpstreamError if decode breaks off, or prefill fails before the first.

        Once decode gave a token it has the KV it needs, or itself watches over what is left on the prefill side.
        """
        reading = asyncio.create_task(self._read_some(upstream))
        try:
            if await self._wait_unless_prefill_fails(prefill, reading) is not None:
                raise UpstreamError("prefill", self._pair.prefill, _cause(prefill))
            chunk = await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        while chunk:
            yield chunk
            chunk = await self._read_some(upstream)

    async def _read_some(self, upstream: aiohttp.ClientResponse) -> bytes:
        try:
            async with self._pair.decode.awaited():
                return await upstream.content.readany()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._failure("decode", self._pair.decode, error) from None

    async def _fetch_prefill(self) -> Answer:
        response = await self._post("prefill", self._pair.prefill, self._prefill_body)
        try:
            return await self._read("prefill", self._pair.prefill, response)
        finally:
            response.close()

    async def _post(self, role: str, server: Server, body: dict[str, Any]) -> aiohttp.ClientResponse:
        try:
            url = server.url + self._request.path
            async with server.awaited():
                return await self._session.post(url, data=msgspec.json.encode(body), headers=self._headers)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._suspect(server, str(error) or type(error).__name__)
            raise UnreachableError(role, server, error) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._failure(role, server, error) from None

    async def _read(self, role: str, server: Server, response: aiohttp.ClientResponse) -> Answer:
        try:
            async with server.awaited():
                body = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._failure(role, server, error) from None
        return Answer(response.status, response.headers.get("Content-Type", "application/json"), body)

    def _failure(self, role: str, server: Server, cause: BaseException) -> UpstreamError:
        """A connection that stood has failed. A time-out of ours is not held against the server."""
        error = UpstreamError(role, server, cause)
        if not isinstance(cause, TimeoutError):
            self._suspect(server, str(error))
        return error


def _failed(prefill: asyncio.Task[Answer]) -> bool:
    """Whether prefill is done and will not deliver KV."""
    if not prefill.done():
        return False
    return prefill.exception() is not None or prefill.result().status >= 400


def _cause(prefill: asyncio.Task[Answer]) -> BaseException:
    error = prefill.exception()
    if error is not None:
        return error.__cause__ or error
    return RuntimeError(prefill.result().body.decode(errors="replace")[:500])


def _prefill_failure(prefill: asyncio.Task[Answer]) -> web.Response:
    try:
        return prefill.result().to_response()
    except UpstreamError as error:
        return error_response(error.status, str(error))
