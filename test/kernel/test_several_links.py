"""Decode steps with rows on several links: executors of one process, on streams of their own, and of several ones."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from decode_graph import SHAPE, DecodeGraph, executor_for, open_end, spec_of, start_executor, wait_for
from loopback import Loopback, finishes, index
from peer import AHEAD

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.channel.ipc_endpoint import MAX_LINKS, IpcEndpoints
from sglang_adrenaline.channel.ipc_words import EndpointError
from sglang_adrenaline.errors import ChannelError

BATCH, LAYERS = 24, 3


class Executor(Loopback):
    """Answers o = factor * q, lse = lane_lse; a step is a graph."""

    def prepare(self, factor: float, stream: torch.cuda.Stream) -> None:
        self.factor, self.executor_stream = factor, stream
        self.lane_lse = torch.randn(self.lanes, self.num_heads, device="cuda")
        self.answer = torch.zeros_like(self.o[0])  # not a local: the graph writes there for as long as it lives
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.executor_stream):
            words = self.executor.words
            for layer in range(self.num_layers):
                kernels.wait_layer(words, layer) if layer else kernels.wait_step(words)
                torch.mul(self.q[layer & 1], factor, out=self.answer)
                kernels.put_answers(words, self.answer, self.lane_lse, layer)
        self.bind()

    def launch(self) -> None:
        with torch.cuda.stream(self.executor_stream):
            self.graph.replay()


class Decode:
    """A step over all endpoints of a rank, captured before any executor is there."""

    def __init__(self) -> None:
        self.endpoints = IpcEndpoints(0)
        self.executors: list[Executor] = []
        # Side by side: CUDA deals streams out to 8 hardware queues in turn (CUDA_DEVICE_MAX_CONNECTIONS), and what is
        # in decode's queue behind an executor that waits for decode never begins. Each Loopback makes several streams.
        self.stream, *self.executor_streams = (torch.cuda.Stream() for _ in range(1 + MAX_LINKS))
        self.q = torch.zeros(LAYERS, BATCH, 8, 128, dtype=torch.bfloat16, device="cuda")
        self.o_local, self.o = torch.zeros_like(self.q), torch.zeros_like(self.q)
        self.lse_local = torch.zeros(LAYERS, BATCH, 8, device="cuda")
        self.lse = torch.zeros_like(self.lse_local)
        self.rows, self.places = index([-1] * BATCH), index([-1] * BATCH)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            words = self.endpoints.words
            for layer in range(LAYERS):
                kernels.put_queries(words, self.q[layer], self.rows, self.places, layer)
                self.o[layer].copy_(self.o_local[layer])
                self.lse[layer].copy_(self.lse_local[layer])
                kernels.wait_and_merge_(words, self.o[layer], self.lse[layer], self.rows, self.places, layer)

    def join(self, wait_limit_s: float = 10.0) -> Executor:
        endpoint = self.endpoints.take()
        executor = Executor(lanes=10, num_layers=LAYERS, wait_limit_s=wait_limit_s, bound=False, in_group=endpoint)
        self.executors.append(executor)
        executor.prepare(1.0 + len(self.executors), self.executor_streams[len(self.executors) - 1])
        return executor

    def step(self, counts: Sequence[int], *, silent: Sequence[Executor] = ()) -> None:
        """Random inputs and one step with so many rows of each executor; waits for it and compares.

        Executors without rows are not launched; `silent` ones neither, and their rows stay as they were. The comparison
        is made on the CPU, where a wrong index is one test's error and not the end of the process's CUDA context.
        """
        taken = torch.randperm(BATCH)[: sum(counts)]
        parts = [(executor, rows) for executor, rows in zip(self.executors, taken.split(list(counts)), strict=True)]
        places, expected = [], []
        for tensor in (self.q, self.o_local, self.lse_local):
            tensor.normal_()
        for executor, rows in parts:
            lanes = torch.randperm(executor.lanes)[: len(rows)]
            places += executor.decode.places(lanes.tolist())
            expected.append((executor, rows, lanes))
        order = torch.randperm(len(places))  # rows of links are mixed in the kernels' blocks, too
        self.rows.fill_(-1)
        self.places.fill_(-1)
        self.rows[: len(places)] = index(taken[order])
        self.places[: len(places)] = index(torch.tensor(places, dtype=torch.int32)[order])
        torch.cuda.synchronize()
        for executor, rows in parts:
            if len(rows) and executor not in silent:
                executor.launch()
        with torch.cuda.stream(self.stream):
            self.graph.replay()
        assert finishes(self.stream, 15.0)
        q, o, lse = self.q.cpu(), self.o_local.cpu(), self.lse_local.cpu()
        for executor, rows, lanes in expected:
            if executor not in silent:
                lane_lse = executor.lane_lse.cpu()[lanes]
                for layer in range(LAYERS):
                    merge_rows_(o[layer], lse[layer], q[layer][rows] * executor.factor, lane_lse, rows)
        torch.testing.assert_close(self.o.cpu(), o)
        torch.testing.assert_close(self.lse.cpu(), lse, rtol=1e-5, atol=1e-5)


@pytest.fixture
def decode() -> Iterator[Decode]:
    made = Decode()
    yield made
    for executor in made.executors:  # before the first one is closed, which waits for the device
        executor.abort()
    for executor in made.executors:
        executor.close()


def steps_of(decode: Decode) -> list[int]:
    return [executor.decode_host.status.steps_done for executor in decode.executors]


def test_rows_go_to_their_executors_and_idle_links_are_left_alone(decode):
    for _ in range(MAX_LINKS):
        decode.join()
    steps = [0] * MAX_LINKS
    for number in range(60):
        counts = [int(torch.randint(0, 7, ())) if (number + i) % 3 else 0 for i in range(MAX_LINKS)]
        if not any(counts):
            counts[number % MAX_LINKS] = 1
        decode.step(counts)
        steps = [steps + (count > 0) for steps, count in zip(steps, counts, strict=True)]
        assert steps_of(decode) == steps
    for executor, count in zip(decode.executors, steps, strict=True):
        assert executor.q_flag.item() == count * LAYERS + LAYERS - 1
        assert executor.decode_host.status.waits == count * LAYERS and executor.decode_host.status.error == 0
        assert finishes(executor.executor_stream, 5.0) and executor.executor_host.status.steps_done == count


def test_links_that_join_later_serve_under_the_same_graph(decode):
    for number in range(1, MAX_LINKS + 1):
        decode.join()
        for _ in range(10):
            decode.step([BATCH // MAX_LINKS] * number)
    assert steps_of(decode) == [10 * left for left in range(MAX_LINKS, 0, -1)]


def test_executor_that_is_late_costs_only_its_own_rows(decode):
    steady, late = decode.join(), decode.join(wait_limit_s=0.2)
    for _ in range(5):
        decode.step([8, 8])
    decode.step([8, 8], silent=[late])
    status = late.decode_host.status
    assert status.error == EndpointError.LATE and divmod(status.error_call, LAYERS) == (6, 0)
    begun = time.monotonic()
    for _ in range(20):
        decode.step([8, 8], silent=[late])
    assert time.monotonic() - begun < 4.0, "a failed link is waited for again"
    assert steady.decode_host.status.error == 0 and steps_of(decode) == [26, 5]


def test_abort_of_one_link_ends_the_step_with_the_answers_of_the_others(decode):
    steady, gone = decode.join(wait_limit_s=60.0), decode.join(wait_limit_s=60.0)
    decode.step([8, 8])
    gone.decode_host.control.abort = 1
    decode.step([8, 8], silent=[gone])
    assert gone.decode_host.status.error == EndpointError.ABORTED and steady.decode_host.status.error == 0
    replaced = Executor(lanes=10, num_layers=LAYERS, bound=False, in_group=gone.decode)
    replaced.prepare(9.0, gone.executor_stream)
    decode.executors[1] = replaced
    gone.close()
    for _ in range(10):
        decode.step([8, 8])
    assert steps_of(decode) == [12, 10]


def test_endpoints_are_given_once_and_come_back():
    endpoints = IpcEndpoints(0)
    taken = [endpoints.take() for _ in range(MAX_LINKS)]
    assert len({endpoint.words.data_ptr() for endpoint in taken}) == MAX_LINKS
    with pytest.raises(ChannelError, match=f"at most {MAX_LINKS} prefill servers"):
        endpoints.take()
    taken[2].free()
    taken[2].free()
    assert endpoints.take() is taken[2]
    with pytest.raises(ChannelError):
        endpoints.take()


def test_two_executor_processes_share_a_batch_and_a_third_joins(start, opened, peer_gpu):
    graph = DecodeGraph(SHAPE)
    ends = []
    for factor in (2.0, 3.0, 5.0):
        spec = executor_for(start, peer_gpu if factor == 3.0 else 0, "graph", factor=factor)
        ends.append(open_end(opened, spec, endpoint=graph.endpoints.take()))
        graph.factors[ends[-1]] = factor
        for step in range(40):
            first = len(ends) - 1 - step % len(ends)  # the newest one first; in some steps it is alone
            graph.step({end: 1 + (step + i) % 6 for i, end in enumerate(ends[first:])})
            graph.check()
    assert [end.failure for end in ends] == [None, None, None]
    assert ends[2].steps == 40 and ends[0].steps < 120


def test_executor_killed_in_a_step_takes_only_its_rows(start, opened, peer_gpu):
    graph = DecodeGraph(SHAPE)
    victim = start_executor(start, peer_gpu, "graph", factor=3.0)
    lost = open_end(opened, spec_of(victim), endpoint=graph.endpoints.take())
    steady = open_end(opened, executor_for(start, 0, "graph"), endpoint=graph.endpoints.take())
    graph.factors[lost] = 3.0
    for _ in range(20):
        graph.step({lost: 8, steady: 8})
    graph.check()
    victim.send_signal(signal.SIGSTOP)
    for _ in range(AHEAD + 1):  # its GPU still answers the launches that it is ahead
        graph.step({lost: 8, steady: 8})
        if not wait_for(graph.stream.query, 0.5):
            break
        graph.check()
    assert not graph.stream.query(), "the GPU should wait for the stopped executor now"
    victim.kill()
    killed = time.monotonic()
    assert wait_for(graph.stream.query, 8.0), "the GPU still waits for a dead executor"
    print(f"measured: decode's GPU went on {time.monotonic() - killed:.2f} s after one of two executors was killed")
    graph.check(unanswered=[lost])
    assert "its process has ended" in str(lost.failure)
    for step in range(40):
        graph.step({steady: 1 + step % 16})
        graph.check()
    assert lost.close(timeout_s=5.0), "memory was not freed"
    again = open_end(opened, executor_for(start, peer_gpu, "graph"), endpoint=graph.endpoints.take())
    for _ in range(20):
        graph.step({again: 8, steady: 8})
        graph.check()
    assert again.failure is None and steady.failure is None
