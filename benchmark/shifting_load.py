"""A load that shifts, under fixed offload ratios and under `auto`: client-side output tok/s of each phase and overall.

One launch serves all: its ratio is auto, and a fixed ratio is carried out by the client, which names each request's
split as `policy.decide` would. So settings are measured in turn, round by round, on the same processes, and what else
the machine does hits all of them alike. Before each setting both caches are emptied. See `phases.py` for the load.

Each server keeps to cores of its own, as servers on GPUs keep to theirs: executor and prefill share one server's,
and what decode does not use is nobody else's. `--cores all` lets the kernel move everything everywhere.

How slow the cores were is measured beside each phase (`core_pace.py`): on a shared host that is most of what rounds
differ by. With enough rounds a second table has the rates as if all had met the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import compare_cpu
import servers
from core_pace import CorePace, at_even_pace
from phases import CONCURRENCY, DECODE_POOL, PHASES, RESERVED_TOKENS, Phase
from servers import Group

from sglang_adrenaline import policy
from sglang_adrenaline.cpu_info import device_name

MODEL = Path(__file__).parent / "models" / "cpu-mha"
AUTO = "auto"
PREFILL_POOL = 60_000
IDLE_S = 20.0
LEARNT = ("duty", "local_rate", "executor_rates", "executor_work_rates", "round_trip_extra_ms", "step_extra_ms")
COUNTERS = ("offloaded_total", "local_total", "failed_total", "exposed_wait_ms_total", "steps")


@dataclass(frozen=True)
class Measured:
    """One phase of one setting in one round. `rose`: how far decode's counters and decisions went up."""

    setting: str
    round: int
    phase: str
    tokens: int
    seconds: float
    mean_ttft_ms: float
    mean_tpot_ms: float
    prefill_load: float
    rose: dict[str, float]
    learnt: dict[str, Any]
    """What measured steps have corrected by then."""
    slowness: tuple[float, float] | None = None
    """Of prefill's cores and of decode's, over the fastest they were; None: of before that was measured."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", default="0,0.3,0.5,0.7,1", help="fixed ratios, with commas (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of all settings (default 3)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests (default 1)")
    parser.add_argument("--phases", nargs="+", choices=[p.name for p in PHASES], default=[p.name for p in PHASES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode-pool", type=int, default=DECODE_POOL, help="tokens (default %(default)s)")
    parser.add_argument("--cores", choices=["own", "all"], default="own", help="of a server (default %(default)s)")
    parser.add_argument("--adrenaline-args", default="", help="further --adrenaline-* flags of the servers")
    parser.add_argument("--profile", help="of this machine for benchmark/models/cpu-mha (default: measured first)")
    parser.add_argument("--json", metavar="FILE", help="write all results there, add those that are in it")
    parser.add_argument("--png", metavar="FILE", help="plot what the table shows")
    return parser.parse_args(argv)


def make_group(args: argparse.Namespace, profile: str, logs: Path) -> Group:
    group = servers.adrenaline(
        str(MODEL),
        logs,
        args=("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "float32", "--random-seed", "0"),
        prefill_args=("--max-total-tokens", str(PREFILL_POOL)),
        decode_args=(
            *("--max-total-tokens", str(args.decode_pool)),
            *("--num-reserved-decode-tokens", str(RESERVED_TOKENS)),
        ),
        adrenaline_args=(
            *("--adrenaline-offload-ratio", AUTO, "--adrenaline-profile", profile),
            *args.adrenaline_args.split(),
        ),
    )
    for server in group.servers.values():
        # Strict memory checks cost time in every loop; they belong to tests.
        server.env = {key: value for key, value in server.env.items() if key not in servers.STRICT_ENV}
    cores = sorted(os.sched_getaffinity(0))
    if args.cores == "own" and len(cores) > 1:
        group.servers["prefill"].cores, group.servers["decode"].cores = cores[::2], cores[1::2]
    return group


def measure_profile(folder: Path) -> str:
    """Profile of this machine, one thread a server; the path of its file."""
    path = folder / "profile.json"
    command = [sys.executable, "-m", "sglang_adrenaline.profile", "--model-path", str(MODEL), "--out", str(path)]
    command += ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    return str(path)


def splits(ratio: float, prompts: Sequence[Sequence[int]], state: policy.State) -> tuple[list[int], policy.State]:
    """What a server of that fixed ratio would leave remote of each prompt."""
    chosen = []
    settings = policy.Settings(ratio, min_tokens=16, page_size=1)
    for prompt in prompts:
        split, state = policy.decide(state, len(prompt), None, settings)
        chosen.append(split)
    return chosen, state


def run_setting(group: Group, setting: str, round_: int, args: argparse.Namespace, pace: CorePace) -> list[Measured]:
    """All phases, one after the other."""
    empty(group)
    state, results = policy.State(), []
    for phase in [phase for phase in PHASES if phase.name in args.phases]:
        prompts = phase.prompts(args.seed + round_, args.scale)
        # A token an event would cost the servers' front ends as much as a small model's step.
        sampling: list[dict[str, Any]] = [{"stream_interval": 8} for _ in prompts]
        if setting != AUTO:
            chosen, state = splits(float(setting), prompts, state)
            for params, split in zip(sampling, chosen, strict=True):
                params["custom_params"] = {"adrenaline": {"remote_prefix_len": split}}
        results.append(run_phase(group, setting, round_, phase, prompts, sampling, pace))
    return results


def run_phase(
    group: Group,
    setting: str,
    round_: int,
    phase: Phase,
    prompts: list[list[int]],
    sampling: list[dict[str, Any]],
    pace: CorePace,
) -> Measured:
    before, begun = counters(group), time.monotonic()
    timings, seconds = asyncio.run(
        compare_cpu.measure(group.url, prompts, phase.output, CONCURRENCY, sampling=sampling)
    )
    ended = time.monotonic()
    status = group.status("decode")
    load = float(group.status("prefill")["prefill_load"])
    wait_idle(group)
    after = counters(group)
    rose = {name: round(after[name] - before.get(name, 0), 3) for name in after if after[name] != before.get(name, 0)}
    return Measured(
        setting=setting,
        round=round_,
        phase=phase.name,
        tokens=sum(timing.tokens for timing in timings),
        seconds=seconds,
        mean_ttft_ms=1e3 * statistics.fmean(timing.ttft_s for timing in timings),
        mean_tpot_ms=1e3 * statistics.fmean(timing.tpot_s for timing in timings),
        prefill_load=load,
        rose=rose,
        learnt={name: status[name] for name in LEARNT},
        slowness=tuple(pace.slowness(cores_of(group, role), begun, ended) for role in ("prefill", "decode")),
    )


def cores_of(group: Group, role: str) -> list[int]:
    return list(group.servers[role].cores or os.sched_getaffinity(0))


def counters(group: Group) -> dict[str, float]:
    status = group.status("decode")
    named = {name: status[name] for name in COUNTERS}
    return named | {f"decided {reason}": count for reason, count in status["decisions"].items()}


def wait_idle(group: Group) -> None:
    """No request is left on decode, and prefill keeps no prompt."""

    def idle() -> bool:
        decode, prefill = group.status("decode"), group.status("prefill")
        return not any(decode["running"].values()) and not any(prefill["running"].values())

    servers.wait_until(idle, IDLE_S, "all requests have ended")


def empty(group: Group) -> None:
    """Forget all cached prompts on both servers."""
    wait_idle(group)
    for name in ("prefill", "decode"):
        request = urllib.request.Request(group.servers[name].url + "/flush_cache", method="POST")
        urllib.request.urlopen(request, timeout=IDLE_S).close()


def rates(results: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """setting -> phase, or "overall" -> median over the rounds of tok/s."""
    settings = list(dict.fromkeys(result.setting for result in results))
    table: dict[str, dict[str, float]] = {}
    for setting in settings:
        mine = [result for result in results if result.setting == setting]
        phases = dict.fromkeys(result.phase for result in mine)
        rows = {phase: [r.tokens / r.seconds for r in mine if r.phase == phase] for phase in phases}
        rows["overall"] = [
            sum(r.tokens for r in mine if r.round == one) / sum(r.seconds for r in mine if r.round == one)
            for one in sorted({r.round for r in mine})
        ]
        table[setting] = {name: statistics.median(values) for name, values in rows.items()}
    return table


def even_rates(results: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """As `rates`, as if all phases of a name had met cores of the same pace. Raises ValueError on too few rounds."""
    table: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    tokens = 0.0
    for phase in dict.fromkeys(result.phase for result in results):
        mine = [result for result in results if result.phase == phase and result.slowness]
        even = at_even_pace(
            [r.setting for r in mine], [r.tokens / r.seconds for r in mine], [r.slowness or () for r in mine]
        )
        tokens += mine[0].tokens
        for setting, rate in even.items():
            table.setdefault(setting, {})[phase] = rate
            seconds[setting] = seconds.get(setting, 0.0) + mine[0].tokens / rate
    for setting, row in table.items():
        row["overall"] = tokens / seconds[setting]
    return table


def print_results(results: Sequence[Measured]) -> None:
    """Medians, rates at an even pace, then each phase and what auto decided in it."""
    print_table("output tok/s", rates(results))
    try:
        print_table("at even pace", even_rates(results))
    except ValueError as error:
        print(f"no rates at an even pace: {error}")
    for result in results:
        cores = " ".join(f"{slowness:.2f}" for slowness in result.slowness or ())
        speed = f"{result.tokens / result.seconds:.1f} tok/s, cores {cores or '?'}"
        print(f"{result.setting} {result.round} {result.phase}: {speed} {result.rose} {result.learnt}")


def print_table(title: str, table: dict[str, dict[str, float]]) -> None:
    """`auto / best` compares with the best fixed ratio of the same column."""
    columns = list(next(iter(table.values())))
    line = "| {:>12} |" + " {:>15} |" * len(columns)
    print(line.format(title, *columns))
    print("|" + "---|" * (len(columns) + 1))
    for setting, row in table.items():
        print(line.format(setting, *(f"{row[name]:.1f}" for name in columns)))
    fixed = [row for setting, row in table.items() if setting != AUTO]
    if AUTO in table and fixed:
        shares = (table[AUTO][name] / max(row[name] for row in fixed) for name in columns)
        print(line.format("auto / best", *(f"{share:.3f}" for share in shares)))


def plot(results: Sequence[Measured], path: str) -> None:
    """Bars of tok/s over settings, a panel for each phase."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = rates(results)
    columns = list(next(iter(table.values())))
    figure = Figure(figsize=(13, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(columns)), columns, strict=True):
        colors = ["tab:orange" if setting == AUTO else "tab:blue" for setting in table]
        axes.bar(list(table), [row[name] for row in table.values()], color=colors)
        axes.set_title(name)
        axes.set_xlabel("offload ratio")
    figure.axes[0].set_ylabel("output tok/s, median of rounds")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    settings = [*args.ratios.split(","), AUTO]
    print(f"{device_name()}; {MODEL.name}; decode pool {args.decode_pool}; {CONCURRENCY} at a time")
    with servers.log_folder() as logs:
        profile = args.profile or measure_profile(logs)
        results: list[Measured] = []
        if args.json and Path(args.json).exists():
            results = [Measured(**fields) for fields in json.loads(Path(args.json).read_text())["results"]]
        first = max((result.round for result in results), default=-1) + 1
        with CorePace(os.sched_getaffinity(0)) as pace, make_group(args, profile, logs).start() as group:
            asyncio.run(compare_cpu.measure(group.url, [[7] * 40] * 4, 16, 4))  # first use of everything
            for round_ in range(first, first + args.rounds):
                turn = round_ % len(settings)
                for setting in settings[turn:] + settings[:turn]:
                    begun = time.monotonic()
                    results += run_setting(group, setting, round_, args, pace)
                    print(f"  {setting}, round {round_}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
                if args.json:
                    text = json.dumps({"arguments": vars(args), "results": [asdict(r) for r in results]}, indent=1)
                    Path(args.json).write_text(text)
    print_results(results)
    if args.png:
        plot(results, args.png)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
