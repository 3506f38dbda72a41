"""Command line of the simulator, checked before anything is computed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_adrenaline.cli import OneLineParser, count, number
from sglang_adrenaline.cost_model import WHOLE_DEVICE, CostModel
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import model_from_config
from sglang_adrenaline.profile_data import datasheet_profile, load_profile

SYSTEMS = ("pd", "dp", "adrenaline")
MADE_UP = ("fixed", "sharegpt", "agents")


def _systems(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SYSTEMS)}")
    return names


def _ratios(text: str) -> list[float | str]:
    parse = number(0, 1)
    return ["auto" if part == "auto" else parse(part) for part in text.split(",")]


def _share(text: str) -> float | str:
    return text if text == "auto" else number(0, 1)(text)


def parser() -> OneLineParser:
    result = OneLineParser(
        prog="python -m sglang_adrenaline.simulate",
        description="Simulate stock PD, aggregated instances and attention offloading on the same GPUs and requests.",
    )
    load = result.add_argument_group("requests")
    load.add_argument(
        "--trace", default="sharegpt", metavar="T", help=f"{', '.join(MADE_UP)} or a Mooncake trace FILE (.jsonl)"
    )
    load.add_argument("--requests", type=count(), metavar="N", help="number of requests (default 1000; FILE: all)")
    load.add_argument("--rate", type=number(1e-6, 1e9), metavar="R", help="requests a second (default: all at once)")
    load.add_argument("--concurrency", type=count(), metavar="N", help="so many at a time instead of by their times")
    load.add_argument("--input-len", type=count(1 << 20), default=512, metavar="N", help="of --trace fixed")
    load.add_argument("--output-len", type=count(1 << 20), default=512, metavar="N", help="of --trace fixed")
    load.add_argument("--agents", type=count(), default=64, metavar="N", help="system prompts of --trace agents")
    load.add_argument("--trace-copies", type=count(), default=1, metavar="N", help="FILE so many times side by side")
    load.add_argument("--trace-time-scale", type=number(0, 1e6), default=1.0, metavar="F", help="on FILE's times")
    load.add_argument("--seed", type=number(0, 2**31, int), default=0)
    fleet = result.add_argument_group("fleet")
    fleet.add_argument("--profile", metavar="FILE", help="of python -m sglang_adrenaline.profile")
    fleet.add_argument("--device", default="H100", metavar="D", help="data sheet to use without a profile (H100)")
    fleet.add_argument("--model-path", metavar="DIR", help="model, or its config.json; needed without a profile")
    fleet.add_argument("--tp", type=count(64), default=1, metavar="N", help="GPUs of an instance, without a profile")
    fleet.add_argument("--prefill", type=count(64), default=1, metavar="X", help="prefill instances of a group")
    fleet.add_argument("--decode", type=count(64), default=1, metavar="Y", help="decode instances of a group")
    fleet.add_argument("--groups", type=count(100_000), default=1, metavar="N", help="xPyD groups")
    fleet.add_argument("--pool-tokens", type=count(1 << 40), metavar="N", help="KV tokens of an instance")
    rules = result.add_argument_group("systems")
    rules.add_argument("--systems", type=_systems, default=list(SYSTEMS), metavar="S", help=",".join(SYSTEMS))
    rules.add_argument("--offload-ratio", type=_ratios, default=["auto"], metavar="R,...", help="auto and numbers 0..1")
    rules.add_argument(
        "--decide-at",
        choices=("admission", "arrival"),
        default="admission",
        help="whether the split is decided when memory is there or at once",
    )
    rules.add_argument("--slo-ttft-ms", type=number(1e-3, 1e9), metavar="MS")
    rules.add_argument("--slo-tpot-ms", type=number(1e-3, 1e9), metavar="MS")
    rules.add_argument("--lanes", type=count(4096), default=256, metavar="N", help="of a prefill instance (256)")
    rules.add_argument("--max-pinned-fraction", type=number(0.01, 1), default=0.9, metavar="F")
    rules.add_argument(
        "--executor-share",
        type=_share,
        default=WHOLE_DEVICE,
        metavar="F",
        help="of a prefill device's SMs; auto: by load and TTFT SLO; 0: no partition (default)",
    )
    rules.add_argument("--executor-error", type=number(0.01, 100), default=1.0, metavar="F", help=argparse.SUPPRESS)
    rules.add_argument(
        "--reserved-decode-tokens",
        type=number(0, 1 << 20, int),
        default=512,
        metavar="N",
        help="SGLang's --num-reserved-decode-tokens (512)",
    )
    rules.add_argument(
        "--halves-from",
        type=number(0, 1 << 20, int),
        default=192,
        metavar="N",
        help="Adrenaline's batches of at least N rows run as two halves in turn (192, as on GPUs; 0: none)",
    )
    rules.add_argument(
        "--admission",
        choices=("forecast", "reserve"),
        default="forecast",
        help="how Adrenaline's decode keeps room for answers to come: what all will need at most, or as stock PD does",
    )
    rules.add_argument(
        "--new-token-ratio",
        type=number(0, 1),
        default=0.5,
        metavar="F",
        help="share of outputs to come that aggregated instances keep free (SGLang: 0.7 falling to 0.1)",
    )
    result.add_argument("--out", metavar="DIR", help="write simulation.json and simulation.png there")
    return result


@dataclass(frozen=True)
class Plan:
    """What was asked for, checked."""

    args: argparse.Namespace
    cost: CostModel
    pool_tokens: int


def parse(argv: Sequence[str]) -> Plan:
    """Raises ConfigError, one line, on anything that cannot be simulated."""
    args = parser().parse_args(argv)
    if args.profile:
        model = model_from_config(args.model_path) if args.model_path else None
        profile = load_profile(args.profile, model=model)
    elif args.model_path:
        profile = datasheet_profile(args.device, model_from_config(args.model_path), args.tp)
    else:
        raise ConfigError("--profile FILE or --model-path DIR is needed to know the model")
    if args.trace in MADE_UP:
        args.requests = args.requests or 1000
        if args.rate is not None and args.concurrency is not None:
            raise ConfigError("--rate and --concurrency exclude each other")
    elif args.rate is not None:
        raise ConfigError("--rate is for made-up requests; a trace's times are changed by --trace-time-scale")
    cost = CostModel(profile)
    pool = args.pool_tokens or cost.pool_tokens()
    if pool < 1024:
        raise ConfigError(f"the model does not fit into a {profile.device}: {pool} KV tokens beside its weights")
    fastest_ms = cost.step_s(1, 0) * 1e3
    if args.slo_tpot_ms is not None and args.slo_tpot_ms < fastest_ms:
        raise ConfigError(f"--slo-tpot-ms {args.slo_tpot_ms:g}: a step of a single request takes {fastest_ms:.1f} ms")
    if args.executor_share == "auto" and (args.rate is None or args.slo_ttft_ms is None):
        raise ConfigError("--executor-share auto needs --rate and --slo-ttft-ms")
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ConfigError(f"--out {args.out} is not a directory")
    return Plan(args, cost, pool)
