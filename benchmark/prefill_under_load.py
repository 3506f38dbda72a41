"""What the attention executor costs prefill: prompt tokens/s with and without decode load on the same servers.

Three rounds on one deployment of ours: nothing decodes; local requests decode; the same requests decode with their
whole prompts on the prefill side. The difference of the last two is the executor's; that of the first two is what two
servers on one machine cost each other anyway.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "e2e"))

import servers
from compare import with_split

LOADS = (("nothing decodes", None), ("local requests decode", 0), ("offloaded requests decode", -1))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--prompts", type=int, default=12, help="prompts that prefill computes in a round (default 12)")
    parser.add_argument("--prompt-len", type=int, default=400, help="their length, tokens (default 400)")
    parser.add_argument("--decoding", type=int, default=4, help="requests that decode meanwhile (default 4)")
    parser.add_argument("--prefix-len", type=int, default=400, help="their prompts, tokens (default 400)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each load, in turn (default 2)")
    return parser.parse_args(argv)


async def _ask(session: aiohttp.ClientSession, url: str, payload: dict) -> None:
    async with session.post(f"{url}/generate", json=payload) as reply:
        if reply.status != 200:
            raise SystemExit(f"{reply.status}: {await reply.text()}")
        await reply.read()


def _payload(rng: random.Random, length: int, tokens: int, split: int) -> dict:
    ids = [rng.randrange(100, 20_000) for _ in range(length)]
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return with_split({"input_ids": ids, "sampling_params": sampling}, split)


async def prefill_speed(url: str, rng: random.Random, split: int | None, args: argparse.Namespace) -> float:
    """Prompt tokens per second over a round of one-token requests, sent two at a time."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        background: list[asyncio.Task] = []
        if split is not None:
            loads = [_payload(rng, args.prefix_len, 4000, split) for _ in range(args.decoding)]
            background = [asyncio.create_task(_ask(session, url, load)) for load in loads]
            await asyncio.sleep(15)  # their own prompts are computed by then
        gate = asyncio.Semaphore(2)

        async def one() -> None:
            async with gate:
                await _ask(session, url, _payload(rng, args.prompt_len, 1, 0))

        start = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(args.prompts)))
        wall_s = time.perf_counter() - start
        if any(task.done() for task in background):
            raise SystemExit("the decode load ended before the prompts did: raise --decoding or lower --prompts")
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
    await asyncio.sleep(3)  # aborted requests are taken out
    return args.prompts * args.prompt_len / wall_s


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.model is None:
        from sglang_adrenaline.demo_model import ensure_demo_model

        args.model = str(ensure_demo_model())
    rng = random.Random(0)
    speeds: dict[str, list[float]] = {name: [] for name, _ in LOADS}
    with servers.log_folder() as logs:
        group = servers.adrenaline(args.model, logs, args=("--dtype", "float32", "--random-seed", "0"))
        for server in group.servers.values():
            server.env = {key: value for key, value in server.env.items() if key not in servers.STRICT_ENV}
        with group:
            group.start()
            asyncio.run(prefill_speed(group.url, rng, None, args))  # warm-up
            for _ in range(args.rounds):
                for name, split in LOADS:
                    speeds[name].append(asyncio.run(prefill_speed(group.url, rng, split, args)))
    base = statistics.fmean(speeds[LOADS[0][0]])
    for name, values in speeds.items():
        mean = statistics.fmean(values)
        print(f"{name:<28}{mean:>9.1f} prompt tokens/s{mean / base:>8.2f}x   rounds {[round(v, 1) for v in values]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
