"""What the extension adds to a server's front end: the status page and checks of requests before they are queued.

Process of the HTTP server and tokenizer manager.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Any

from sglang_adrenaline.policy import requested_prefix_len

STATUS_PATH = "/adrenaline/status"
STATUS_TIMEOUT_S = 10.0


async def read_status(tokenizer_manager: Any) -> dict[str, Any]:
    """The status of the server's first rank. Raises TimeoutError if its scheduler does not answer in time."""
    states = await asyncio.wait_for(tokenizer_manager.get_internal_state(), STATUS_TIMEOUT_S)
    return states[0]["adrenaline"]


class RoomSplitter:
    """Gives each of the requests that SGLang makes of one request with n > 1 a bootstrap room of its own.

    SGLang sends them all, on both servers in the same order, under the room of the whole: rooms would collide.
    The k-th one's room is a hash of the whole's and k, so that both servers find the same number without talking, and
    that rooms of different requests do not meet however far they are apart.
    """

    LIMIT = 4096
    """Most unfinished families that are remembered."""

    def __init__(self) -> None:
        self._sent: OrderedDict[int, int] = OrderedDict()

    def next_room(self, room: int, n: int) -> int:
        """First the request that fills the prefix cache, which keeps `room`, then n samples."""
        k = self._sent.pop(room, 0)
        if k < n:
            self._sent[room] = k + 1
            if len(self._sent) > self.LIMIT:
                self._sent.popitem(last=False)
        return _hashed(room, k) if k else room


def _hashed(room: int, k: int) -> int:
    """0..2**63 - 1; SGLang keeps rooms in signed 64 bits."""
    return int.from_bytes(blake2b(f"{room} {k}".encode(), digest_size=8).digest(), "little") >> 1


class FrontendHandlers:
    """`manager` below is SGLang's TokenizerManager, the `self` of the hooked methods."""

    def __init__(self) -> None:
        self._rooms = RoomSplitter()

    def split_rooms(self, manager: Any, tokenized_obj: Any) -> None:
        room, n = getattr(tokenized_obj, "bootstrap_room", None), getattr(tokenized_obj.sampling_params, "n", 1)
        if room is not None and n > 1:
            tokenized_obj.bootstrap_room = self._rooms.next_room(room, n)

    def check_request(self, result: None, manager: Any, obj: Any, input_ids: list[int] | None) -> None:
        """Raises ValueError, which SGLang answers as a 400 with its text."""
        sampling_params = obj.sampling_params
        if isinstance(sampling_params, dict):
            requested_prefix_len(sampling_params.get("custom_params"), len(input_ids or ()))

    async def release_memory(self, original: Callable[..., Awaitable[Any]], manager: Any, *args: Any, **kw: Any) -> Any:
        status = await read_status(manager)
        if status["role"] == "prefill" and status["pinned_tokens"]:
            raise ValueError(
                f"memory not released: {status['pinned_tokens']} tokens are pinned by "
                f"{status['running']['offloaded']} offloaded requests; let them finish first"
            )
        return await original(manager, *args, **kw)


def add_status_route() -> None:
    """Serve `GET /adrenaline/status` on SGLang's FastAPI application."""
    from fastapi.responses import JSONResponse
    from sglang.srt.entrypoints import http_server

    async def adrenaline_status() -> JSONResponse:
        try:
            return JSONResponse(await read_status(http_server.get_global_state().tokenizer_manager))
        except TimeoutError:
            error = {"error": f"the scheduler did not answer within {STATUS_TIMEOUT_S:g} s"}
            return JSONResponse(error, status_code=503)

    http_server.app.add_api_route(STATUS_PATH, adrenaline_status, methods=["GET"])
