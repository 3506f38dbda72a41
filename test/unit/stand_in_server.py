"""A process that answers what the benchmark asks of a server: health, load, streamed tokens. No model, no SGLang.

usage: stand_in_server.py PORT [exit]   (exit: ends at once, as a server does that cannot start)
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web


async def health(request: web.Request) -> web.Response:
    return web.Response()


async def loads(request: web.Request) -> web.Response:
    load = {"num_used_tokens": 123, "max_total_num_tokens": 1000, "num_running_reqs": 2}
    return web.json_response({"loads": [load]})


async def generate(request: web.Request) -> web.StreamResponse:
    sampling = (await request.json())["sampling_params"]
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
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)


if __name__ == "__main__":
    main()
