"""Our kernel over rows of a decode batch, in a graph, against attention in float64: from a start on, in halves."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from sglang_adrenaline.attention.local_rows import KernelRows, Span
from sglang_adrenaline.attention.planned import Heads, Workspace
from sglang_adrenaline.channel.cuda_graph import CudaGraph

NUM_SLOTS, CONTEXT, ROWS = 30_000, 2_500, 48
TOLERANCE = 8e-3
"""Of o, as test_attend.py's."""


class Pool:
    """A KV pool of two layers and SGLang's table of requests' slots."""

    def __init__(self, heads: Heads) -> None:
        torch.manual_seed(0)
        cuda = {"dtype": torch.bfloat16, "device": "cuda"}
        size = (NUM_SLOTS, heads.kv_heads, heads.head_dim)
        self.layers = [(torch.randn(size, **cuda), torch.randn(size, **cuda)) for _ in range(2)]
        self.req_to_token = torch.randint(1, NUM_SLOTS, (ROWS + 8, CONTEXT), dtype=torch.int32, device="cuda")
        self.q = torch.randn(ROWS, heads.num_qo_heads, heads.head_dim, **cuda)
        self.slots = torch.zeros(2 * ROWS * CONTEXT, dtype=torch.int32, device="cuda")

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer_id]

    def expected(self, row: int, request: int, start: int, length: int, layer: int, scale: float):
        """o, lse of one row in float64."""
        slots = self.req_to_token[request, start : start + length].long()
        k, v = (part[slots].double() for part in self.layers[layer])
        group = self.q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("hd,nhd->hn", self.q[row].double(), k) * scale
        return torch.einsum("hn,nhd->hd", scores.softmax(-1), v), scores.logsumexp(-1) * 1.4426950408889634


def random_span(rng: random.Random, count: int) -> tuple[Span, list[tuple[int, int, int]]]:
    """(span, [(request, start, length)]); requests in any order, as a batch has them."""
    requests = rng.sample(range(ROWS + 8), count)
    places = [(request, rng.choice([0, 0, 1, 64, 1000]), rng.choice([1, 2, 17, 300, 1499])) for request in requests]
    rows, starts, lens = (torch.tensor(part, dtype=torch.int64) for part in zip(*places, strict=True))
    return Span(rows.cuda(), starts.cuda(), lens.cuda(), lens), places


@pytest.mark.parametrize("shape", [(32, 8, 128), (28, 4, 128), (16, 8, 64), (8, 8, 128)], ids=str)
def test_graph_replays_with_each_plan(shape):
    heads = Heads(*shape)
    pool, rng = Pool(heads), random.Random(2)
    stream = torch.cuda.Stream()
    layers = [SimpleNamespace(layer_id=i, scaling=heads.head_dim**-0.5 * (1 + i)) for i in range(2)]
    middle = ROWS // 2
    with torch.cuda.stream(stream):
        work = Workspace.make(ROWS, heads, torch.device("cuda", 0))
        whole = KernelRows(ROWS, heads, work, pool.slots, pool.req_to_token, pool)
        parts = [slice(0, middle), slice(middle, ROWS)]
        half_slots = pool.slots.split(pool.slots.numel() // 2)
        halves = [KernelRows(middle, heads, work, each, pool.req_to_token, pool) for each in half_slots]
        span, _ = random_span(rng, ROWS)
        whole.plan(span)
        whole.attend(pool.q, layers[0])
        graphs = {}
        for name, attends in (("whole", [(slice(0, ROWS), whole)]), ("halves", list(zip(parts, halves, strict=True)))):
            graph = CudaGraph(stream)
            with graph.capture():
                results = [[rows_of.attend(pool.q[part], layer) for layer in layers] for part, rows_of in attends]
            graphs[name] = (graph, attends, results)
        for _ in range(6):
            for graph, attends, results in graphs.values():
                span, places = random_span(rng, ROWS)
                for part, rows_of in attends:
                    rows_of.plan(Span(*(each[part] for each in span)))
                graph.launch()
                stream.synchronize()
                for (part, _), of_layers in zip(attends, results, strict=True):
                    for layer, (o, lse) in zip(layers, of_layers, strict=True):
                        for row, place in enumerate(places[part]):
                            want_o, want_lse = pool.expected(part.start + row, *place, layer.layer_id, layer.scaling)
                            torch.testing.assert_close(lse[row].double(), want_lse, rtol=1e-4, atol=1e-3)
                            error = (o[row].double() - want_o).abs()
                            assert (error <= TOLERANCE * (1 + want_o.abs())).all(), (place, error.max().item())
        for graph, _, _ in graphs.values():
            graph.free()
