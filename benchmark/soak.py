"""Mixed load for a long time: does anything leak, do tokens become slower? A table by cycle, a plot, status 1 if so.

    python benchmark/soak.py --out DIR [--seconds 600] [--cycle 60] [--device auto] [--model-path DIR]

The same requests are sent in each cycle: prompts of 1 to 6000 tokens of which some are cached, answers of 1 to 300,
splits left to the server or named, some clients gone before their answer is complete. Then a pause: all must have been
given back, the servers' memory, threads and files are counted, and eight equal requests, half of them offloaded, are
decoded alone. Reported is what grows or slows from the second cycle on; in the first, things are used for the
first time. Weights are random. Runs prefill and decode on two GPUs, on one if there is no other, or on the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "e2e"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "gpu"))

import aiohttp
import gpu_servers
import psutil
import servers
from compare import with_split
from leftovers import leftovers
from load_client import Record, read_answer
from load_stats import tpot
from servers import Group, session_members, wait_until

MODELS = Path(__file__).parent / "models"
COMMON = ("--load-format", "dummy", "--skip-tokenizer-init", "--max-total-tokens", "60000")
GPU_ARGS = (*gpu_servers.GPU_ARGS, "--mem-fraction-static", "0.85", "--cuda-graph-max-bs-decode", "64")
CPU_ARGS = ("--dtype", "float32", "--random-seed", "0", "--max-running-requests", "32")
PROMPTS = (1, 5, 40, 200, 700, 2500, 6000)
ANSWERS = (1, 2, 20, 100, 300)
LEAVE_S = (0.0, 0.01, 0.05, 0.2, 1.0)
LEAVING = 0.2
"""Share of the clients that do not stay."""
KNOWN_PROMPTS = 40
"""Different seeds of prompts: what is asked again is in the caches."""
PROBES, PROBE_PROMPT, PROBE_ANSWER = 8, 600, 128
QUIET_S = 30.0
ANSWER_TIMEOUT_S = 120.0
GROWTH_MIB = 64.0
GROWTH_SHARE = 0.02
MORE_THREADS_OR_FILES = 8
SLOWER = 1.05
SLOWER_LOADED = 1.1
"""Under load, where cycles end at different requests."""


@dataclass(frozen=True)
class Cycle:
    """What one cycle did and left. Times in ms, memory in MiB, host's summed over the servers' processes."""

    seconds: float
    finished: int
    left: int
    failed: int
    tokens_s: float
    tpot_ms: float
    """Median over the answers of 20 tokens and more."""
    probe_ms: float
    """TPOT of the equal requests, median."""
    offloaded: int
    host_mib: float
    gpu_mib: float
    threads: int
    files: int
    held: tuple[str, ...]
    """Not given back within QUIET_S."""
    first_error: str | None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of all cycles, pauses included (default 600)")
    parser.add_argument("--cycle", type=float, default=60, help="seconds of one, its pause not included (default 60)")
    parser.add_argument("--open", type=int, default=48, help="requests open at a time (default 48)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model-path", help="its config.json is enough (default: Llama-2-7B's; on a CPU a small one)")
    parser.add_argument("--longest", type=int, default=0, help="leave out longer prompts, tokens")
    parser.add_argument("--adrenaline-args", default="", help="--adrenaline-* flags of the servers")
    parser.add_argument("--out", type=Path, required=True, help="folder for soak.json, soak.png and logs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_group(args: argparse.Namespace, gpus: int) -> Group:
    """gpus: of the machine; 0: servers run on the CPU."""
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    flags = args.adrenaline_args.split()
    if not gpus:
        model = args.model_path or MODELS / "cpu-mha"
        group = servers.adrenaline(model, logs, args=[*COMMON, *CPU_ARGS], adrenaline_args=flags)
    else:
        model = args.model_path or MODELS / "llama2-7b"
        both = gpu_servers.Gpus.of(gpus)
        group = gpu_servers.adrenaline(model, logs, args=[*COMMON, *GPU_ARGS], gpus=both, adrenaline_args=flags)
    return gpu_servers.without_strict_checks(group)


class Client:
    """One cycle's requests: the same in each, as far as a cycle comes."""

    def __init__(self, url: str, seed: int, longest: int) -> None:
        self._url = url
        self._rng = random.Random(seed)
        self._prompts = [length for length in PROMPTS if not longest or length <= longest]
        self._began = time.perf_counter()
        self.records: list[Record] = []
        self.left = 0

    def now(self) -> float:
        return time.perf_counter() - self._began

    async def mixed(self, seconds: float, open_requests: int) -> None:
        """What is open at the end is waited for."""

        async def keep_open(session: aiohttp.ClientSession) -> None:
            while self.now() < seconds:
                body, stay_s = self._draw()
                await self._ask(session, body, stay_s)

        async with _session() as session, asyncio.TaskGroup() as tasks:
            for _ in range(open_requests):
                tasks.create_task(keep_open(session))

    async def probe(self) -> list[float]:
        """TPOT in ms of the equal requests, all at once."""
        sampling = {"temperature": 0, "max_new_tokens": PROBE_ANSWER, "ignore_eos": True}
        bodies = [
            with_split({"input_ids": _ids(10_000 + n, PROBE_PROMPT), "sampling_params": sampling}, -(n % 2))
            for n in range(PROBES)
        ]
        async with _session() as session:
            records = await asyncio.gather(*(self._ask(session, body, None) for body in bodies))
        return [tpot(record) * 1e3 for record in records if record.finished]

    def _draw(self) -> tuple[dict[str, Any], float | None]:
        """A request and how long its client stays; None: to the end."""
        rng = self._rng
        length = rng.choice(self._prompts)
        wish = rng.choice([None, None, 0, -1, rng.randint(0, length)])
        sampling = {"temperature": 0.8, "max_new_tokens": rng.choice(ANSWERS), "ignore_eos": True}
        ids = _ids(rng.randrange(KNOWN_PROMPTS), length) if rng.random() < 0.5 else _ids(rng.getrandbits(40), length)
        stay_s = rng.choice(LEAVE_S) if rng.random() < LEAVING else None
        return with_split({"input_ids": ids, "sampling_params": sampling}, wish), stay_s

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any], stay_s: float | None) -> Record:
        record = Record(self.now())
        self.records.append(record)

        async def read() -> None:
            async with session.post(f"{self._url}/generate", json=body | {"stream": True}) as reply:
                if reply.status != 200:
                    record.error = f"{reply.status}: {(await reply.text())[:300]}"
                    return
                await read_answer(reply, record, self.now)
                wanted = body["sampling_params"]["max_new_tokens"]
                got = record.events[-1][1] if record.events else 0
                record.finished = record.error is None and got == wanted
                if record.error is None and not record.finished:
                    record.error = f"{got} tokens came instead of {wanted}"

        try:
            await asyncio.wait_for(read(), stay_s or ANSWER_TIMEOUT_S)
        except TimeoutError:
            self.left += stay_s is not None
            record.error = None if stay_s is not None else f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
        except (aiohttp.ClientError, OSError) as error:
            record.error = f"{type(error).__name__}: {error}"
        if record.error is not None:
            await asyncio.sleep(0.2)  # a server that is gone must not be asked a thousand times a second
        return record


def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None, sock_connect=30))


def _ids(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(100, 900), k=length)


def run_cycle(group: Group, args: argparse.Namespace, gpu_mib: Callable[[], float]) -> Cycle:
    before = group.status("decode")["totals"]["offloaded"]
    client = Client(group.url, args.seed, args.longest)
    asyncio.run(client.mixed(args.cycle, args.open))
    took = client.now()
    held = _held(group)
    probes = asyncio.run(Client(group.url, args.seed, 0).probe())
    held += _held(group)
    usage = _usage(group)
    times = [tpot(r) * 1e3 for r in client.records if r.finished and r.events[-1][1] >= 20]
    errors = [record.error for record in client.records if record.error is not None]
    if len(probes) < PROBES:
        errors.append(f"only {len(probes)} of the {PROBES} equal requests were answered")
    return Cycle(
        seconds=took,
        finished=sum(record.finished for record in client.records),
        left=client.left,
        failed=len(errors),
        tokens_s=sum(record.events[-1][1] for record in client.records if record.events) / took,
        tpot_ms=statistics.median(times) if times else 0.0,
        probe_ms=statistics.median(probes) if probes else 0.0,
        offloaded=group.status("decode")["totals"]["offloaded"] - before,
        gpu_mib=gpu_mib(),
        held=tuple(held),
        first_error=errors[0] if errors else None,
        **usage,
    )


def _held(group: Group) -> list[str]:
    try:
        wait_until(lambda: not leftovers(group), QUIET_S, "everything given back")
    except servers.ServerError:
        return leftovers(group)
    return []


def _usage(group: Group) -> dict[str, Any]:
    processes = [psutil.Process(pid) for server in group.servers.values() for pid in session_members(server.pid)]
    return {
        "host_mib": sum(p.memory_full_info().uss for p in processes) / 2**20,
        "threads": sum(p.num_threads() for p in processes),
        "files": sum(p.num_fds() for p in processes),
    }


def used_gpu_mib() -> float:
    """Of all GPUs of the machine."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())))


def findings(cycles: Sequence[Cycle]) -> list[str]:
    """What leaked, failed or became slower, in words. Growth counts from the second cycle to the last one."""
    found = [f"cycle {n}: {what}" for n, cycle in enumerate(cycles, 1) for what in cycle.held]
    found += [f"cycle {n}: {c.failed} failed, first: {c.first_error}" for n, c in enumerate(cycles, 1) if c.failed]
    settled = cycles[1:]
    if len(settled) < 2:
        return [*found, "fewer than three cycles: nothing can be said about growth"]
    first, last = settled[0], settled[-1]
    for name, unit in (("host_mib", "host memory"), ("gpu_mib", "GPU memory")):
        before, after = getattr(first, name), getattr(last, name)
        if after - before > max(GROWTH_MIB, GROWTH_SHARE * before):
            found.append(f"{unit} grew from {before:.0f} to {after:.0f} MiB")
    for name in ("threads", "files"):
        before, after = getattr(first, name), getattr(last, name)
        if after - before > MORE_THREADS_OR_FILES:
            found.append(f"{name} grew from {before} to {after}")
    part = max(len(settled) // 3, 1)
    for name, what, limit in (("probe_ms", "alone", SLOWER), ("tpot_ms", "under load", SLOWER_LOADED)):
        early = statistics.median(getattr(cycle, name) for cycle in settled[:part])
        late = statistics.median(getattr(cycle, name) for cycle in settled[-part:])
        if late > limit * early:
            found.append(f"a token {what} took {early:.2f} ms at first and {late:.2f} ms at the end")
    return found


COLUMNS = ("seconds", "finished", "left", "failed", "offloaded", "tokens_s", "tpot_ms", "probe_ms")
COLUMNS += ("host_mib", "gpu_mib", "threads", "files")
LINE = "| {:>5} |" + " {:>9} |" * len(COLUMNS)


def row(number: int, cycle: Cycle) -> str:
    values = (getattr(cycle, name) for name in COLUMNS)
    return LINE.format(number, *(f"{value:.2f}" if isinstance(value, float) else value for value in values))


def plot(cycles: Sequence[Cycle], path: Path) -> None:
    """Time of a token, memory, and threads and files, over cycles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    numbers = range(1, len(cycles) + 1)
    panels = (("ms a token", ("tpot_ms", "probe_ms")), ("MiB", ("host_mib", "gpu_mib")), ("", ("threads", "files")))
    for axes, (unit, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            axes.plot(numbers, [getattr(cycle, name) for cycle in cycles], "o-", label=name)
        axes.set_xlabel("cycle")
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    import torch

    gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    if args.device == "cuda" and not gpus:
        print("error: there is no GPU", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    names = [torch.cuda.get_device_name(index) for index in range(gpus)] or ["CPU"]
    print(f"{', '.join(names)}; {args.open} open; cycles of {args.cycle:g} s", flush=True)
    cycles: list[Cycle] = []
    with make_group(args, gpus).start() as group:
        begun = time.monotonic()
        print(LINE.format("cycle", *COLUMNS), "|---|" + "---|" * len(COLUMNS), sep="\n", flush=True)
        while time.monotonic() - begun < args.seconds:
            cycles.append(run_cycle(group, args, used_gpu_mib if gpus else lambda: 0.0))
            print(row(len(cycles), cycles[-1]), flush=True)
            text = json.dumps({"devices": names, "cycles": [asdict(cycle) for cycle in cycles]}, indent=1)
            (args.out / "soak.json").write_text(text)
    plot(cycles, args.out / "soak.png")
    found = findings(cycles)
    print("\n".join(found) or "nothing leaked, nothing became slower")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
