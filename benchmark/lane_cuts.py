"""How prompts are best cut for the executor's attention kernel: times of cuts beside the one that the plan chooses.

    python benchmark/lane_cuts.py [--sms 16 32 48 64 96] [--kv-heads 8 32] [--json FILE]

Each row: KV heads (of 32 query heads x 128, bf16), lanes x tokens, SMs (set apart by green contexts; the last is the
whole GPU), the fastest cut (most tokens of a piece), microseconds a layer, GB/s of KV, and what the plan's own cut
takes, times that. The end says the latter of all rows. Medians of 5 runs of 4 layers in a graph.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics

import numpy as np
import torch
from gpu_executor import median_ms

from sglang_adrenaline.attention.lane_plan import TILE
from sglang_adrenaline.attention.shared_runs import Run
from sglang_adrenaline.channel.cuda_graph import CudaGraph
from sglang_adrenaline.prefill.executor import LayerKV
from sglang_adrenaline.prefill.lane_attention import LaneAttention
from sglang_adrenaline.prefill.sm_partition import SmPartition

LAYERS, QO_HEADS, HEAD_DIM, SLOTS, REPEATS = 4, 32, 128, 110_000, 5
PARTS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32, 64)
"""Into how many pieces the longest prompt is cut."""


def workloads() -> dict[str, list[int]]:
    """Tokens of each lane."""
    mixed = np.random.default_rng(0).lognormal(6, 1, 200).clip(16, 8192).astype(int)
    return {
        "128 x 512": [512] * 128,
        "256 x 512": [512] * 256,
        "32 x 512": [512] * 32,
        "48 x 4096": [4096] * 48,
        "8 x 8192": [8192] * 8,
        "1 x 8192": [8192],
        "200 lognormal": mixed.tolist(),
        "2 x 8192, 150 x 256": [8192] * 2 + [256] * 150,
    }


class Work:
    """One model's pools and a load's slots, scattered over them."""

    def __init__(self, kv_heads: int, tokens: list[int], qo_heads: int = QO_HEADS) -> None:
        cuda = {"dtype": torch.bfloat16, "device": "cuda"}
        size = (SLOTS, kv_heads, HEAD_DIM)
        self.tokens = tokens
        self.layers = [
            LayerKV(torch.randn(size, **cuda), torch.randn(size, **cuda), HEAD_DIM**-0.5, 0.0) for _ in range(LAYERS)
        ]
        slots = torch.cat([torch.randperm(SLOTS, dtype=torch.int32) for _ in range(-(-sum(tokens) // SLOTS))])
        self.slots = dict(enumerate(torch.split(slots[: sum(tokens)].cuda(), tokens)))
        self.runs = [Run((lane,), 0, count) for lane, count in enumerate(tokens)]
        self.q = torch.randn(len(tokens), qo_heads, HEAD_DIM, **cuda)
        self.o = torch.zeros_like(self.q)
        self.lse = torch.zeros(len(tokens), qo_heads, device="cuda")
        self.bytes_of_a_layer = sum(tokens) * kv_heads * HEAD_DIM * 2 * 2

    def times(self, stream: torch.cuda.Stream, sms: int) -> tuple[dict[int, float], float]:
        """Microseconds a layer by the most tokens of a piece, and by the plan's own choice."""
        with torch.cuda.stream(stream):
            attention = LaneAttention(
                self.layers,
                lanes=len(self.tokens),
                num_qo_heads=QO_HEADS,
                dtype=torch.bfloat16,
                capacity=sum(self.tokens),
                sms=sms,
            )
            attention.plan(self.runs, self.slots)
            self._attend(attention)
            graph = CudaGraph(stream)
            with graph.capture():
                self._attend(attention)
            by_cut = {}
            tiles = -(-max(self.tokens) // TILE)
            for limit in {max(4, int(-(-tiles // parts))) for parts in PARTS}:
                attention.plan(self.runs, self.slots, piece_tiles=limit)
                by_cut[limit * TILE] = self._layer_us(graph, stream)
            attention.plan(self.runs, self.slots)
            own = self._layer_us(graph, stream)
            graph.free()
        return by_cut, own

    @staticmethod
    def _layer_us(graph: CudaGraph, stream: torch.cuda.Stream) -> float:
        return median_ms(graph.launch, stream, REPEATS) * 1e3 / LAYERS

    def _attend(self, attention: LaneAttention) -> None:
        for layer in range(LAYERS):
            attention.run(layer, self.q, self.o, self.lse)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", type=int, nargs="+", default=[16, 32, 48, 64, 96])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    total = torch.cuda.get_device_properties(0).multi_processor_count
    partitions = [SmPartition(0, sms) for sms in sorted(set(args.sms)) if sms < total]
    streams = [(partition.executor_sms, partition.take_executor_stream()) for partition in partitions]
    streams.append((total, torch.cuda.Stream()))
    print(f"{torch.cuda.get_device_name(0)}, {total} SMs, torch {torch.__version__}")
    print(f"{'KV heads':>8}{'lanes x tokens':>22}{'SMs':>5}{'cut':>6}{'us':>9}{'GB/s':>7}{'own cut':>9}")
    rows = []
    for kv_heads in args.kv_heads:
        for name, tokens in workloads().items():
            work = Work(kv_heads, tokens)
            for sms, stream in streams:
                by_cut, own = work.times(stream, sms)
                cut = min(by_cut, key=lambda cut: by_cut[cut])
                best = min(by_cut[cut], own)
                print(
                    f"{kv_heads:>8}{name:>22}{sms:>5}{cut:>6}{best:>9.1f}{work.bytes_of_a_layer / best / 1e3:>7.0f}"
                    f"{own / best:>8.2f}x",
                    flush=True,
                )
                rows.append({"kv_heads": kv_heads, "tokens": tokens, "sms": sms, "us": by_cut, "own_us": own})
    losses = [row["own_us"] / min(row["own_us"], *row["us"].values()) for row in rows]
    print(f"the plan's own cuts: {statistics.mean(losses):.3f}x of the fastest in the mean, {max(losses):.2f}x at most")
    if args.json:
        args.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
