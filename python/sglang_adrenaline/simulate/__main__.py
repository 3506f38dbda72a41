"""`python -m sglang_adrenaline.simulate`: simulate, print a table, write JSON and plots."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sglang_adrenaline import policy
from sglang_adrenaline.cli import require_matplotlib
from sglang_adrenaline.errors import AdrenalineError, ConfigError
from sglang_adrenaline.profile_data import write_whole
from sglang_adrenaline.simulate import options, trace
from sglang_adrenaline.simulate.decode import DecodeRules
from sglang_adrenaline.simulate.fleet import AggregatedFleet, DisaggregatedFleet, Shape
from sglang_adrenaline.simulate.report import Result, Samples, plot, summarise, table


def make_requests(plan: options.Plan) -> list[trace.Req]:
    """The same requests every time. Raises ConfigError."""
    args = plan.args
    if args.trace == "fixed":
        requests = trace.fixed_lengths(args.requests, args.rate, args.input_len, args.output_len, args.seed)
    elif args.trace == "sharegpt":
        requests = trace.sharegpt_like(args.requests, args.rate, args.seed)
    elif args.trace == "agents":
        requests = trace.shared_prefix_agents(args.requests, args.rate, args.seed, agents=args.agents)
    else:
        requests = trace.load_mooncake(
            args.trace, copies=args.trace_copies, limit=args.requests, time_scale=args.trace_time_scale
        )
    fitting = [request for request in requests if request.prompt + request.output < plan.pool_tokens]
    if not fitting:
        raise ConfigError(f"no request of the trace fits into {plan.pool_tokens} KV tokens")
    return fitting


def _share(plan: options.Plan, requests: list[trace.Req]) -> float:
    args = plan.args
    if args.executor_share != "auto":
        return args.executor_share
    load = policy.PrefillLoad(
        requests_s=args.rate / (args.groups * args.prefill),
        prompt_s=sum(plan.cost.prefill_s(request.prompt) for request in requests) / len(requests),
    )
    return policy.choose_share(plan.cost.share_points(), load, args.slo_ttft_ms / 1e3).executor_share


def simulate(plan: options.Plan) -> tuple[list[Result], list[Samples]]:
    """Run every system on the same requests."""
    args = plan.args
    slo_ttft_s = args.slo_ttft_ms / 1e3 if args.slo_ttft_ms is not None else None
    slo_tpot_s = args.slo_tpot_ms / 1e3 if args.slo_tpot_ms is not None else None
    settings = policy.LoadSettings(
        max_pinned_fraction=args.max_pinned_fraction,
        max_rows=plan.cost.rows_max(),
        slo_tpot_s=slo_tpot_s,
    )
    runs: list[tuple[str, float | str | None]] = []
    for system in args.systems:
        if system == "adrenaline":
            runs += [(f"adrenaline {ratio}", ratio) for ratio in args.offload_ratio]
        else:
            runs.append((system, None))
    results, samples = [], []
    for name, offload in runs:
        requests = make_requests(plan)
        shape = Shape(
            prefills=args.prefill,
            decodes=args.decode,
            groups=args.groups,
            pool_tokens=plan.pool_tokens,
            share=_share(plan, requests) if offload is not None else 0.0,
            new_token_ratio=args.new_token_ratio,
            rate_error=args.executor_error,
        )
        rules = DecodeRules(
            offload=offload,
            settings=settings,
            lanes=args.lanes,
            reserve_tokens=args.reserved_decode_tokens,
            halves_from=args.halves_from if offload is not None else 0,
            forecast=offload is not None and args.admission == "forecast",
            at_arrival=args.decide_at == "arrival",
        )
        fleet = AggregatedFleet(shape, plan.cost) if name == "dp" else DisaggregatedFleet(shape, plan.cost, rules)
        begun = time.process_time()
        fleet.run(requests, args.concurrency)
        gpus = args.groups * (args.prefill + args.decode) * plan.cost.profile.tp_size
        result, sample = summarise(
            name,
            requests,
            fleet,
            gpus=gpus,
            slo_ttft_s=slo_ttft_s,
            slo_tpot_s=slo_tpot_s,
            cpu_s=time.process_time() - begun,
        )
        results.append(result)
        samples.append(sample)
    return results, samples


def describe(plan: options.Plan) -> str:
    args, profile = plan.args, plan.cost.profile
    source = f"profile {args.profile}" if args.profile else f"data sheet figures of {profile.device}, nothing measured"
    if args.concurrency:
        load = f"{args.concurrency} at a time"
    else:
        load = (
            f"rate {args.rate:g}/s"
            if args.rate
            else "its own times"
            if args.trace not in options.MADE_UP
            else "at once"
        )
    return (
        f"{args.groups} x {args.prefill}P{args.decode}D, TP {profile.tp_size}, {profile.device} ({source}), "
        f"{plan.pool_tokens} KV tokens an instance; trace {args.trace}, {load}"
    )


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, or 1 with one line on standard error."""
    try:
        plan = options.parse(argv)
        if plan.args.out:
            require_matplotlib()
        print(describe(plan), flush=True)
        results, samples = simulate(plan)
        print(table(results))
        if plan.args.out:
            write_results(plan, results, samples)
    except AdrenalineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def write_results(plan: options.Plan, results: list[Result], samples: list[Samples]) -> None:
    folder = Path(plan.args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}") from None
    picture = plot(results, samples, describe(plan))
    content = {"options": vars(plan.args), "profile": plan.cost.profile, "results": results}
    write_whole(str(folder / "simulation.json"), msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    write_whole(str(folder / "simulation.png"), picture)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
