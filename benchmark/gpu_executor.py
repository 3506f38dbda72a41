"""Attention executor over SM shares: what it reads from the KV pool, and what it costs prefill on the same GPU.

    python benchmark/gpu_executor.py [--sms 8 16 24 32 48 64 96 132] [--kv-heads 32] [--kernel ours|flashinfer]
        [--shared TOKENS] [--json FILE] [--png FILE]

Attention of 128 lanes x 512 tokens, 32 query heads x 128, bf16, over 8 layers in one CUDA graph, as the executor
captures them but without a channel. For each number of SMs set apart by green contexts (the GPU's own number: no split,
the executor's stream has priority):

    attention     GB/s of KV read, and its share of what a copy reaches
    copy          GB/s read and written by an elementwise bf16 kernel on the same SMs
    gemm alone    time of prefill's matrix products on the SMs that are left
    gemm beside   the same while the executor is busy all the time
    slow-down     gemm beside against gemm alone on the whole GPU
    attn. beside  GB/s of the attention meanwhile

--shared: all lanes have so many of their tokens in common; GB/s then are of what lanes attend to, which may be more
than is read. --kernel flashinfer: FlashInfer's decode attention instead of `attend_kernel`. Medians of --repeats runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sglang_adrenaline.attention.shared_runs import SharedRuns
from sglang_adrenaline.channel.cuda_graph import CudaGraph
from sglang_adrenaline.prefill.executor import LayerKV
from sglang_adrenaline.prefill.lane_attention import LaneAttention
from sglang_adrenaline.prefill.sm_partition import SmPartition

LANES, TOKENS, LAYERS, QO_HEADS, HEAD_DIM = 128, 512, 8, 32, 128
COPY_BYTES = 1 << 30
GEMM_TOKENS, GEMM_SIZES = 4096, ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096))
"""A layer of Llama-2-7B: (in, out) of its matrices."""


@dataclass(frozen=True)
class Row:
    sms: int
    prefill_sms: int
    attention_gb_s: float
    copy_gb_s: float
    gemm_alone_ms: float
    gemm_beside_ms: float
    attention_beside_gb_s: float


class Work:
    """Buffers and kernels, made once. Methods enqueue on the current stream."""

    def __init__(self, kv_heads: int, kernel: str, shared: int) -> None:
        size = (LANES * TOKENS + 1, kv_heads, HEAD_DIM)
        cuda = {"dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
        self.layers = [
            LayerKV(torch.randn(size, **cuda), torch.randn(size, **cuda), HEAD_DIM**-0.5, 0.0) for _ in range(LAYERS)
        ]
        self.q = torch.randn(LANES, QO_HEADS, HEAD_DIM, **cuda)
        self.o = torch.zeros_like(self.q)
        self.lse = torch.zeros(LANES, QO_HEADS, dtype=torch.float32, device="cuda")
        slots = (torch.randperm(LANES * TOKENS, dtype=torch.int32) + 1).view(LANES, TOKENS)
        slots[:, :shared] = slots[0, :shared]
        self.slots = slots.cuda()
        self.kernel = kernel
        self.read_bytes = LAYERS * LANES * TOKENS * kv_heads * HEAD_DIM * 2 * 2
        self.source = torch.zeros(COPY_BYTES // 2, **cuda)
        self.target = torch.zeros_like(self.source)
        self.x = [torch.randn(GEMM_TOKENS, rows, **cuda) for rows, _ in GEMM_SIZES]
        self.w = [torch.randn(rows, columns, **cuda) for rows, columns in GEMM_SIZES]
        self.y = [torch.empty(GEMM_TOKENS, columns, **cuda) for _, columns in GEMM_SIZES]
        self.gemms()
        self.copy()
        torch.cuda.synchronize()

    def plan(self, sms: int) -> None:
        """For a stream with so many SMs, which is current."""
        if self.kernel == "flashinfer":
            self.wrapper = flashinfer_wrapper(self.slots, self.layers[0].k.shape[1])
            return
        self.attention = LaneAttention(
            self.layers, lanes=LANES, num_qo_heads=QO_HEADS, dtype=torch.bfloat16, capacity=LANES * TOKENS, sms=sms
        )
        shared = SharedRuns()
        for lane, slots in enumerate(self.slots.cpu().numpy()):
            shared.add(lane, slots)
        self.attention.plan(shared.runs(range(LANES)), dict(enumerate(self.slots)))

    def attend(self) -> None:
        for layer, kv in enumerate(self.layers):
            if self.kernel == "flashinfer":
                pages = (kv.k.unsqueeze(1), kv.v.unsqueeze(1))
                self.wrapper.run(self.q, pages, out=self.o, lse=self.lse, return_lse=True)
            else:
                self.attention.run(layer, self.q, self.o, self.lse)

    def copy(self) -> None:
        torch.mul(self.source, 2.0, out=self.target)

    def gemms(self) -> None:
        for x, w, y in zip(self.x, self.w, self.y, strict=True):
            torch.mm(x, w, out=y)


def flashinfer_wrapper(slots: torch.Tensor, kv_heads: int) -> Any:
    """FlashInfer's decode attention over slots [lanes, tokens], planned."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    lanes, tokens = slots.shape
    int32 = {"dtype": torch.int32, "device": "cuda"}
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=QO_HEADS // kv_heads >= 4,  # as SGLang decides
        paged_kv_indptr_buffer=torch.zeros(lanes + 1, **int32),
        paged_kv_indices_buffer=torch.zeros(slots.numel(), **int32),
        paged_kv_last_page_len_buffer=torch.ones(lanes, **int32),
    )
    dtype = torch.bfloat16
    indptr = torch.arange(lanes + 1, dtype=torch.int32) * tokens
    ones = torch.ones(lanes, dtype=torch.int32)
    heads = (QO_HEADS, kv_heads, HEAD_DIM)
    wrapper.plan(indptr, slots.flatten(), ones, *heads, 1, q_data_type=dtype, kv_data_type=dtype)
    return wrapper


def median_ms(work: Callable[[], None], stream: torch.cuda.Stream, repeats: int) -> float:
    times = []
    with torch.cuda.stream(stream):
        for _ in range(repeats + 2):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            work()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after))
    return statistics.median(times[2:])


def beside_ms(
    work: Work, graph: CudaGraph, executor: torch.cuda.Stream, prefill: torch.cuda.Stream, repeats: int
) -> tuple[float, float]:
    """Medians of the products' and of the attention's time while both are busy: runs of one that the other encloses."""
    gemm: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    attention: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(stream: torch.cuda.Stream, run: Callable[[], None], into: list) -> None:
        with torch.cuda.stream(stream):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            run()
            after.record()
        into.append((before, after))

    origin = torch.cuda.Event(enable_timing=True)
    origin.record()
    origin.synchronize()
    while len(gemm) < repeats * 4:  # a few of each in the queue, so that neither stream runs dry
        for pairs, stream, run in ((gemm, prefill, work.gemms), (attention, executor, graph.launch)):
            while len(pairs) < 4 or pairs[-4][1].query():
                timed(stream, run, pairs)
    torch.cuda.synchronize()

    def spans(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[tuple[float, float]]:
        return [(origin.elapsed_time(before), origin.elapsed_time(after)) for before, after in pairs]

    gemm_spans, attention_spans = spans(gemm), spans(attention)
    begin = max(gemm_spans[0][0], attention_spans[0][0])
    end = min(gemm_spans[-1][1], attention_spans[-1][1])
    results = []
    for both in (gemm_spans, attention_spans):
        inside = [after - before for before, after in both if before >= begin and after <= end]
        if not inside:
            raise SystemExit("the two streams did not overlap; raise --repeats")
        results.append(statistics.median(inside))
    return results[0], results[1]


def measure(work: Work, sms: int, repeats: int) -> Row:
    total = torch.cuda.get_device_properties(0).multi_processor_count
    if sms >= total:
        executor, prefill = torch.cuda.Stream(priority=-1), torch.cuda.Stream()
        own, rest = total, total
    else:
        partition = SmPartition(0, sms)
        executor, prefill = partition.take_executor_stream(), partition.prefill_stream()
        own, rest = partition.executor_sms, partition.prefill_sms
    graph = CudaGraph(executor)
    with torch.cuda.stream(executor):
        work.plan(own)
        work.attend()
        with graph.capture():
            work.attend()
    torch.cuda.synchronize()
    attention_ms = median_ms(graph.launch, executor, repeats)
    copy_ms = median_ms(work.copy, executor, repeats)
    gemm_alone_ms = median_ms(work.gemms, prefill, repeats)
    gemm_beside_ms, attention_beside_ms = beside_ms(work, graph, executor, prefill, repeats)
    graph.free()
    return Row(
        sms=own,
        prefill_sms=rest,
        attention_gb_s=work.read_bytes / attention_ms / 1e6,
        copy_gb_s=2 * COPY_BYTES / copy_ms / 1e6,
        gemm_alone_ms=gemm_alone_ms,
        gemm_beside_ms=gemm_beside_ms,
        attention_beside_gb_s=work.read_bytes / attention_beside_ms / 1e6,
    )


def draw(rows: list[Row], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    sms = [row.sms for row in rows]
    left.plot(sms, [row.attention_gb_s for row in rows], "o-", label="attention")
    left.plot(sms, [row.copy_gb_s for row in rows], "s--", label="copy")
    left.plot(sms, [row.attention_beside_gb_s for row in rows], "^:", label="attention beside prefill")
    left.set(xlabel="SMs of the executor", ylabel="GB/s", ylim=(0, None))
    left.legend()
    whole = rows[-1].gemm_alone_ms
    right.plot(sms, [row.gemm_alone_ms / whole for row in rows], "s--", label="products alone")
    right.plot(sms, [row.gemm_beside_ms / whole for row in rows], "o-", label="beside the executor")
    right.set(xlabel="SMs of the executor", ylabel="time against the whole GPU", ylim=(0, None))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", type=int, nargs="+", default=[8, 16, 24, 32, 48, 64, 96])
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--kernel", choices=["ours", "flashinfer"], default="ours")
    parser.add_argument("--shared", type=int, default=0, metavar="TOKENS", help=f"at most {TOKENS}")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--png", type=pathlib.Path)
    args = parser.parse_args()
    torch.cuda.set_device(0)
    total = torch.cuda.get_device_properties(0).multi_processor_count
    counts = [sms for sms in sorted(set(args.sms)) if sms < total] + [total]  # the last row is the whole GPU
    work = Work(args.kv_heads, args.kernel, args.shared)
    print(
        f"{torch.cuda.get_device_name(0)}, {total} SMs, torch {torch.__version__}, {args.kv_heads} KV heads, "
        f"kernel: {args.kernel}, {args.shared} of {TOKENS} tokens shared"
    )
    print(f"{'SMs':>8}{'attention':>12}{'copy':>8}{'share':>8}{'gemm alone':>12}{'beside':>9}{'attn. beside':>14}")
    rows = []
    for sms in counts:
        row = measure(work, sms, args.repeats)
        rows.append(row)
        print(
            f"{row.sms:>8}{row.attention_gb_s:>12.0f}{row.copy_gb_s:>8.0f}{row.attention_gb_s / row.copy_gb_s:>8.0%}"
            f"{row.gemm_alone_ms:>9.2f} ms{row.gemm_beside_ms:>6.2f} ms{row.attention_beside_gb_s:>14.0f}",
            flush=True,
        )
    print("slow-down of the products, executor busy:")
    for row in rows:
        print(f"{row.sms:>8}{row.gemm_beside_ms / rows[-1].gemm_alone_ms:>8.2f}x")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if args.png:
        draw(rows, args.png)


if __name__ == "__main__":
    main()
