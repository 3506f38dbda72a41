"""Channel `ipc` between two processes, on one GPU and on two: exactness, graphs, deaths, lateness, release."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import msgspec
import peer as peer_process
import pytest
import torch
from decode_graph import SHAPE, DecodeGraph, executor_for, open_end, spec_of, start_executor, wait_for

from sglang_adrenaline.channel import ipc
from sglang_adrenaline.errors import ChannelError, PeerLostError

START_S = 90.0


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
    end = open_end(opened, executor_for(start, peer_gpu, "graph"), endpoint=graph.endpoints.take())
    for step in range(200):
        graph.step({end: 1 + step % 16})
        graph.check()
    assert end.failure is None and end.steps == 200


def test_graphs_queued_steps_do_not_lose_count(start, opened, peer_gpu):
    graph = DecodeGraph(SHAPE)
    end = open_end(opened, executor_for(start, peer_gpu, "graph"), endpoint=graph.endpoints.take())
    for _ in range(20):
        for _ in range(4):
            graph.step({end: 16})
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
    process = start_executor(start, peer_gpu, "graph")
    end = open_end(opened, spec_of(process), endpoint=graph.endpoints.take())
    for _ in range(20):
        graph.step({end: 16})
    graph.check()
    process.send_signal(signal.SIGSTOP)
    for _ in range(peer_process.AHEAD + 1):  # its GPU still answers the launches that it is ahead
        graph.step({end: 16})
    assert not wait_for(graph.stream.query, 0.3), "the GPU should wait for the executor now"
    process.kill()
    killed = time.monotonic()
    assert wait_for(graph.stream.query, 8.0), "the GPU still waits for a dead executor"
    print(f"measured: decode's GPU was free {time.monotonic() - killed:.2f} s after the executor was killed")
    with pytest.raises(PeerLostError):
        graph.step({end: 16})
    assert "its process has ended" in str(end.failure)
    assert end.close(timeout_s=5.0), "memory was not freed"
    torch.cuda.synchronize()  # raises if the dead peer's memory took the context down
    again = open_end(opened, executor_for(start, peer_gpu, "graph"), endpoint=graph.endpoints.take())
    for _ in range(20):
        graph.step({again: 16})
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
    process = start_executor(start, peer_gpu, "graph")
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
