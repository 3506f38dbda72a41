"""LaneAttention against attention in float64 on the same GPU, over lanes that share prefixes and lanes that do not."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_adrenaline.attention.lane_plan import most_rows, within_rows
from sglang_adrenaline.attention.shared_runs import SharedRuns
from sglang_adrenaline.channel.cuda_graph import CudaGraph
from sglang_adrenaline.prefill.executor import LayerKV
from sglang_adrenaline.prefill.lane_attention import LaneAttention

NUM_SLOTS = 20_000
SMS = 132
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of o, which is rounded to its dtype, as are the weights that values are multiplied with; values are of size 1."""


class Setup:
    def __init__(self, qo_heads, kv_heads, head_dim, dtype=torch.bfloat16, lanes=40, sms=SMS, layers=2) -> None:
        torch.manual_seed(qo_heads * head_dim)
        cuda = {"dtype": dtype, "device": "cuda"}
        size = (NUM_SLOTS, kv_heads, head_dim)
        self.layers = [
            LayerKV(torch.randn(size, **cuda), torch.randn(size, **cuda), head_dim**-0.5 * (1 + i), 0.0)
            for i in range(layers)
        ]
        self.shape, self.dtype = (lanes, qo_heads, head_dim), dtype
        self.attention = LaneAttention(
            self.layers, lanes=lanes, num_qo_heads=qo_heads, dtype=dtype, capacity=16 * NUM_SLOTS, sms=sms
        )
        self.rows = most_rows(lanes)
        self.slots: dict[int, torch.Tensor] = {}
        self.shared = SharedRuns()
        self.q = torch.randn(self.shape, **cuda)
        self.o = torch.full(self.shape, 77.0, **cuda)
        self.lse = torch.full(self.shape[:2], 77.0, device="cuda")

    def attach(self, lane: int, slots: list[int]) -> None:
        on_host = torch.tensor(slots, dtype=torch.int32)
        self.slots[lane] = on_host.cuda()
        self.shared.add(lane, on_host.numpy())

    def plan(self, lanes: list[int]) -> None:
        runs = within_rows(self.shared.runs(lanes), self.rows)
        self.attention.plan(runs, self.slots)

    def compare(self, lanes: list[int], layer: int = 0) -> float:
        """The largest error of o."""
        kv, worst = self.layers[layer], 0.0
        assert not self.o.isnan().any()
        for lane in range(self.shape[0]):
            if lane not in lanes:
                assert (self.o[lane] == 77).all() and (self.lse[lane] == 77).all()
                continue
            rows = self.slots[lane].long()
            group = self.shape[1] // kv.k.shape[1]
            k = kv.k[rows].double().repeat_interleave(group, 1)
            v = kv.v[rows].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,nhd->hn", self.q[lane].double(), k) * kv.sm_scale
            expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), v)
            lse = scores.logsumexp(-1) * 1.4426950408889634
            torch.testing.assert_close(self.lse[lane].double(), lse, rtol=1e-4, atol=1e-3)
            error = (self.o[lane].double() - expected).abs()
            limit = TOLERANCE[self.dtype] * (1 + expected.abs())
            assert (error <= limit).all(), f"lane {lane}: {error.max().item()}"
            worst = max(worst, error.max().item())
        return worst

    def check(self, lanes: list[int]) -> float:
        self.plan(lanes)
        worst = 0.0
        for layer in range(len(self.layers)):
            self.o.fill_(77.0)
            self.lse.fill_(77.0)
            self.attention.run(layer, self.q, self.o, self.lse)
            worst = max(worst, self.compare(lanes, layer))
        return worst


def scattered(rng: random.Random, length: int) -> list[int]:
    return rng.sample(range(1, NUM_SLOTS), length)


SHAPES = [(8, 8, 128), (32, 8, 128), (9, 3, 64), (16, 1, 128), (28, 4, 128), (8, 4, 256), (8, 8, 64), (32, 32, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_random_lanes_and_trees_equal_attention_in_float64(shape, dtype):
    setup = Setup(*shape, dtype=dtype)
    rng = random.Random(1)
    stems = [scattered(rng, length) for length in (64, 300, 1000, 2500)]
    worst = 0.0
    for _ in range(12):
        for lane in rng.sample(range(40), 15):
            slots = scattered(rng, rng.choice([1, 2, 15, 16, 17, 63, 64, 200, 777, 3000]))
            if rng.random() < 0.6:
                stem = rng.choice(stems)
                slots = stem[: rng.choice([64, 100, len(stem)])] + slots
            setup.attach(lane, slots)
        lanes = rng.sample(sorted(setup.slots), rng.randint(1, len(setup.slots)))
        worst = max(worst, setup.check(lanes))
    print(f"measured: {shape} {dtype}: largest error {worst:.2e}")


@pytest.mark.parametrize("sms", [1, 8, 132, 400])
def test_any_number_of_blocks_gives_the_same(sms):
    setup = Setup(32, 8, 128, sms=sms)
    rng = random.Random(2)
    stem = scattered(rng, 1500)
    for lane in range(0, 40, 2):
        setup.attach(lane, (stem if lane % 4 else []) + scattered(rng, 40 * lane + 1))
    setup.check(list(range(0, 40, 2)))


def test_one_long_lane_is_split_over_the_gpu():
    setup = Setup(32, 32, 128)
    setup.attach(7, list(range(1, 19_000)))
    setup.check([7])


def test_all_lanes_share_everything():
    setup = Setup(8, 2, 128)
    for lane in range(40):
        setup.attach(lane, list(range(5, 4000)))
    setup.check(list(range(40)))


def test_a_graph_follows_new_plans_and_no_lanes():
    setup = Setup(8, 8, 128)
    rng = random.Random(3)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        setup.plan([])
        setup.attention.run(1, setup.q, setup.o, setup.lse)
        graph = CudaGraph(stream)
        with graph.capture():
            for _ in range(3):  # partial results of one launch are gone before the next
                setup.attention.run(1, setup.q, setup.o, setup.lse)
        for lanes in ([3], list(range(40)), [], [0, 39]):
            for lane in lanes:
                setup.attach(lane, scattered(rng, rng.choice([1, 500, 6000])))
            setup.plan(lanes)
            setup.o.fill_(77.0)
            setup.lse.fill_(77.0)
            graph.launch()
            stream.synchronize()
            setup.compare(lanes, 1)
    graph.free()


def test_a_deep_tree_that_needs_too_many_partial_results_is_read_lane_by_lane():
    setup = Setup(8, 2, 64, lanes=40)
    setup.rows = 60
    rng = random.Random(4)
    stem: list[int] = []
    for lane in range(40):
        stem = stem + scattered(rng, 70)
        setup.attach(lane, stem)
    setup.check(list(range(40)))


def test_large_scores_do_not_overflow():
    setup = Setup(8, 8, 128)
    setup.q.mul_(300)
    setup.attach(0, list(range(1, 3000)))
    setup.plan([0])
    setup.attention.run(0, setup.q, setup.o, setup.lse)
    assert setup.o[0].isfinite().all() and setup.lse[0].isfinite().all()
    kv = setup.layers[0]
    scores = torch.einsum("hd,nhd->hn", setup.q[0].double(), kv.k[1:3000].double()) * kv.sm_scale
    torch.testing.assert_close(setup.lse[0].double(), scores.logsumexp(-1) * 1.4426950408889634, rtol=1e-4, atol=1e-2)


def test_bad_tensors_are_refused():
    setup = Setup(8, 8, 128)
    with pytest.raises(ValueError, match="contiguous"):
        setup.attention.run(0, setup.q[::2], setup.o[::2], setup.lse[::2])
    with pytest.raises(ValueError, match="shape of q"):
        setup.attention.run(0, setup.q, setup.o[:3], setup.lse)
    with pytest.raises(ValueError):
        setup.attention.run(0, setup.q.half(), setup.o, setup.lse)
    many = Setup(32, 32, 128)
    many.attention.capacity = 10
    many.attach(0, list(range(1, 50)))
    with pytest.raises(ValueError, match="49 slots"):
        many.plan([0])
