"""Stock PD and Adrenaline in turn on this machine, with the same requests: output tok/s, TTFT and TPOT side by side.

Each system is started, warmed up, measured and stopped before the next one starts, so that they never share the
cores. Times are taken by the client, at the router. Two stock columns tell what comes from where: `stock` runs SGLang's
own CPU attention, `stock+attn` runs this package's, as `adrenaline` does on both of its servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "e2e"))

import servers
from servers import Group

SYSTEMS = ("stock", "stock+attn", "adrenaline")
WARM_UP_REQUESTS = 4


@dataclass(frozen=True)
class Timing:
    """One request as the client saw it, in seconds; tpot is nan for answers of one token."""

    ttft_s: float
    total_s: float
    tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.total_s - self.ttft_s) / (self.tokens - 1) if self.tokens > 1 else float("nan")


@dataclass(frozen=True)
class Result:
    """One measured round of one system."""

    system: str
    output_tokens_per_s: float
    mean_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    p99_tpot_ms: float
    offloaded: int
    requests: int
    exposed_wait_ms_per_step: float | None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo model)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--ratio", default="0.7", help="offload ratio of adrenaline, a number or auto (default 0.7)")
    parser.add_argument("--requests", type=int, default=32, help="requests per round (default 32)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (default 8)")
    parser.add_argument("--input-len", type=int, default=300, help="longest prompt, tokens (default 300)")
    parser.add_argument("--output-len", type=int, default=32, help="answer, tokens (default 32)")
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds per start of a system (default 2)")
    parser.add_argument("--dtype", default="float32", help="of model and KV (default float32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write all results there as JSON")
    return parser.parse_args(argv)


def prompts(args: argparse.Namespace, round_: int) -> list[list[int]]:
    """Distinct prompts of 50 to 100 % of the length: equal for all systems, new in each round, so nothing is cached."""
    generator = random.Random(f"{args.seed}/{round_}")
    lengths = [generator.randint(max(1, args.input_len // 2), args.input_len) for _ in range(args.requests)]
    return [[generator.randrange(100, 400) for _ in range(length)] for length in lengths]


async def measure(
    url: str,
    inputs: Sequence[list[int]],
    output_len: int,
    concurrency: int,
    *,
    sampling: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[Timing], float]:
    """Timings of all requests and the seconds from the first start to the last end.

    `sampling`: further sampling parameters of each request, if there are any.
    """
    gate = asyncio.Semaphore(concurrency)
    common = {"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True}

    async def one(session: aiohttp.ClientSession, number: int, input_ids: list[int]) -> Timing:
        async with gate:
            start = time.perf_counter()
            first, tokens = None, 0
            params = common | (sampling[number] if sampling else {})
            body = {"input_ids": input_ids, "sampling_params": params, "stream": True}
            async with session.post(f"{url}/generate", json=body) as reply:
                if reply.status != 200:
                    raise SystemExit(f"{reply.status}: {await reply.text()}")
                async for line in reply.content:
                    if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                        continue
                    first = first or time.perf_counter()
                    event = json.loads(line[len(b"data: ") :])
                    if "error" in event:
                        raise SystemExit(f"a request failed: {event}")
                    tokens = event["meta_info"]["completion_tokens"]
            if first is None or tokens != output_len:
                raise SystemExit(f"{tokens} tokens came instead of {output_len}")
            return Timing(first - start, time.perf_counter() - start, tokens)

    timeout = aiohttp.ClientTimeout(total=900)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=2**20
    ) as session:
        start = time.perf_counter()
        timings = await asyncio.gather(*(one(session, number, ids) for number, ids in enumerate(inputs)))
        return list(timings), time.perf_counter() - start


def make_group(system: str, model: str, logs: Path, args: argparse.Namespace) -> Group:
    tokens = max(8192, 2 * args.concurrency * (args.input_len + args.output_len))
    common = ["--dtype", args.dtype, "--max-total-tokens", str(tokens), "--random-seed", "0"]
    if system == "adrenaline":
        group = servers.adrenaline(
            model, logs, args=common, adrenaline_args=("--adrenaline-offload-ratio", str(args.ratio))
        )
    else:
        group = servers.stock_pd(model, logs, args=common)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for server in group.servers.values():
        # Strict memory checks cost time in every loop; they belong to tests.
        server.env = {key: value for key, value in server.env.items() if key not in servers.STRICT_ENV}
        server.env["OMP_NUM_THREADS"] = threads
        if system == "stock+attn":
            server.env["SGLANG_ADRENALINE_CPU_ATTENTION"] = "adrenaline"
    return group


def run_system(system: str, model: str, logs: Path, args: argparse.Namespace) -> list[Result]:
    results = []
    with make_group(system, model, logs, args) as group:
        group.start()
        warm = [[7 + i] * 40 for i in range(WARM_UP_REQUESTS)]
        asyncio.run(measure(group.url, warm, args.output_len, args.concurrency))
        for round_ in range(args.rounds):
            before = _status(group, system)
            timings, wall_s = asyncio.run(measure(group.url, prompts(args, round_), args.output_len, args.concurrency))
            time.sleep(1.0)  # the last requests' ends are counted a moment after their answers
            results.append(_result(system, timings, wall_s, before, _status(group, system)))
            print(f"  {system}, round {round_ + 1}: {results[-1].output_tokens_per_s:.1f} tok/s", file=sys.stderr)
    return results


def _status(group: Group, system: str) -> dict:
    return group.status() if system == "adrenaline" else {}


def _result(system: str, timings: list[Timing], wall_s: float, before: dict, after: dict) -> Result:
    ttft = [1e3 * timing.ttft_s for timing in timings]
    tpot = [1e3 * timing.tpot_s for timing in timings]
    wait = None
    if after and (steps := after["steps"] - before["steps"]):
        wait = (after["exposed_wait_ms_total"] - before["exposed_wait_ms_total"]) / steps
    return Result(
        system=system,
        output_tokens_per_s=sum(timing.tokens for timing in timings) / wall_s,
        mean_ttft_ms=statistics.fmean(ttft),
        p99_ttft_ms=_p99(ttft),
        mean_tpot_ms=statistics.fmean(tpot),
        p99_tpot_ms=_p99(tpot),
        offloaded=after["offloaded_total"] - before["offloaded_total"] if after else 0,
        requests=len(timings),
        exposed_wait_ms_per_step=wait,
    )


def _p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def print_table(results: list[Result]) -> None:
    """Means over the rounds of each system; each round by itself is in the JSON."""
    header = ("system", "output tok/s", "vs stock", "TTFT ms", "p99", "TPOT ms", "p99", "offloaded", "wait ms/step")
    print(("{:<12}" + "{:>14}" * (len(header) - 1)).format(*header))
    base = _mean(results, "stock", "output_tokens_per_s")
    for system in SYSTEMS:
        mean = partial(_mean, results, system)
        speed, wait = mean("output_tokens_per_s"), mean("exposed_wait_ms_per_step")
        if speed is None:
            continue
        cells = (
            f"{speed:.1f}",
            f"{speed / base:.2f}x" if base else "-",
            *(f"{mean(name):.0f}" for name in ("mean_ttft_ms", "p99_ttft_ms")),
            *(f"{mean(name):.1f}" for name in ("mean_tpot_ms", "p99_tpot_ms")),
            f"{mean('offloaded'):.0f}/{mean('requests'):.0f}",
            f"{wait:.2f}" if wait is not None else "-",
        )
        print(("{:<12}" + "{:>14}" * len(cells)).format(system, *cells))


def _mean(results: list[Result], system: str, field: str) -> float | None:
    values = [getattr(result, field) for result in results if result.system == system]
    return statistics.fmean(values) if values and None not in values else None


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.model is None:
        from sglang_adrenaline.demo_model import ensure_demo_model

        args.model = str(ensure_demo_model())
    print(
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores; model {args.model}, "
        f"{args.dtype}; {args.requests} requests of {args.input_len // 2} to {args.input_len} tokens, "
        f"{args.output_len} out, {args.concurrency} at a time; ratio {args.ratio}; stock transfer: "
        f"{servers.stock_transfer()[0]}"
    )
    results: list[Result] = []
    with servers.log_folder() as logs:
        for system in args.systems:
            results += run_system(system, args.model, logs, args)
    print_table(results)
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "results": [asdict(r) for r in results]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
