"""Decode's attention over what it holds itself: our kernel beside FlashInfer's, on the whole GPU, as graphs hold them.

    python benchmark/decode_attention.py [--heads 32/8 64/8 28/4 16/8 32/32] [--json FILE]

For each model's heads (query/KV heads of 128 elements, bf16) and batch: microseconds a layer and GB/s of KV of both,
how many times as fast ours is, and milliseconds of the host for our plan of a step. Medians of 5 runs of 4 layers in a
graph, and of 7 plans.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from types import SimpleNamespace
from typing import Any, cast

import torch
from gpu_executor import median_ms
from lane_cuts import HEAD_DIM, LAYERS, REPEATS, Work, workloads

from sglang_adrenaline.attention.local_rows import KernelRows, Span
from sglang_adrenaline.attention.planned import Heads, Workspace
from sglang_adrenaline.channel.cuda_graph import CudaGraph

PLANS = 7


class FlashInfer:
    """Its decode attention over a load, set up as SGLang does for a CUDA graph."""

    def __init__(self, work: Work) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        rows, tokens = len(work.tokens), sum(work.tokens)
        int32 = {"dtype": torch.int32, "device": "cuda"}
        qo_heads, kv_heads = work.q.shape[1], work.layers[0].k.shape[1]
        self._work = work
        self._wrapper: Any = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(512 << 20, dtype=torch.uint8, device="cuda"),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=qo_heads // kv_heads >= 4,
            paged_kv_indptr_buffer=torch.zeros(rows + 1, **int32),
            paged_kv_indices_buffer=torch.zeros(tokens, **int32),
            paged_kv_last_page_len_buffer=torch.ones(rows, **int32),
        )
        self._lens = torch.tensor(work.tokens, dtype=torch.int32)
        self._slots = torch.cat(list(work.slots.values()))
        self._heads = (qo_heads, kv_heads, HEAD_DIM)

    def plan(self) -> None:
        indptr = torch.zeros(len(self._lens) + 1, dtype=torch.int32)
        indptr[1:] = torch.cumsum(self._lens, 0)
        ones = torch.ones(len(self._lens), dtype=torch.int32)
        dtype = torch.bfloat16
        self._wrapper.plan(indptr, self._slots, ones, *self._heads, 1, q_data_type=dtype, kv_data_type=dtype)

    def attend(self, layer: int) -> None:
        work, kv = self._work, self._work.layers[layer]
        pages = (kv.k.unsqueeze(1), kv.v.unsqueeze(1))
        self._wrapper.run(work.q, pages, out=work.o, lse=work.lse, return_lse=True)


class Ours:
    """As a decode server has it."""

    def __init__(self, work: Work) -> None:
        self._work = work
        rows, most = len(work.tokens), max(work.tokens)
        lens = torch.tensor(work.tokens)
        table = torch.zeros(rows, most, dtype=torch.int32, device="cuda")
        for row, slots in work.slots.items():
            table[row, : len(slots)] = slots
        heads = Heads(work.q.shape[1], work.layers[0].k.shape[1], HEAD_DIM)
        space = torch.zeros(sum(work.tokens), dtype=torch.int32, device="cuda")
        workspace = Workspace.make(rows, heads, space.device)
        self._rows = KernelRows(rows, heads, workspace, space, table, SimpleNamespace(get_kv_buffer=self._kv))
        self._span = Span(torch.arange(rows, device="cuda"), None, lens.cuda(), lens)

    def _kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._work.layers[layer].k, self._work.layers[layer].v

    def plan(self) -> None:
        self._rows.plan(self._span)

    def attend(self, layer: int) -> None:
        self._rows.attend(self._work.q, cast("Any", SimpleNamespace(layer_id=layer, scaling=HEAD_DIM**-0.5)))


def measure(attention: Ours | FlashInfer, stream: torch.cuda.Stream) -> tuple[float, float]:
    """Microseconds a layer; milliseconds of the host to plan."""
    with torch.cuda.stream(stream):
        times = []
        for _ in range(PLANS):
            begun = time.perf_counter()
            attention.plan()
            times.append(time.perf_counter() - begun)
            stream.synchronize()
        attention.attend(0)
        graph = CudaGraph(stream)
        with graph.capture():
            for layer in range(LAYERS):
                attention.attend(layer)
        layer_us = median_ms(graph.launch, stream, REPEATS) * 1e3 / LAYERS
        graph.free()
    return layer_us, statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=["32/8", "64/8", "28/4", "16/8", "32/32"], metavar="Q/KV")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    stream = torch.cuda.Stream()
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; us a layer, GB/s, ms of the host for our plan")
    print(f"{'heads':>7}{'rows x tokens':>22}{'FlashInfer':>21}{'ours':>15}{'plan':>6}{'times as fast':>15}")
    rows = []
    for heads in args.heads:
        qo_heads, kv_heads = map(int, heads.split("/"))
        for name, tokens in workloads().items():
            work = Work(kv_heads, tokens, qo_heads)
            (their_us, _), (our_us, plan_ms) = (measure(kind(work), stream) for kind in (FlashInfer, Ours))
            gb = work.bytes_of_a_layer / 1e3
            print(
                f"{heads:>7}{name:>22}{their_us:>13.1f}{gb / their_us:>8.0f}"
                f"{our_us:>9.1f}{gb / our_us:>6.0f}{plan_ms:>6.2f}{their_us / our_us:>14.2f}x",
                flush=True,
            )
            rows.append({"heads": heads, "batch": name, "flashinfer_us": their_us, "our_us": our_us})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
