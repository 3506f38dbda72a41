"""What every kind of channel for CPUs promises, with a second process wherever two processes matter."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time

import msgspec
import pytest
import torch

from sglang_adrenaline.channel import net, opening
from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.errors import ChannelError, PeerLostError

SHAPE = ChannelShape(lanes=16, num_layers=5, num_qo_heads=3, head_dim=8, v_head_dim=4, dtype="float32")
MP = multiprocessing.get_context("forkserver")
MP.set_forkserver_preload(["torch", "sglang_adrenaline.channel.opening"])  # imported once, not once per process


GONE = "process has ended|connection was closed"


@pytest.fixture(params=["shm", "zmq"])
def kind(request) -> str:
    return request.param


def create(kind, shape=SHAPE, peer="decode"):
    return opening.create_executor_end(kind, shape, device=None, wait_timeout=1.0, peer=peer)


def open_(spec, wait_timeout, peer="prefill"):
    return opening.open_decode_end(
        spec, device=None, endpoints=None, wait_timeout=wait_timeout, expected=spec.shape, peer=peer
    )


def expected_answer(q: torch.Tensor, lanes, step: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the executor of these tests computes: depends on every input, so that no mix-up goes unnoticed."""
    lane = torch.tensor(lanes, dtype=torch.float32).view(-1, 1)
    lse = q.float().sum(-1) + lane * 100 + step + layer * 0.5
    return (q[..., : SHAPE.v_head_dim].float() + lane.unsqueeze(-1) + layer).to(q.dtype), lse


def serve(end, delay_s: float = 0.0) -> None:
    """Answer calls until the channel ends."""
    with contextlib.suppress(PeerLostError):
        while True:
            call = end.wait_call(0.5)
            if call is not None:
                time.sleep(delay_s)
                end.answer(call, *expected_answer(call.q, call.lanes, call.step, call.layer))


def executor_process(conn, kind, shape, behaviour: str) -> None:
    torch.set_num_threads(1)
    end = create(kind, shape, peer="decode under test")
    conn.send(end.spec)
    if behaviour == "serve":
        serve(end)
    elif behaviour == "slow":
        serve(end, delay_s=0.02)
    elif behaviour == "deaf":
        time.sleep(60)
    elif behaviour == "take one":
        while end.wait_call(1.0) is None:
            pass
        conn.send("taken")
        time.sleep(60)
    elif behaviour == "abort":
        while end.wait_call(1.0) is None:
            pass
        end.abort("no more KV")
        conn.recv()
    end.close()
    conn.send("closed")


def decode_process(conn, spec) -> None:
    """Begins a step, sends one q and then waits to be killed."""
    end = open_(spec, wait_timeout=60)
    end.begin_step([0])
    end.send_q(0, torch.zeros(1, SHAPE.num_qo_heads, SHAPE.head_dim))
    conn.send("sent")
    time.sleep(60)


@pytest.fixture
def spawn():
    """Start a function in a process of its own, connected by a pipe; all are gone afterwards."""
    started = []

    def start(target, *args):
        ours, theirs = MP.Pipe()
        process = MP.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
        return process, ours

    yield start
    for process, conn in started:
        conn.close()
        process.kill()
        process.join(10)
        assert process.exitcode is not None


def receive(conn, timeout=60):
    assert conn.poll(timeout), "the other process said nothing"
    return conn.recv()


def connect(spawn, kind, behaviour: str, wait_timeout=10.0, shape=SHAPE):
    process, conn = spawn(executor_process, kind, shape, behaviour)
    spec = receive(conn)
    return process, conn, open_(spec, wait_timeout, peer="prefill under test")


@pytest.fixture
def pair(kind):
    """Both ends in this process, for what needs no second one."""
    executor = create(kind)
    decode = open_(executor.spec, wait_timeout=1.0)
    yield decode, executor
    decode.close()
    executor.close()


def random_q(rows: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(rows, shape.num_qo_heads, shape.head_dim).to(getattr(torch, shape.dtype))


def run_layer(decode, step, layer, lanes, shape=SHAPE) -> None:
    q = random_q(len(lanes), shape)
    decode.send_q(layer, q)
    o, lse = decode.recv(layer)
    want_o, want_lse = expected_answer(q, lanes, step, layer)
    assert torch.equal(o, want_o) and torch.equal(lse, want_lse), (step, layer, lanes)


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_steps_with_random_lanes_are_exact(kind, spawn, dtype):
    shape = msgspec.structs.replace(SHAPE, dtype=dtype)
    _, _, decode = connect(spawn, kind, "serve", shape=shape)
    rng = random.Random(1)
    for number in range(1, 301):
        lanes = rng.sample(range(shape.lanes), rng.randint(1, shape.lanes))
        for _ in range(rng.randint(1, 2)):
            step = decode.begin_step(lanes)
        for layer in range(shape.num_layers):
            if rng.random() < 0.02:
                break  # an abandoned step now and then
            if rng.random() < 0.05:
                decode.send_q(layer, random_q(len(lanes), shape))  # sent, but never received
                break
            run_layer(decode, step, layer, lanes, shape)
        assert step >= number
    assert decode.steps == step and 0 < decode.exposed_wait_s < 60
    decode.close()


def test_slow_executor_is_waited_for_and_the_wait_counted(kind, spawn):
    _, _, decode = connect(spawn, kind, "slow")
    step = decode.begin_step([3, 1])
    for layer in range(SHAPE.num_layers):
        run_layer(decode, step, layer, [3, 1])
    assert decode.exposed_wait_s > 0.015 * SHAPE.num_layers
    decode.close()


def test_local_span_is_the_time_between_sending_and_waiting(kind, spawn):
    _, _, decode = connect(spawn, kind, "serve")
    for _ in range(2):
        decode.begin_step([3])
        for layer in range(SHAPE.num_layers):
            decode.send_q(layer, random_q(1))
            time.sleep(0.01)
            decode.recv(layer)
            time.sleep(0.005)  # is none of it
    spanned_s = 2 * SHAPE.num_layers * 0.01
    assert spanned_s <= decode.local_span_s < 5 and decode.exposed_wait_s < spanned_s
    decode.close()


def test_deadline_names_peer_step_and_layer(kind, spawn):
    _, _, decode = connect(spawn, kind, "deaf", wait_timeout=0.5)
    decode.begin_step([0])
    decode.send_q(2, random_q(1))
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=r"prefill under test, step 1, layer 2: no answer within 0.5 s"):
        decode.recv(2)
    assert 0.5 <= time.monotonic() - start < 1.0
    assert decode.begin_step([0]) == 2  # the channel itself stands
    decode.close()


def test_killed_executor_fails_the_wait_within_slices(kind, spawn):
    process, conn, decode = connect(spawn, kind, "take one", wait_timeout=30)
    decode.begin_step([0])
    decode.send_q(0, random_q(1))
    assert receive(conn) == "taken"
    threading.Timer(0.3, lambda: os.kill(process.pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=GONE):
        decode.recv(0)
    assert time.monotonic() - start < 1.5
    decode.close()


def test_killed_decode_fails_the_executors_wait(kind, spawn):
    executor = create(kind)
    process, conn = spawn(decode_process, executor.spec)
    assert receive(conn) == "sent"
    call = executor.wait_call(5)
    assert (call.step, call.layer, call.lanes) == (1, 0, (0,))
    os.kill(process.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=GONE):
        executor.wait_call(30)
    assert time.monotonic() - start < 1.0
    executor.close()


def test_abort_of_the_executor_tells_decode_why(kind, spawn):
    _, _, decode = connect(spawn, kind, "abort", wait_timeout=30)
    decode.begin_step([0])
    decode.send_q(0, random_q(1))
    with pytest.raises(PeerLostError, match="no more KV"):
        decode.recv(0)
    with pytest.raises(PeerLostError, match="no more KV"):
        decode.begin_step([0])
    decode.close()


def test_executor_that_closes_ends_in_order(kind, spawn):
    process, conn, decode = connect(spawn, kind, "serve")
    run_layer(decode, decode.begin_step([1]), 0, [1])
    decode.close()
    assert receive(conn) == "closed"
    process.join(10)
    assert process.exitcode == 0


# ---- abort and close from other threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["abort", "close"])
def test_other_thread_wakes_decodes_wait(kind, how):
    executor = create(kind)
    decode = open_(executor.spec, wait_timeout=30)
    decode.begin_step([0])
    decode.send_q(0, random_q(1))
    stop = (lambda: decode.abort("control plane lost the peer")) if how == "abort" else decode.close
    threading.Timer(0.3, stop).start()
    start = time.monotonic()
    with pytest.raises(PeerLostError, match="control plane" if how == "abort" else "closed"):
        decode.recv(0)
    assert time.monotonic() - start < 1.0
    with pytest.raises(PeerLostError):
        while executor.wait_call(5) is not None:  # it may see the call before the word that it is over
            pass
    decode.close()
    executor.close()


@pytest.mark.parametrize("how", ["abort", "close"])
def test_other_thread_wakes_the_executors_wait(pair, how):
    decode, executor = pair
    stop = (lambda: executor.abort("shutting down")) if how == "abort" else executor.close
    threading.Timer(0.3, stop).start()
    start = time.monotonic()
    with pytest.raises(PeerLostError, match="shutting down" if how == "abort" else "closed"):
        executor.wait_call(30)
    assert time.monotonic() - start < 1.0
    settle(executor)
    with pytest.raises(PeerLostError):
        decode.begin_step([0])


def test_wait_call_times_out_with_none(pair):
    _, executor = pair
    start = time.monotonic()
    assert executor.wait_call(0.25) is None
    assert 0.25 <= time.monotonic() - start < 0.6


def test_abort_and_close_repeat_without_harm(pair):
    decode, executor = pair
    for end in (decode, executor):
        end.abort("first")
        end.abort("second")
        end.close()
        end.close()
        end.abort("third")
    with pytest.raises(PeerLostError, match="first"):
        decode.begin_step([0])
    with pytest.raises(PeerLostError, match="first"):
        executor.wait_call(0)


# ---- sequence of calls ----------------------------------------------------------------------------------------------


def take(executor):
    call = executor.wait_call(1.0)
    assert call is not None
    return call


def answer(executor, call) -> None:
    executor.answer(call, *expected_answer(call.q, call.lanes, call.step, call.layer))


def settle(end) -> None:
    """Until the other end can know what this one said last."""
    time.sleep(0.1 if isinstance(end, net.NetDecodeEnd | net.NetExecutorEnd) else 0)


def steps_done(decode, executor) -> int:
    """After decode's last word has arrived; there is no call to be taken."""
    settle(decode)
    assert executor.wait_call(0.05) is None
    return executor.steps_done


def test_step_given_up_before_its_call_was_taken_is_skipped(pair):
    decode, executor = pair
    decode.begin_step([0, 1])
    decode.send_q(0, random_q(2))
    assert decode.begin_step([5]) == 2
    settle(decode)
    assert executor.wait_call(0.05) is None  # the old call is void, though nothing new was sent
    q = random_q(1)
    decode.send_q(0, q)
    call = take(executor)
    assert (call.step, call.layer, call.lanes) == (2, 0, (5,)) and torch.equal(call.q, q)


def test_late_answer_of_a_given_up_step_is_ignored(pair):
    decode, executor = pair
    decode.begin_step([0, 1])
    decode.send_q(0, random_q(2))
    old = take(executor)
    with pytest.raises(PeerLostError, match="no answer within"):
        decode.recv(0)
    step = decode.begin_step([2, 3])
    q = random_q(2)
    decode.send_q(0, q)
    answer(executor, old)
    with pytest.raises(PeerLostError, match="no answer within"):
        decode.recv(0)
    step = decode.begin_step([2, 3])
    decode.send_q(0, q)
    settle(decode)
    call = take(executor)
    assert call.step == step
    answer(executor, call)
    o, lse = decode.recv(0)
    want = expected_answer(q, [2, 3], step, 0)
    assert torch.equal(o, want[0]) and torch.equal(lse, want[1])


def test_steps_done_rises_with_the_last_layer_and_with_given_up_steps(pair):
    decode, executor = pair
    assert executor.steps_done == 0
    decode.begin_step([0])
    for layer in range(SHAPE.num_layers):
        decode.send_q(layer, random_q(1))
        call = take(executor)
        assert executor.steps_done == 0
        answer(executor, call)
        decode.recv(layer)
    assert executor.steps_done == 1
    decode.begin_step([0])
    decode.send_q(0, random_q(1))
    call = take(executor)
    decode.abandon_step()
    assert executor.steps_done == 1  # its call is still being answered
    answer(executor, call)
    assert steps_done(decode, executor) == 2
    decode.begin_step([0])
    decode.send_q(0, random_q(1))
    decode.abandon_step()
    assert steps_done(decode, executor) == 3  # never taken, and never will be
    decode.begin_step([0])
    assert steps_done(decode, executor) == 3
    decode.begin_step([0])
    assert steps_done(decode, executor) == 4


def test_lanes_object_is_kept_while_the_set_is_the_same(pair):
    decode, executor = pair
    seen = []
    for lanes in ([4, 2], [4, 2], [2, 4], [2, 4]):
        decode.begin_step(lanes)
        decode.send_q(0, random_q(2))
        seen.append(take(executor).lanes)
    assert seen == [(4, 2), (4, 2), (2, 4), (2, 4)]
    assert seen[0] is seen[1] and seen[2] is seen[3]


def test_layers_may_be_left_out_but_not_go_back(pair):
    decode, executor = pair
    decode.begin_step([0])
    decode.send_q(2, random_q(1))
    answer(executor, take(executor))
    decode.recv(2)
    for layer in (1, 2, SHAPE.num_layers, -1):
        with pytest.raises(ChannelError, match="out of order"):
            decode.send_q(layer, random_q(1))
    decode.abandon_step()
    with pytest.raises(ChannelError, match="outside of a step"):
        decode.send_q(3, random_q(1))
    with pytest.raises(ChannelError, match="under way"):
        decode.recv(2)


@pytest.mark.parametrize("rows", [1, 15, 16])
def test_small_and_large_rows_arrive_whole(kind, rows):
    """Copies take another way above a size: 1 row is below it, 16 are above."""
    shape = ChannelShape(lanes=16, num_layers=2, num_qo_heads=32, head_dim=128, v_head_dim=64, dtype="bfloat16")
    executor = create(kind, shape)
    decode = open_(executor.spec, wait_timeout=1)
    decode.begin_step(range(rows))
    for layer in range(2):
        q, o, lse = random_q(rows, shape), random_q(rows, shape)[..., :64], torch.randn(rows, 32)
        decode.send_q(layer, q)
        call = take(executor)
        assert torch.equal(call.q, q)
        executor.answer(call, o, lse)
        got_o, got_lse = decode.recv(layer)
        assert torch.equal(got_o, o) and torch.equal(got_lse, lse)
    decode.close()
    executor.close()


@pytest.mark.parametrize("lanes", [[], [0, 0], [-1], [16], [3, 2, 3]])
def test_bad_lanes_are_value_errors(pair, lanes):
    decode, _ = pair
    with pytest.raises(ValueError, match="lanes"):
        decode.begin_step(lanes)
    assert decode.steps == 0


def test_wrong_shapes_and_dtypes_are_value_errors(pair):
    decode, executor = pair
    decode.begin_step([0, 1])
    for q in (random_q(1), random_q(2)[:, :1], random_q(2).double()):
        with pytest.raises(ValueError, match="q must be"):
            decode.send_q(0, q)
    decode.send_q(0, random_q(2).transpose(0, 1).contiguous().transpose(0, 1))  # strides are free
    call = take(executor)
    o, lse = expected_answer(call.q, call.lanes, 1, 0)
    with pytest.raises(ValueError, match="o must be"):
        executor.answer(call, o[:1], lse)
    with pytest.raises(ValueError, match="lse must be"):
        executor.answer(call, o, lse.double())
    executor.answer(call, o, lse)
    decode.recv(0)
