"""A process that answers what the benchmark and the router ask of a server: health, load, tokens. No model, no SGLang.

usage: stand_in_server.py PORT [exit]   (exit: ends at once, as a server does that cannot start)
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web


async def health(request: web.Request) -> web.Response:
    return web.Response()


async def model_info(request: web.Request) -> web.Response:
    return web.json_response({"model_path": "none"})


async def loads(request: web.Request) -> web.Response:
    load = {"num_used_tokens": 123, "max_total_num_tokens": 1000, "num_running_reqs": 2}
    return web.json_response({"loads": [load]})


async def generate(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if not body["stream"]:
        return web.json_response({"text": "", "meta_info": {}})
    sampling = body["sampling_params"]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for count in range(1, sampling["max_new_tokens"] + 1):
        event = {"output_ids": [1] * count, "meta_info": {"completion_tokens": count, "finish_reason": None}}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await asyncio.sleep(0.005)
    await response.write(b"data: [DONE]\n\n")
    return response


def main() -> None:
    if sys.argv[2:] == ["exit"]:
        sys.exit("no GPU memory left")
    app = web.Application(client_max_size=2**24)
    app.add_routes([web.get("/health", health), web.get("/v1/loads", loads), web.post("/generate", generate)])
    app.add_routes([web.get("/model_info", model_info)])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
