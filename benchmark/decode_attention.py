"""Decode's attention over what it holds itself: our kernel beside FlashInfer's and, where SGLang has it, that of
FlashAttention 3, on the whole GPU, as graphs hold them.

    python benchmark/decode_attention.py [--heads 32/8 64/8 28/4 16/8 32/32] [--json FILE]

For each model's heads (query/KV heads of 128 elements, bf16) and batch: microseconds a layer and GB/s of KV of each,
how many times as fast as it ours is, and milliseconds of the host for our plan of a step. Medians of 5 runs of 4 layers
in a graph, and of 7 plans. Ends with an error if answers differ.
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
CONTEXT = 16_384
"""Columns of FlashAttention's table of pages, as SGLang has it: a model's context."""


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

    def attend(self, layer: int) -> torch.Tensor:
        work, kv = self._work, self._work.layers[layer]
        pages = (kv.k.unsqueeze(1), kv.v.unsqueeze(1))
        self._wrapper.run(work.q, pages, out=work.o, lse=work.lse, return_lse=True)
        return work.o


class FlashAttention3:
    """SGLang's default on Hopper, called as it does in a CUDA graph: pages of one token, its plan made once a step."""

    def __init__(self, work: Work) -> None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

        self._attend, self._make_plan = flash_attn_with_kvcache, get_scheduler_metadata
        rows = len(work.tokens)
        int32 = {"dtype": torch.int32, "device": "cuda"}
        self._work = work
        self._pages = torch.zeros(rows, CONTEXT, **int32)
        for row, slots in work.slots.items():
            self._pages[row, : len(slots)] = slots
        self._lens = torch.tensor(work.tokens, **int32)
        self._starts = torch.arange(rows + 1, **int32)
        self._plan = torch.zeros(1 + -(-rows // 4) * 4 * 4, **int32)
        self._plan_len = 0

    def plan(self) -> None:
        work = self._work
        plan = self._make_plan(
            batch_size=len(work.tokens),
            max_seqlen_q=1,
            max_seqlen_k=max(work.tokens),
            num_heads=work.q.shape[1],
            num_heads_k=work.layers[0].k.shape[1],
            headdim=HEAD_DIM,
            cache_seqlens=self._lens,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=self._starts,
            page_size=1,
            causal=True,
        )
        self._plan_len = len(plan)
        self._plan[: len(plan)] = plan

    def attend(self, layer: int) -> torch.Tensor:
        kv = self._work.layers[layer]
        return self._attend(
            q=self._work.q,
            k_cache=kv.k.unsqueeze(1),
            v_cache=kv.v.unsqueeze(1),
            page_table=self._pages,
            cache_seqlens=self._lens,
            cu_seqlens_q=self._starts,
            max_seqlen_q=1,
            softmax_scale=HEAD_DIM**-0.5,
            causal=True,
            out=self._work.o,
            scheduler_metadata=self._plan[: self._plan_len],
        )


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

    def attend(self, layer: int) -> torch.Tensor:
        return self._rows.attend(self._work.q, cast("Any", SimpleNamespace(layer_id=layer, scaling=HEAD_DIM**-0.5)))[0]


def kinds() -> dict[str, type[FlashInfer | FlashAttention3 | Ours]]:
    """Those that are here, by name."""
    try:
        import sgl_kernel.flash_attn  # noqa: F401
    except ImportError:
        return {"FlashInfer": FlashInfer, "ours": Ours}
    return {"FlashInfer": FlashInfer, "FlashAttention 3": FlashAttention3, "ours": Ours}


def measure(
    attention: Ours | FlashInfer | FlashAttention3, stream: torch.cuda.Stream
) -> tuple[float, float, torch.Tensor]:
    """Microseconds a layer; milliseconds of the host to plan; the first layer's answers."""
    with torch.cuda.stream(stream):
        times = []
        for _ in range(PLANS):
            begun = time.perf_counter()
            attention.plan()
            times.append(time.perf_counter() - begun)
            stream.synchronize()
        answers = attention.attend(0).clone()
        graph = CudaGraph(stream)
        with graph.capture():
            for layer in range(LAYERS):
                attention.attend(layer)
        layer_us = median_ms(graph.launch, stream, REPEATS) * 1e3 / LAYERS
        graph.free()
    return layer_us, statistics.median(times) * 1e3, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=["32/8", "64/8", "28/4", "16/8", "32/32"], metavar="Q/KV")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    stream = torch.cuda.Stream()
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}; us a layer, GB/s of KV, ours / theirs in speed")
    measured = kinds()
    print(f"{'heads':>7}{'rows x tokens':>22}" + "".join(f"{name:>27}" for name in measured) + f"{'plan, ms':>10}")
    rows = []
    for heads in args.heads:
        qo_heads, kv_heads = map(int, heads.split("/"))
        for name, tokens in workloads().items():
            work = Work(kv_heads, tokens, qo_heads)
            took = {each: measure(kind(work), stream) for each, kind in measured.items()}
            our_us, plan_ms, answers = took["ours"]
            line = f"{heads:>7}{name:>22}"
            for layer_us, _, theirs in took.values():
                torch.testing.assert_close(answers, theirs, rtol=2e-2, atol=4e-3)
                line += f"{layer_us:>13.1f}{work.bytes_of_a_layer / 1e3 / layer_us:>7.0f}{layer_us / our_us:>6.2f}x"
            print(f"{line}{plan_ms:>10.2f}", flush=True)
            rows.append({"heads": heads, "batch": name, "us": {each: us for each, (us, _, _) in took.items()}})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
