"""Whole steps in CUDA graphs, and the ways in which a wait ends. One process, one GPU, a stream for each end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch
from loopback import Loopback, finishes, index

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.channel.ipc_words import EndpointError

BATCH = 12


@pytest.fixture
def loop() -> Iterator[Callable[..., Graphs]]:
    made: list[Graphs] = []

    def make(**kwargs: object) -> Graphs:
        made.append(Graphs(Loopback(bound=False, **kwargs)))
        return made[-1]

    yield make
    for each in made:
        each.channel.close()


class Graphs:
    """A decode step and an executor step, captured before there is a channel.

    The executor answers lane i with o = 2 q, lse = lane_lse[i]. Decode merges that into o_local, lse_local.
    """

    def __init__(self, channel: Loopback) -> None:
        self.channel = channel
        layers, heads, dim = channel.num_layers, channel.num_heads, channel.head_dim
        self.q = torch.zeros(layers, BATCH, heads, dim, dtype=channel.dtype, device="cuda")
        self.o_local, self.o = torch.zeros_like(self.q), torch.zeros_like(self.q)
        self.lse_local = torch.zeros(layers, BATCH, heads, device="cuda")
        self.lse = torch.zeros_like(self.lse_local)
        self.rows, self.lanes = index([-1] * BATCH), index([-1] * BATCH)
        self.lane_lse = torch.zeros(channel.lanes, heads, device="cuda")
        self.answer = torch.zeros_like(channel.o[0])  # not a local: the graph writes there for as long as it lives
        self.decode, self.executor = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.decode, stream=channel.decode_stream):
            words = channel.decode.words
            for layer in range(layers):
                kernels.put_queries(words, self.q[layer], self.rows, self.lanes, layer)
                self.o[layer].copy_(self.o_local[layer])
                self.lse[layer].copy_(self.lse_local[layer])
                kernels.wait_and_merge_(words, self.o[layer], self.lse[layer], self.rows, self.lanes, layer)
        with torch.cuda.graph(self.executor, stream=channel.executor_stream):
            words = channel.executor.words
            for layer in range(layers):
                kernels.wait_layer(words, layer) if layer else kernels.wait_step(words)
                torch.mul(channel.q[layer & 1], 2, out=self.answer)
                kernels.put_answers(words, self.answer, self.lane_lse, layer)
        torch.cuda.synchronize()
        channel.bind()

    def run(self, which: str) -> torch.cuda.Stream:
        stream = self.channel.decode_stream if which == "decode" else self.channel.executor_stream
        with torch.cuda.stream(stream):
            (self.decode if which == "decode" else self.executor).replay()
        return stream

    def randomize(self, generator: torch.Generator) -> None:
        """New inputs, rows and lanes for the next step."""
        offloaded = int(torch.randint(1, min(BATCH, self.channel.lanes) + 1, (), generator=generator))
        self.rows.fill_(-1)
        self.lanes.fill_(-1)
        self.rows[:offloaded] = index(torch.randperm(BATCH, generator=generator)[:offloaded])
        self.lanes[:offloaded] = index(torch.randperm(self.channel.lanes, generator=generator)[:offloaded])
        for tensor in (self.q, self.o_local, self.lse_local, self.lane_lse):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        torch.cuda.synchronize()

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = self.o_local.clone(), self.lse_local.clone()
        used = self.rows >= 0
        rows, lanes = self.rows[used].long(), self.lanes[used].long()
        for layer in range(self.channel.num_layers):
            merge_rows_(o[layer], lse[layer], self.q[layer][rows] * 2, self.lane_lse[lanes], rows)
        return o, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_graphs_many_steps_equal_reference(loop, dtype, num_layers):
    graphs = loop(dtype=dtype, num_layers=num_layers)
    generator = torch.Generator().manual_seed(num_layers)
    for step in range(1, 151):
        graphs.randomize(generator)
        graphs.run("executor")  # ahead of the step
        assert finishes(graphs.run("decode"), 5.0)
        o, lse = graphs.expected()
        torch.testing.assert_close(graphs.o, o)
        torch.testing.assert_close(graphs.lse, lse, rtol=1e-5, atol=1e-5)
        assert graphs.channel.q_flag.item() == step * num_layers + num_layers - 1
    decode, executor = graphs.channel.decode_host.status, graphs.channel.executor_host.status
    assert decode.steps_done == decode.steps_opened == executor.steps_done == executor.steps_opened == 150
    assert decode.waits == 150 * num_layers and decode.error == executor.error == 0


def test_graphs_several_steps_queued_on_both_sides_stay_in_step(loop):
    graphs = loop(num_layers=8)
    graphs.randomize(torch.Generator().manual_seed(0))
    for _ in range(50):
        graphs.run("decode")
    for _ in range(50):
        graphs.run("executor")
    assert finishes(graphs.channel.decode_stream, 10.0) and finishes(graphs.channel.executor_stream, 10.0)
    torch.testing.assert_close(graphs.o, graphs.expected()[0])
    assert graphs.channel.decode_host.status.steps_done == 50


def test_merge_no_answer_and_abort_ends_and_leaves_rows_alone(loop):
    graphs = loop(wait_limit_s=60.0)
    graphs.randomize(torch.Generator().manual_seed(3))
    stream = graphs.run("decode")
    assert not finishes(stream, 0.2), "nobody answered, yet the step ended"
    start = time.monotonic()
    graphs.channel.decode_host.control.abort = 1
    assert finishes(stream, 1.0)
    assert time.monotonic() - start < 0.1
    assert graphs.channel.decode_host.status.error == EndpointError.ABORTED
    assert torch.equal(graphs.o, graphs.o_local) and torch.equal(graphs.lse, graphs.lse_local)
    assert finishes(graphs.run("decode"), 1.0), "a failed endpoint must not wait again"
    assert graphs.channel.decode_host.status.steps_opened == 1


def test_merge_late_answer_is_an_error_and_is_not_used(loop):
    graphs = loop(wait_limit_s=0.1, num_layers=3)
    graphs.randomize(torch.Generator().manual_seed(4))
    stream = graphs.run("decode")
    start = time.monotonic()
    assert finishes(stream, 5.0)
    assert 0.05 < time.monotonic() - start < 1.0
    status = graphs.channel.decode_host.status
    assert status.error == EndpointError.LATE and divmod(status.error_call, 3) == (1, 0)
    graphs.run("executor")
    assert finishes(graphs.channel.executor_stream, 5.0)
    assert torch.equal(graphs.o, graphs.o_local)


def test_bind_after_failure_serves_again_from_step_one(loop):
    graphs = loop(wait_limit_s=0.05)
    graphs.randomize(torch.Generator().manual_seed(5))
    assert finishes(graphs.run("decode"), 5.0)
    assert graphs.channel.decode_host.status.error == EndpointError.LATE
    graphs.channel.q_flag.zero_()
    graphs.channel.decode_host.control.wait_limit_ns = 10**10
    graphs.channel.bind()
    graphs.run("executor")
    assert finishes(graphs.run("decode"), 5.0)
    torch.testing.assert_close(graphs.o, graphs.expected()[0])
    assert graphs.channel.words(graphs.channel.decode)["step"] == 1


def test_executor_cancelled_launch_opens_no_step_and_the_next_one_does(loop):
    graphs = loop(wait_limit_s=30.0)
    graphs.randomize(torch.Generator().manual_seed(6))
    stream = graphs.run("executor")
    assert not finishes(stream, 0.1)
    graphs.channel.executor_host.control.cancelled_launches = 1
    assert finishes(stream, 1.0)
    status = graphs.channel.executor_host.status
    assert (status.launches, status.steps_opened, status.error) == (1, 0, 0)
    assert graphs.channel.o_flag.item() == 0
    graphs.run("executor")
    assert finishes(graphs.run("decode"), 5.0)
    torch.testing.assert_close(graphs.o, graphs.expected()[0])


def test_executor_idle_limit_ends_a_launch_without_error(loop):
    graphs = loop()
    graphs.channel.executor_host.control.open_limit_ns = 50_000_000
    assert finishes(graphs.run("executor"), 2.0)
    status = graphs.channel.executor_host.status
    assert (status.launches, status.steps_opened, status.error) == (1, 0, 0)


def test_executor_peer_stops_in_the_middle_of_a_step_is_an_error(loop):
    graphs = loop(wait_limit_s=0.1)
    channel = graphs.channel
    graphs.randomize(torch.Generator().manual_seed(7))  # some rows: without any there is no step
    kernels.put_queries(channel.decode.words, graphs.q[0], graphs.rows, graphs.lanes, 0)
    torch.cuda.synchronize()
    assert finishes(graphs.run("executor"), 5.0)
    status = channel.executor_host.status
    assert status.error == EndpointError.LATE and status.error_call == channel.num_layers + 1
    assert (status.steps_opened, status.steps_done) == (1, 0)


def test_merge_hundreds_of_rows_notice_a_late_answer_as_soon_as_one_would():
    """All blocks looking at host memory made every wait of more than 10 us one of 1.5 ms."""
    _get_ready_to_sleep()
    alone_ns, together_ns = late_answer_wait_ns(1), late_answer_wait_ns(256)
    assert together_ns < 1.5 * alone_ns + 100_000, (alone_ns, together_ns)


def late_answer_wait_ns(rows: int) -> int:
    """How long decode waits for an answer to so many rows that comes 400,000 cycles late (0.2 ms at full clocks).

    What is launched here must be loaded already: to load a kernel may take an idle device, see `kernels.warm_up`.
    """
    channel = Loopback(lanes=rows, num_layers=1, num_heads=32)
    try:
        q = torch.randn(rows, 32, channel.head_dim, device="cuda").to(channel.dtype)
        o, lse = q.clone(), torch.zeros(rows, 32, device="cuda")
        answer, lane_lse = torch.zeros_like(q), torch.zeros(rows, 32, device="cuda")
        every = index(list(range(rows)))
        waited = []
        for _ in range(3):  # the last time counts
            torch.cuda.synchronize()
            with torch.cuda.stream(channel.executor_stream):
                kernels.wait_step(channel.executor.words)
                torch.cuda._sleep(400_000)
                kernels.put_answers(channel.executor.words, answer, lane_lse, 0)
            with torch.cuda.stream(channel.decode_stream):
                kernels.put_queries(channel.decode.words, q, every, every, 0)
                kernels.wait_and_merge_(channel.decode.words, o, lse, every, every, 0)
            assert finishes(channel.decode_stream, 5.0)
            waited.append(channel.words(channel.decode)["wait_ns"] - sum(waited))
        return waited[-1]
    finally:
        channel.close()


def test_work_between_the_kernels_of_a_layer_is_measured_on_both_ends():
    """The executor takes three times as long as decode, which then waits for what is missing."""
    cycles, layers = 400_000, 4
    channel = Loopback(num_layers=layers)
    try:
        _get_ready_to_sleep()
        q = torch.randn(2, channel.num_heads, channel.head_dim, device="cuda").to(channel.dtype)
        o, lse = q.clone(), torch.zeros(2, channel.num_heads, device="cuda")
        local_lse = lse.clone()
        rows, lanes = index([0, 1]), index([3, 1])
        torch.cuda.synchronize()
        for _ in range(2):  # the last time counts
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            work = [channel.words(end)["work_ns"] for end in (channel.decode, channel.executor)]
            with torch.cuda.stream(channel.executor_stream):
                for layer in range(layers):
                    words = channel.executor.words
                    kernels.wait_layer(words, layer) if layer else kernels.wait_step(words)
                    torch.cuda._sleep(3 * cycles)
                    kernels.put_answers(words, q, lse, layer, lanes)
            with torch.cuda.stream(channel.decode_stream):
                for layer in range(layers):
                    kernels.put_queries(channel.decode.words, q, rows, lanes, layer)
                    before.record()
                    torch.cuda._sleep(cycles)
                    after.record()
                    kernels.wait_and_merge_(channel.decode.words, o, local_lse, rows, lanes, layer)
            assert finishes(channel.decode_stream, 5.0) and finishes(channel.executor_stream, 5.0)
            spent_s = before.elapsed_time(after) * 1e-3 * layers
        ends = (channel.decode, channel.executor)
        local, busy = (channel.words(end)["work_ns"] * 1e-9 - was * 1e-9 for end, was in zip(ends, work, strict=True))
        waited = channel.words(channel.decode)["wait_ns"] * 1e-9
        print(f"measured: {spent_s=:.6f} {local=:.6f} {busy=:.6f} {waited=:.6f}")
        slack = layers * 30e-6
        assert spent_s * 0.9 < local < spent_s * 1.1 + slack
        assert 3 * spent_s * 0.9 < busy < 3 * spent_s * 1.1 + slack
        assert waited > 1.5 * spent_s
        for host, words in ((channel.decode_host, channel.decode), (channel.executor_host, channel.executor)):
            assert host.status.work_ns == channel.words(words)["work_ns"], "published with the last layer"
    finally:
        channel.close()


def _get_ready_to_sleep() -> None:
    """Loads the kernel that sleeps, and raises the clocks: an idle GPU counts its cycles at a sixth of the speed."""
    torch.cuda._sleep(1)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(300):
        a @ a
    torch.cuda.synchronize()
