"""Round trip of a channel between two processes: q out, (o, lse) back, per layer. zmq goes over loopback.

Prints microseconds per layer. The executor answers at once (it returns q), so this is the channel's own cost: copies,
flags, Python and wake-ups. `--busy-main` keeps the executor process's main thread in Python bytecode, as a scheduler
that holds the GIL would, at the given switch interval.

    python benchmark/channel_cpu.py [--kind shm|zmq] [--rows 8] [--heads 9] [--head-dim 64]
                                       [--busy-main] [--switch-interval-ms 5]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import threading
import time

import torch

from sglang_adrenaline.channel import opening
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec, ExecutorEnd
from sglang_adrenaline.profiling import round_trip


def decode(spec: ChannelSpec, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    end = opening.open_decode_end(
        spec, device=None, endpoints=None, wait_timeout=30.0, expected=spec.shape, peer="executor"
    )
    q = torch.randn(args.rows, args.heads, args.head_dim)
    lanes = list(range(args.rows))
    rounds = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        for _ in range(args.steps):
            end.begin_step(lanes)
            for layer in range(args.layers):
                end.send_q(layer, q)
                end.recv(layer)
        rounds.append((time.perf_counter() - start) / args.steps / args.layers * 1e6)
    end.close()
    rounds.sort()
    print(
        f"{spec.kind}, rows {args.rows} x {args.heads} x {args.head_dim} float32, {args.layers} layers, "
        f"busy main thread {args.busy_main}: median {rounds[len(rounds) // 2]:.1f} us per layer "
        f"(best {rounds[0]:.1f}, worst {rounds[-1]:.1f} of {args.repeat})",
        flush=True,
    )


def answer(end: ExecutorEnd, stopped: threading.Event) -> None:
    torch.set_num_threads(1)
    round_trip.answer(end)
    stopped.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("shm", "zmq"), default="shm")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--busy-main", action="store_true")
    parser.add_argument("--switch-interval-ms", type=float, default=5.0)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    shape = ChannelShape(
        lanes=max(args.rows, 1),
        num_layers=args.layers,
        num_qo_heads=args.heads,
        head_dim=args.head_dim,
        v_head_dim=args.head_dim,
        dtype="float32",
    )
    end = opening.create_executor_end(args.kind, shape, device=None, wait_timeout=30.0, peer="decode")
    stopped = threading.Event()
    process = multiprocessing.get_context("spawn").Process(target=decode, args=(end.spec, args), daemon=True)
    process.start()
    thread = threading.Thread(target=answer, args=(end, stopped))
    thread.start()
    sys.setswitchinterval(args.switch_interval_ms / 1000)
    while args.busy_main and not stopped.is_set():
        sum(range(1000))
    thread.join()
    process.join()
    end.close()


if __name__ == "__main__":
    main()
