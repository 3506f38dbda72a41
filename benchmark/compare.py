"""Stock SGLang and Adrenaline in turn on the same GPUs, with the same load: one table, a JSON and a picture.

    python benchmark/compare.py --model-path benchmark/models/llama2-7b --out /tmp/compare \\
        --systems pd:nixl dp2 adrenaline:0.7 \\
        --workload "saturated in=512 out=512 concurrency=400 seconds=60 stream=8" \\
        --workload "rate in=512 out=512 rate=8 requests=120"

Each system is started once, warmed up, driven with every workload, and stopped. Weights are random unless
--real-weights. All times are taken by the client. What was measured is kept when a system fails or the time is up. The
kinds of workload are in `workload.py`, what the figures mean in `load_stats.py`, systems in `systems.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "e2e"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "gpu"))

from compare_report import Report, Run
from gpu_servers import Gpus
from kernel_trace import Recording
from load_client import Load, Record
from load_stats import Slo, summarize
from monitor import Monitor
from servers import ServerError
from systems import Deployment, System, deploy
from workload import Workload, WorkloadError

WARM_UP_TIMEOUT_S = 150.0
GIVE_BACK_S = 10.0
SETTLE_S = 1.0
"""After a workload: the last requests' ends are counted, aborted ones leave."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder with config.json (and weights: --real-weights)")
    parser.add_argument("--real-weights", action="store_true", help="load weights instead of making random ones")
    parser.add_argument("--systems", nargs="+", type=_system, required=True, metavar="SYSTEM")
    parser.add_argument("--workload", action="append", type=_workload, required=True, metavar='"KIND key=value ..."')
    parser.add_argument("--rounds", type=int, default=1, help="times each workload is run in a start (default 1)")
    parser.add_argument("--tp-size", type=int, default=1, help="GPUs a server (default 1)")
    parser.add_argument("--num-gpus", type=int, help="of the machine (default: counted)")
    parser.add_argument("--mem-fraction-static", default="0.85")
    parser.add_argument("--server-args", type=shlex.split, default=[], help="more for every server, in one string")
    parser.add_argument("--adrenaline-args", type=shlex.split, default=[], help="more for our servers only")
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=25.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and the servers' logs")
    parser.add_argument("--start-timeout", type=float, default=240.0, help="seconds for a system to start")
    parser.add_argument("--workload-timeout", type=float, default=180.0, help="seconds for one run of a workload")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for everything; nothing starts after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace-at", type=float, metavar="S", help="record kernels S seconds into saturated workloads")
    parser.add_argument("--trace-steps", type=int, default=12, help="forward passes a server records (default 12)")
    return parser.parse_args(argv)


def _system(text: str) -> System:
    try:
        return System.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _workload(text: str) -> Workload:
    try:
        return Workload.parse(text)
    except WorkloadError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Comparison:
    """Owner of the report; one system at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = json.loads((Path(args.model_path) / "config.json").read_text())
        self.report = Report(_about(args), Slo(args.slo_ttft_ms / 1e3, args.slo_tpot_ms / 1e3))
        self._deadline = time.monotonic() + args.budget
        args.out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def run_system(self, system: System, gpus: Gpus) -> None:
        """Never raises ServerError: what went wrong is in the report."""
        flags = ["--skip-tokenizer-init", "--mem-fraction-static", self.args.mem_fraction_static]
        flags += [] if self.args.real_weights else ["--load-format", "dummy"]
        flags += self.args.server_args
        flags += self.args.adrenaline_args if system.ratio is not None else []
        logs = self.args.out / "logs" / system.text.replace(":", "-")
        deployment = deploy(system, self.args.model_path, logs, gpus, flags)
        began = time.monotonic()
        try:
            deployment.start(min(self.args.start_timeout, max(1.0, self.left())))
            say(f"{system.text}: serves after {time.monotonic() - began:.0f} s")
            self._warm_up(system, deployment)
            for round_ in range(self.args.rounds):
                for workload in self.args.workload:
                    self._run_workload(system, deployment, workload, round_)
        except (ServerError, OSError, RuntimeError) as error:
            say(f"{system.text} failed: {error}")
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            known = {run.workload for run in self.report.runs if run.system == system.text}
            missing = [w for w in self.args.workload if w.title not in known]
            self.report.runs += [Run(system.text, w.title, 0, error=reason) for w in missing]
        finally:
            deployment.stop()
            self.save()

    def _warm_up(self, system: System, deployment: Deployment) -> None:
        """Every length once, alone and in a batch, local and offloaded, so that nothing is compiled while measured."""
        began = time.monotonic()
        with self._trace(system, deployment, after_s=0.0, name="warm-up"):
            self._warm_lengths(system, deployment)
        say(f"{system.text}: warm after {time.monotonic() - began:.0f} s")

    def _warm_lengths(self, system: System, deployment: Deployment) -> None:
        for length in sorted({workload.input_len for workload in self.args.workload}):
            for ratio in (0.0, 1.0, 0.5) if system.ratio is not None else (None,):
                load = Workload("burst", length, 16, requests=8 * len(deployment.urls), ratio=ratio)
                records = self._drive(system, deployment, load, min(WARM_UP_TIMEOUT_S, self.left()), seed=-1)
                failed = [record.error for record in records if record.error]
                if failed:
                    raise RuntimeError(f"warm-up with {length} tokens failed: {failed[0]}")

    def _drive(
        self, system: System, deployment: Deployment, workload: Workload, timeout_s: float, seed: int
    ) -> list[Record]:
        vocabulary = int(self.config["vocab_size"])
        offload = system.ratio is not None
        load = Load(deployment.urls, workload, vocab_size=vocabulary, seed=seed, offload=offload)
        return asyncio.run(load.run(max(1.0, timeout_s)))

    def _run_workload(self, system: System, deployment: Deployment, workload: Workload, round_: int) -> None:
        run = Run(system.text, workload.title, round_)
        self.report.runs.append(run)
        if self.left() < 5:
            run.error = "no time left"
            return
        before = _status(deployment)
        trace = nullcontext()
        if workload.kind == "saturated":
            trace = self._trace(system, deployment, after_s=self.args.trace_at, name=f"round-{round_}")
        with Monitor(deployment.watched, ours=deployment.decode is not None) as monitor, trace:
            limit = min(max(self.args.workload_timeout, workload.seconds), self.left())
            records = self._drive(system, deployment, workload, limit, seed=self.args.seed + round_)
        time.sleep(SETTLE_S)
        run.summary = summarize(records, workload, self.report.slo)
        run.servers = {name: asdict(use) for name, use in monitor.servers.items()}
        run.gpus = {index: asdict(use) for index, use in monitor.gpus.items()}
        run.timeline = monitor.timeline
        self._add_offloading(run, before, _status(deployment))
        run.left_over = _left_over(deployment)
        say(f"{system.text}, {workload.title}, round {round_ + 1}: {run.summary.output_tok_s:.0f} tok/s")
        self.save()
        if all(record.error for record in records):
            raise RuntimeError(f"every request of {workload.title} failed: {run.summary.first_error}")

    def _trace(
        self, system: System, deployment: Deployment, *, after_s: float | None, name: str
    ) -> AbstractContextManager:
        """With --trace-at, lets the servers record their kernels; in warm-up too, as the first time takes seconds."""
        if self.args.trace_at is None or after_s is None:
            return nullcontext()
        folder = self.args.out / "traces" / system.text.replace(":", "-") / name
        return Recording(deployment.watched, folder, after_s, self.args.trace_steps)

    def _add_offloading(self, run: Run, before: dict, after: dict) -> None:
        if not before or not after:
            return
        totals = {name: after["totals"][name] - before["totals"][name] for name in after["totals"]}
        run.offloaded, run.requests = totals["offloaded"], sum(totals.values())
        steps = after["steps"] - before["steps"]
        if steps:
            wait_ms = after["exposed_wait_ms_total"] - before["exposed_wait_ms_total"]
            run.exposed_wait_us_per_layer = 1e3 * wait_ms / steps / int(self.config["num_hidden_layers"])
            run.launch_lag_us = after["executor"].get("launch_lag_us")
            run.plans_per_step = (after["executor"]["plans"] - before["executor"]["plans"]) / steps
            say(f"launch lag {run.launch_lag_us} us, {run.plans_per_step:.2f} plans a step, {steps} steps")
        earlier = before["decisions"]
        run.decisions = {reason: n - earlier.get(reason, 0) for reason, n in after["decisions"].items()}
        say(f"decisions {run.decisions}")

    def save(self) -> None:
        self.report.write(self.args.out / "compare.json")
        (self.args.out / "compare.txt").write_text(self.report.tables() + "\n")


def _status(deployment: Deployment) -> dict:
    """Of our decode server, the prefill server's under `executor`; empty for stock systems and without an answer."""
    if deployment.decode is None:
        return {}
    try:
        return deployment.decode.status("decode") | {"executor": deployment.decode.status("prefill")}
    except OSError:
        return {}


def _left_over(deployment: Deployment) -> list[str]:
    """What our servers still hold for offloaded requests, once they had time to give it back."""
    if deployment.decode is None:
        return []
    deadline = time.monotonic() + GIVE_BACK_S
    while True:
        try:
            status = {name: deployment.decode.status(name) for name in ("prefill", "decode")}
        except OSError as error:
            return [f"status: {error}"]
        held = [f"{name}: {s['lanes_in_use']} lanes" for name, s in status.items() if s["lanes_in_use"]]
        pinned = status["prefill"]["pinned_tokens"]
        held += [f"prefill: {pinned} tokens pinned"] if pinned else []
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(0.3)


def _about(args: argparse.Namespace) -> dict:
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    arguments["systems"] = [system.text for system in args.systems]
    arguments["workload"] = [asdict(workload) for workload in args.workload]
    return {
        "model": args.model_path,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "devices": _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "command": shlex.join(sys.argv),
        "arguments": arguments,
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """0 if every system ran every workload."""
    args = parse(argv)
    if args.num_gpus is None:
        import torch

        args.num_gpus = torch.cuda.device_count()
    gpus = Gpus.of(args.num_gpus, args.tp_size)
    if gpus.shared:
        say("one GPU for both sides: figures are not those of two")
    comparison = Comparison(args)
    try:
        for system in args.systems:
            if comparison.left() < 30:
                say(f"no time left for {system.text}")
                break
            comparison.run_system(system, gpus)
    finally:
        comparison.save()
        print(comparison.report.tables())
        try:
            comparison.report.plot(args.out / "compare.png")
            comparison.report.plot_timelines(args.out)
        except ImportError as error:
            say(f"no picture: {error}")
    done = {(run.system, run.workload) for run in comparison.report.runs if run.summary is not None}
    return int(len(done) < len(args.systems) * len({workload.title for workload in args.workload}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
