"""`python -m sglang_adrenaline.profile`: measure this machine for the cost model, write JSON and a plot."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_adrenaline.cli import OneLineParser, count, number, require_matplotlib
from sglang_adrenaline.cost_model import CostModel
from sglang_adrenaline.errors import AdrenalineError, ConfigError
from sglang_adrenaline.figures import model_from_config
from sglang_adrenaline.profile_data import Profile, encode_profile, write_whole


def parser() -> OneLineParser:
    result = OneLineParser(prog="python -m sglang_adrenaline.profile", description=__doc__)
    result.add_argument("--model-path", required=True, metavar="DIR", help="model, or its config.json")
    result.add_argument("--out", required=True, metavar="FILE.json", help="a plot goes to FILE.png beside it")
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    result.add_argument("--gpu", type=number(0, 63, int), default=0, metavar="N", help="which GPU")
    result.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    result.add_argument(
        "--threads", type=count(1024), metavar="N", help="of a server, on a CPU (default half the cores)"
    )
    result.add_argument("--sm-counts", default="8,16,24,32,48,64,96", metavar="N,...", help="parts of a GPU to measure")
    result.add_argument(
        "--budget-s", type=number(0.01, 600), default=1.0, metavar="S", help="for each figure, on a CPU"
    )
    result.add_argument("--slo-tpot-ms", type=number(1e-3, 1e9), metavar="MS", help="to report B_TPOT for")
    result.add_argument("--context", type=count(1 << 20), default=1024, metavar="N", help="tokens a request has then")
    return result


def measure(argv: Sequence[str]) -> tuple[Profile, str]:
    """Returns the profile and where to write it, with what the user asked to be told. Raises ConfigError."""
    args = parser().parse_args(argv)
    target = Path(args.out)
    if target.suffix != ".json" or not target.parent.is_dir():
        raise ConfigError(f"--out {args.out} must name a .json file in an existing directory")
    require_matplotlib()
    import torch

    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    from sglang_adrenaline import cpu_info
    from sglang_adrenaline.profiling import machine as machines

    bf16 = cuda or cpu_info.has_bf16_arithmetic()
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if bf16 else "float32"
    model = model_from_config(args.model_path, bytes_each=4 if dtype == "float32" else 2)
    machine: machines.Machine
    if cuda:
        from sglang_adrenaline.profiling.gpu import GpuMachine

        try:
            counts = [int(part) for part in args.sm_counts.split(",")]
        except ValueError:
            raise ConfigError(f"--sm-counts {args.sm_counts} is no list of whole numbers") from None
        machine = GpuMachine(model, dtype, args.gpu, counts)
    else:
        from sglang_adrenaline.profiling.cpu import CpuMachine

        cores = len(os.sched_getaffinity(0))
        machine = CpuMachine(model, dtype, args.threads or max(cores // 2, 1), args.budget_s)
    print(machine.device, flush=True)
    profile = machines.measure(machine, model, lambda line: print(line, flush=True))
    cost = CostModel(profile)
    print(f"B_max {cost.rows_max()}: from there on the matrices are compute-bound")
    if args.slo_tpot_ms is not None:
        rows = cost.rows_within(args.slo_tpot_ms / 1e3, args.context, cost.pool_tokens())
        print(f"B_TPOT {rows}: requests of {args.context} tokens within {args.slo_tpot_ms:g} ms without offloading")
    return profile, str(target)


def plot(profile: Profile) -> bytes:
    """PNG: decode step over rows, attention over the executor's share, round trip over rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cost = CostModel(profile)
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    steps, shares, trips = figure.subplots(1, 3)
    rows = [point.rows for point in profile.linear]
    for context in (0, 512, 2048):
        label = "without attention" if not context else f"{context} KV tokens a row"
        steps.loglog(rows, [cost.step_s(n, n * context) * 1e3 for n in rows], marker=".", label=label)
    steps.set_xlabel("rows")
    steps.set_ylabel("decode step, ms")
    steps.legend(fontsize=8)
    parts = [point.share for point in profile.shares]
    shares.plot(
        parts, [p.attention_bytes_s / profile.attention_bytes_s for p in profile.shares], "o-", label="executor"
    )
    shares.plot(parts, [point.prefill_factor for point in profile.shares], "s-", label="prefill beside it")
    shares.set_xlabel("executor's share of the device")
    shares.set_ylabel("speed, share of the whole device's")
    shares.set_ylim(bottom=0)
    shares.legend(fontsize=8)
    trips.plot([p.rows for p in profile.round_trip], [p.seconds * 1e6 for p in profile.round_trip], "o-")
    trips.set_xlabel("offloaded rows")
    trips.set_ylabel("round trip of a layer, us")
    trips.set_ylim(bottom=0)
    figure.suptitle(f"{profile.device}: {'; '.join(profile.notes)}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, or 1 with one line on standard error."""
    try:
        profile, target = measure(argv)
        picture = plot(profile)
        write_whole(target, encode_profile(profile))
        write_whole(str(Path(target).with_suffix(".png")), picture)
        print(f"wrote {target} and its plot")
    except AdrenalineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
