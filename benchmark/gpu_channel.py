"""Round trip of the `ipc` channel between two processes, captured in CUDA graphs, 32 layers in a row.

    python benchmark/gpu_channel.py [--rows 2 32 128] [--replays 100] [--json FILE]

The decode process is on GPU 0, the executor on GPU 1 (or 0 if there is one only). Per layer decode puts `rows` rows of
32 heads x 128 in bf16 (8 KiB each) and merges the answer; the executor waits and puts an answer of the same size and
its lse back, and computes nothing. Columns, medians over replays of a 32-layer graph, in microseconds a layer:

    round trip       put, wait_and_merge against wait, put_answers
    behind 20 us     the same with 20 us of other work between put and merge, less those: what the layer costs if hidden
    forked           the same with the put on a branch of the graph, beside those 20 us
    exposed wait     time that the merge then still waited, measured by the kernel (mean)
    put, merge       the decode kernels by themselves, the answer being there already
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import threading
import time

import msgspec
import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.channel import ipc
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoints
from sglang_adrenaline.errors import PeerLostError

LAYERS, HEADS, HEAD_DIM = 32, 32, 128
LOCAL_US = 20.0
WAIT_S = 10.0
AHEAD = 2


def executor(device: int, rows: int) -> None:
    """Answers zeros until stdin closes or the channel ends."""
    torch.cuda.set_device(device)
    shape = ChannelShape(
        lanes=rows, num_layers=LAYERS, num_qo_heads=HEADS, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM, dtype="bfloat16"
    )
    end = ipc.create_executor_end(shape, device=device, wait_timeout=WAIT_S)
    print(msgspec.json.encode(end.spec).decode(), flush=True)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    o = torch.zeros(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    lse = torch.zeros(rows, HEADS, device="cuda")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not end.connect(0.2):
                if stop.is_set():
                    return
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for layer in range(LAYERS):
                    words = end.endpoint.words
                    kernels.wait_layer(words, layer) if layer else kernels.wait_step(words)
                    kernels.put_answers(words, o, lse, layer)
            launched = 0
            while not stop.is_set():
                end.check()
                if launched - end.launches_over < AHEAD:
                    end.launching()
                    graph.replay()
                    launched += 1
                else:
                    time.sleep(10e-6)
    except PeerLostError:
        pass
    end.close(timeout_s=5.0)


class Decode:
    def __init__(self, end: ipc.IpcDecodeEnd, endpoints: IpcEndpoints, rows: int, replays: int) -> None:
        """`end` has the first of the endpoints."""
        self.end, self.words, self.replays = end, endpoints.words, replays
        self.q = torch.randn(LAYERS, rows, HEADS, HEAD_DIM, device="cuda").bfloat16()
        self.o = torch.randn(LAYERS, rows, HEADS, HEAD_DIM, device="cuda").bfloat16()
        self.lse = torch.randn(LAYERS, rows, HEADS, device="cuda")
        self.index = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()

    def put(self, layer: int) -> None:
        kernels.put_queries(self.words, self.q[layer], self.index, self.index, layer)

    def merge(self, layer: int) -> None:
        kernels.wait_and_merge_(self.words, self.o[layer], self.lse[layer], self.index, self.index, layer)

    def capture(self, *, put: bool, merge: bool, sleep_cycles: int = 0, forked: bool = False) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            branch = torch.cuda.Stream() if forked else self.stream
            for layer in range(LAYERS):
                branch.wait_stream(self.stream)
                if put:
                    with torch.cuda.stream(branch):
                        self.put(layer)
                if sleep_cycles:
                    torch.cuda._sleep(sleep_cycles)
                self.stream.wait_stream(branch)
                if merge:
                    self.merge(layer)
        return graph

    def per_layer_us(self, graph: torch.cuda.CUDAGraph, *, begins: bool, ends: bool = True) -> float:
        """Median over replays. `begins`: each replay is a step; `ends`: it also waits for that step's last answer."""
        times = []
        with torch.cuda.stream(self.stream):
            for _ in range(self.replays + 5):
                if begins:
                    self.end.begin_step(range(self.q.shape[1]))
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                before.record()
                graph.replay()
                after.record()
                if not ends:
                    kernels.wait_layer(self.end.endpoint.words, LAYERS - 1)
                self.stream.synchronize()
                self.end.check()
                times.append(before.elapsed_time(after) * 1e3 / LAYERS)
        return statistics.median(times[5:])

    def waits(self) -> tuple[float, int]:
        return self.end.exposed_wait_s, self.end.waits


def sleep_cycles_for(us: float, stream: torch.cuda.Stream) -> tuple[int, float]:
    """Cycles of torch.cuda._sleep that last about `us` in a graph, and what 32 of them take, each, in us."""

    def measure(cycles: int) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(LAYERS):
                torch.cuda._sleep(cycles)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            for _ in range(20):
                graph.replay()
            before.record()
            graph.replay()
            after.record()
        stream.synchronize()
        return before.elapsed_time(after) * 1e3 / LAYERS

    cycles = int(100_000 * us / measure(100_000))
    return cycles, measure(cycles)


def bench(rows: int, replays: int, gpu: int) -> dict[str, float]:
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--executor", str(gpu), str(rows)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise RuntimeError(f"the executor ended with code {child.wait(10.0)}")
        spec, endpoints = msgspec.json.decode(line, type=ChannelSpec), IpcEndpoints(0)
        end = ipc.open_decode_end(spec, device=0, wait_timeout=WAIT_S, endpoint=endpoints.take())
        decode = Decode(end, endpoints, rows, replays)
        cycles, local_us = sleep_cycles_for(LOCAL_US, decode.stream)
        both = decode.capture(put=True, merge=True)
        hidden = decode.capture(put=True, merge=True, sleep_cycles=cycles)
        result = {"rows": rows, "kib": rows * HEADS * HEAD_DIM * 2 / 1024}
        result["round_trip_us"] = decode.per_layer_us(both, begins=True)
        wait_s, waits = decode.waits()
        result["hidden_us"] = decode.per_layer_us(hidden, begins=True) - local_us
        result["exposed_wait_us"] = (decode.waits()[0] - wait_s) * 1e6 / (decode.waits()[1] - waits)
        result["round_trip_wait_us"] = wait_s * 1e6 / waits
        forked = decode.capture(put=True, merge=True, sleep_cycles=cycles, forked=True)
        result["forked_us"] = decode.per_layer_us(forked, begins=True) - local_us
        result["put_us"] = decode.per_layer_us(decode.capture(put=True, merge=False), begins=True, ends=False)
        result["merge_us"] = decode.per_layer_us(decode.capture(put=False, merge=True), begins=False)
        if not end.close(timeout_s=10.0):
            print("the channel's memory was not freed", file=sys.stderr)
        return result
    finally:
        try:
            child.communicate(timeout=15.0)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 8, 32, 128], help="offloaded rows a step")
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there too")
    parser.add_argument("--executor", nargs=2, type=int, metavar=("GPU", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.executor:
        executor(*args.executor)
        return
    gpu = min(1, torch.cuda.device_count() - 1)
    names = f"GPU 0 {torch.cuda.get_device_name(0)}, executor on GPU {gpu}"
    print(f"{names}; torch {torch.__version__}; {LAYERS} layers, {HEADS} heads x {HEAD_DIM}, bf16; us a layer")
    print("| rows | each way | round trip | behind 20 us | exposed wait | forked | put | merge |" + "\n|" + "---|" * 8)
    results = []
    for rows in args.rows:
        r = bench(rows, args.replays, gpu)
        results.append(r)
        print(
            f"| {rows} | {r['kib']:.0f} KiB | {r['round_trip_us']:.1f} | {r['hidden_us']:.1f} "
            f"| {r['exposed_wait_us']:.2f} | {r['forked_us']:.1f} | {r['put_us']:.1f} | {r['merge_us']:.1f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"device": names, "results": results}, indent=1))


if __name__ == "__main__":
    main()
