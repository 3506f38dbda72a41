"""Time of decode attention on this CPU: ours against SGLang's torch_native, in ms per step over all layers.

    python benchmark/cpu_attention.py [--threads 1] [--layers 30] [--heads 9] [--kv-heads 3] [--head-dim 64]

`ours` gathers scattered slots, `in place` has each row's slots in one ascending run (a freshly prefilled prompt),
`plan` is the part done once per step. Prefill: one request, new tokens over a cached prefix, all layers.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from sglang_adrenaline.attention.prefill import attend_causal
from sglang_adrenaline.attention.ragged import RaggedPlan, Scratch, attend

DECODE_CASES = [
    (rows, name, lens)
    for rows in (1, 8, 32)
    for name, lens in (("50", [50]), ("300", [300]), ("2000", [2000]), ("mixed", [50, 300, 300, 2000]))
    if rows > 1 or name != "mixed"
]
PREFILL_CASES = [(0, 300), (0, 2000), (1500, 100), (1500, 500)]
MAX_CONTEXT = 2048


def milliseconds(run: Callable[[], object], budget_s: float) -> float:
    """Shortest CPU time of one call divided by the threads, after one call to warm up.

    On an idle machine that is the wall time; unlike it, it can be compared on a busy one.
    """
    run()
    times, deadline = [], time.perf_counter() + budget_s
    while len(times) < 2 or (len(times) < 50 and time.perf_counter() < deadline):
        begin = time.process_time()
        run()
        times.append((time.process_time() - begin) * 1e3 / torch.get_num_threads())
    return min(times)


class Pool:
    """KV buffers of all layers, so that no layer finds its slots in a cache that a real step would not have warm."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, slots: int) -> None:
        shape = (slots, args.kv_heads, args.head_dim)
        base = torch.randn(shape).to(dtype)
        self.layers = [(base.clone(), base.clone()) for _ in range(args.layers)]
        self.q_shape = (args.heads, args.head_dim)
        self.dtype = dtype
        self.scale = args.head_dim**-0.5
        self.gqa = args.heads != args.kv_heads
        # The two methods timed below read no state of the backend.
        self.upstream = object.__new__(TorchNativeAttnBackend)

    def decode(self, lens: list[int], budget_s: float) -> dict[str, float]:
        slots = self.layers[0][0].shape[0]
        shuffled, ordered = torch.zeros((2, len(lens), MAX_CONTEXT), dtype=torch.int32)
        scattered, offset = torch.randperm(slots)[: sum(lens)].to(torch.int32), 0
        for row, length in enumerate(lens):
            shuffled[row, :length] = scattered[offset : offset + length]
            ordered[row, :length] = torch.arange(offset, offset + length)
            offset += length
        rows, ends = torch.arange(len(lens)), torch.tensor(lens)
        starts, scratch = torch.zeros_like(ends), Scratch()
        q = torch.randn(len(lens), *self.q_shape).to(self.dtype)
        out = torch.empty_like(q)

        def upstream() -> None:
            for k, v in self.layers:
                self.upstream._run_sdpa_forward_decode(
                    q, out, k, v, shuffled, rows, ends, scaling=self.scale, enable_gqa=self.gqa
                )

        def ours(plan: RaggedPlan) -> None:
            for k, v in self.layers:
                attend(q, k, v, plan, sm_scale=self.scale)

        plans = [RaggedPlan.from_rows(table, rows, starts, ends, scratch=scratch) for table in (shuffled, ordered)]
        return {
            "plan": milliseconds(lambda: RaggedPlan.from_rows(shuffled, rows, starts, ends, scratch=scratch), budget_s),
            "upstream": milliseconds(upstream, budget_s),
            "ours": milliseconds(lambda: ours(plans[0]), budget_s),
            "in place": milliseconds(lambda: ours(plans[1]), budget_s),
        }

    def prefill(self, prefix: int, new: int, budget_s: float) -> dict[str, float]:
        k_new, v_new = (self.layers[0][0][:new].clone() for _ in "kv")
        table = torch.arange(prefix + new, dtype=torch.int32)[None]
        q = torch.randn(new, *self.q_shape).to(self.dtype)
        out = torch.empty_like(q)
        one = torch.tensor([0])
        lens = [torch.tensor([n]) for n in (prefix + new, prefix, new)]

        def upstream() -> None:
            for k, v in self.layers:
                self.upstream._run_sdpa_forward_extend(
                    q, out, k, v, table, one, *lens, scaling=self.scale, enable_gqa=self.gqa, causal=True
                )

        def ours() -> None:
            slots = table[0, :prefix].long()
            for k, v in self.layers:
                out[:] = attend_causal(q, k_new, v_new, k, v, slots, sm_scale=self.scale)

        return {"upstream": milliseconds(upstream, budget_s), "ours": milliseconds(ours, budget_s)}


def table(title: str, rows: list[tuple[str, dict[str, float]]]) -> None:
    columns = list(rows[0][1])
    print(f"\n{title}\n| case | {' | '.join(columns)} | upstream/ours |\n|{'---|' * (len(columns) + 2)}")
    for name, row in rows:
        print(f"| {name} | {' | '.join(f'{row[c]:.2f}' for c in columns)} | {row['upstream'] / row['ours']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 1), ("layers", 30), ("heads", 9), ("kv-heads", 3), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget-s", type=float, default=1.0, help="seconds spent on each figure")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {vars(args)}")
    for dtype in (torch.float32, torch.bfloat16):
        pool = Pool(args, dtype, slots=65_536)
        decode = [
            (f"{n} x {name}", pool.decode([lens[i % len(lens)] for i in range(n)], args.budget_s))
            for n, name, lens in DECODE_CASES
        ]
        table(f"decode, {dtype}, ms per step", decode)
        prefill = [(f"{new} after {prefix}", pool.prefill(prefix, new, args.budget_s)) for prefix, new in PREFILL_CASES]
        table(f"prefill, {dtype}, ms", prefill)


if __name__ == "__main__":
    main()
