"""Channel `ipc` between two processes, on one GPU and on two: exactness, graphs, deaths, lateness, release."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import msgspec
import peer as peer_process
import pytest
import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.channel import ipc
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint
from sglang_adrenaline.errors import ChannelError, PeerLostError

SHAPE = ChannelShape(lanes=16, num_layers=3, num_qo_heads=8, head_dim=128, v_head_dim=128, dtype="bfloat16")
PEER = pathlib.Path(__file__).with_name("peer.py")
START_S = 90.0
BATCH = 20


@pytest.fixture(params=[0, 1], ids=["one-gpu", "two-gpus"])
def peer_gpu(request: pytest.FixtureRequest) -> int:
    """The other process's GPU; this one is on GPU 0."""
    if request.param >= torch.cuda.device_count():
        pytest.skip(f"needs {request.param + 1} GPUs")
    return request.param


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def run(*args: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(PEER), *map(str, args)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield run
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            process.communicate(timeout=20.0)
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=5.0)


@pytest.fixture
def opened() -> Iterator[list[ipc.IpcDecodeEnd | ipc.IpcExecutorEnd]]:
    ends: list[ipc.IpcDecodeEnd | ipc.IpcExecutorEnd] = []
    yield ends
    for end in ends:
        end.close(timeout_s=5.0)


def spec_of(process: subprocess.Popen[str]) -> ChannelSpec:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the peer ended with code {process.wait(5.0)}"
    return msgspec.json.decode(line, type=ChannelSpec)


def wait_for(condition: Callable[[], object], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


class DecodeGraph:
    """A decode step over an endpoint, captured before there is a channel."""

    def __init__(self, shape: ChannelShape, *, forked: bool = False) -> None:
        """`forked`: put beside the local work, as a branch of the graph that the merge joins."""
        self.endpoint = IpcEndpoint(0)
        self.shape = shape
        self.stream = torch.cuda.Stream()
        size = (shape.num_layers, BATCH, shape.num_qo_heads)
        self.q = torch.zeros(*size, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        self.o_local, self.o = torch.zeros_like(self.q), torch.zeros_like(self.q)
        self.lse_local = torch.zeros(size, device="cuda")
        self.lse = torch.zeros_like(self.lse_local)
        self.rows = torch.full((BATCH,), -1, dtype=torch.int32, device="cuda")
        self.lanes = torch.full_like(self.rows, -1)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            branch = torch.cuda.Stream() if forked else self.stream
            for layer in range(shape.num_layers):
                branch.wait_stream(self.stream)
                with torch.cuda.stream(branch):
                    kernels.put_queries(self.endpoint.words, self.q[layer], self.rows, self.lanes, layer)
                self.o[layer].copy_(self.o_local[layer])
                self.lse[layer].copy_(self.lse_local[layer])
                self.stream.wait_stream(branch)
                kernels.wait_and_merge_(
                    self.endpoint.words, self.o[layer], self.lse[layer], self.rows, self.lanes, layer
                )

    def step(self, end: ipc.IpcDecodeEnd, offloaded: int) -> None:
        """Random inputs, then one replay; does not wait for it."""
        with torch.cuda.stream(self.stream):
            for tensor in (self.q, self.o_local, self.lse_local):
                tensor.normal_()
            self.rows.fill_(-1)
            self.lanes.fill_(-1)
            self.rows[:offloaded] = torch.randperm(BATCH, device="cuda")[:offloaded].int()
            self.lanes[:offloaded] = torch.randperm(self.shape.lanes, device="cuda")[:offloaded].int()
            end.begin_step(self.lanes[:offloaded].tolist())
            self.graph.replay()

    def check(self) -> None:
        """Compare the outputs of the last step with the torch reference."""
        self.stream.synchronize()
        o, lse = self.o_local.clone(), self.lse_local.clone()
        used = self.rows >= 0
        rows, lanes = self.rows[used].long(), self.lanes[used].long()
        remote_lse = peer_process.lane_lse(self.shape).cuda()[lanes]
        for layer in range(self.shape.num_layers):
            merge_rows_(o[layer], lse[layer], self.q[layer][rows] * 2, remote_lse, rows)
        torch.testing.assert_close(self.o, o)
        torch.testing.assert_close(self.lse, lse, rtol=1e-5, atol=1e-5)


def executor_for(start: Start, gpu: int, mode: str, shape: ChannelShape = SHAPE, wait_s: float = 20.0) -> ChannelSpec:
    return spec_of(start("executor", gpu, mode, msgspec.json.encode(shape).decode(), wait_s))


def open_end(opened: list, spec: ChannelSpec, wait_s: float = 20.0, **kwargs: object) -> ipc.IpcDecodeEnd:
    end = ipc.open_decode_end(spec, device=0, wait_timeout=wait_s, **kwargs)
    opened.append(end)
    return end


def test_calls_changing_lanes_equal_reference(start, opened, peer_gpu):
    end = open_end(opened, executor_for(start, peer_gpu, "eager"), expected=SHAPE)
    lse = peer_process.lane_lse(SHAPE)
    for step, lanes in enumerate([(3,), (3,), (0, 15, 7), tuple(range(16)), (15, 0)] * 4, start=1):
        assert end.begin_step(lanes) == step
        sent, got = [], []
        for layer in range(SHAPE.num_layers):
            sent.append(torch.randn(len(lanes), 8, 128, device="cuda").bfloat16())
            end.send_q(layer, sent[-1])
            got.append(end.recv(layer))
        torch.cuda.synchronize()
        for q, (o, answered_lse) in zip(sent, got, strict=True):
            assert torch.equal(o, q * 2)
            assert torch.equal(answered_lse.cpu(), lse[list(lanes)])
    assert end.failure is None and end.waits == end.steps * SHAPE.num_layers


@pytest.mark.parametrize("forked", [False, True], ids=["line", "forked"])
def test_graphs_every_step_equals_reference(start, opened, peer_gpu, forked):
    graph = DecodeGraph(SHAPE, forked=forked)
    end = open_end(opened, executor_for(start, peer_gpu, "graph"), endpoint=graph.endpoint)
    for step in range(200):
        graph.step(end, offloaded=step % 17)
        graph.check()
    assert end.failure is None and end.steps == 200


def test_graphs_queued_steps_do_not_lose_count(start, opened, peer_gpu):
    graph = DecodeGraph(SHAPE)
    end = open_end(opened, executor_for(start, peer_gpu, "graph"), endpoint=graph.endpoint)
    for _ in range(20):
        for _ in range(4):
            graph.step(end, offloaded=16)
        graph.check()
    assert end.failure is None


def test_abandoned_steps_leave_the_channel_usable(start, opened, peer_gpu):
    end = open_end(opened, executor_for(start, peer_gpu, "eager"))
    for lanes in [(1, 2), (4,), (5, 6, 7)]:
        end.begin_step(lanes)
        q = torch.randn(len(lanes), 8, 128, device="cuda").bfloat16()
        end.send_q(0, q)
        end.abandon_step()
        end.begin_step(lanes)
        for layer in range(SHAPE.num_layers):
            end.send_q(layer, q)
            assert torch.equal(end.recv(layer)[0], q * 2)
    torch.cuda.synchronize()
    time.sleep(0.2)
    assert end.failure is None


def test_executor_killed_in_a_step_fails_soon_and_another_one_serves(start, opened, peer_gpu):
    graph = DecodeGraph(SHAPE)
    process = start("executor", peer_gpu, "graph", msgspec.json.encode(SHAPE).decode(), 20.0)
    end = open_end(opened, spec_of(process), endpoint=graph.endpoint)
    for _ in range(20):
        graph.step(end, offloaded=16)
    graph.check()
    process.send_signal(signal.SIGSTOP)
    for _ in range(peer_process.AHEAD + 1):  # its GPU still answers the launches that it is ahead
        graph.step(end, offloaded=16)
    assert not wait_for(graph.stream.query, 0.3), "the GPU should wait for the executor now"
    process.kill()
    killed = time.monotonic()
    assert wait_for(graph.stream.query, 8.0), "the GPU still waits for a dead executor"
    print(f"measured: decode's GPU was free {time.monotonic() - killed:.2f} s after the executor was killed")
    with pytest.raises(PeerLostError):
        graph.step(end, offloaded=16)
    assert "its process has ended" in str(end.failure)
    assert end.close(timeout_s=5.0), "memory was not freed"
    torch.cuda.synchronize()  # raises if the dead peer's memory took the context down
    again = open_end(opened, executor_for(start, peer_gpu, "graph"), endpoint=graph.endpoint)
    for _ in range(20):
        graph.step(again, offloaded=16)
        graph.check()
    assert again.failure is None


def test_executor_that_stalls_is_late(start, opened, peer_gpu):
    end = open_end(opened, executor_for(start, peer_gpu, "stall:3"), wait_s=1.0)
    q = torch.randn(1, 8, 128, device="cuda").bfloat16()
    began = time.monotonic()
    with pytest.raises(PeerLostError, match="step 3, layer 0: nothing came within 1 s"):
        for _ in range(10):
            end.begin_step([0])
            for layer in range(SHAPE.num_layers):
                end.send_q(layer, q)
                end.recv(layer)
            assert wait_for(torch.cuda.current_stream().query, 5.0)
    assert time.monotonic() - began < 6.0


def test_decode_killed_ends_the_executor_and_frees_its_memory(start, opened, peer_gpu):
    end = ipc.create_executor_end(SHAPE, device=0, wait_timeout=20.0)
    opened.append(end)
    process = start("decode", peer_gpu, msgspec.json.encode(end.spec).decode(), 20.0)
    assert wait_for(lambda: end.connect(0.1), START_S)
    lse = peer_process.lane_lse(SHAPE).cuda()

    def serve_until(done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30.0
        while not done() and time.monotonic() < deadline:
            call = end.wait_call(0.1)
            if call is not None:
                end.answer(call, call.q * 2, lse[list(call.lanes)])

    serve_until(lambda: end.steps_done >= 40)
    assert end.steps_done >= 40
    process.kill()
    killed = time.monotonic()
    with pytest.raises(PeerLostError, match="its process has ended"):
        serve_until(lambda: False)
    assert time.monotonic() - killed < 8.0
    print(f"measured: the executor knew {time.monotonic() - killed:.2f} s after decode was killed")
    assert end.close(timeout_s=5.0), "memory was not freed"
    torch.cuda.synchronize()


def test_close_tells_the_peer_and_both_free_their_memory(start, opened, peer_gpu):
    process = start("executor", peer_gpu, "graph", msgspec.json.encode(SHAPE).decode(), 20.0)
    end = open_end(opened, spec_of(process))
    assert end.close(timeout_s=10.0), "memory was not freed"
    with pytest.raises(PeerLostError, match="closed"):
        end.begin_step([0])
    process.communicate(timeout=20.0)
    assert process.returncode == 0


def test_open_refuses_another_shape_and_a_second_opener(start, opened):
    spec = executor_for(start, 0, "eager")
    other = msgspec.structs.replace(SHAPE, head_dim=64)
    with pytest.raises(ChannelError, match="head_dim 128, not 64"):
        ipc.open_decode_end(spec, device=0, wait_timeout=1.0, expected=other)
    open_end(opened, spec)
    with pytest.raises(ChannelError, match="in use by process"):
        ipc.open_decode_end(spec, device=0, wait_timeout=1.0)
    stale = msgspec.structs.replace(spec, token="0" * 32)
    with pytest.raises(ChannelError, match="another channel"):
        ipc.open_decode_end(stale, device=0, wait_timeout=1.0)


def test_begin_step_bad_lanes_raise(start, opened):
    end = open_end(opened, executor_for(start, 0, "eager"))
    for lanes in [(), (16,), (-1,), (2, 2)]:
        with pytest.raises(ValueError, match="lanes must be"):
            end.begin_step(lanes)
    assert end.steps == 0


def test_float32_is_refused():
    with pytest.raises(ChannelError, match="float32"):
        ipc.create_executor_end(msgspec.structs.replace(SHAPE, dtype="float32"), device=0, wait_timeout=1.0)
