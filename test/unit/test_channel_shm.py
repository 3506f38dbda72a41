"""Channel over shared memory, beyond what `test_channel.py` asks of every kind: its memory, addresses and flags."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import msgspec
import pytest
import torch
from test_channel import SHAPE, answer, executor_process, expected_answer, random_q, receive, run_layer, spawn, take

from sglang_adrenaline.channel import futex, shm
from sglang_adrenaline.errors import ChannelError

__all__ = ["spawn"]  # a fixture


@pytest.fixture
def pair():
    executor = shm.create_executor_end(SHAPE)
    decode = shm.open_decode_end(executor.spec, wait_timeout=1.0)
    yield decode, executor
    decode.close()
    executor.close()


def test_memory_has_no_name_that_a_kill_could_leave_behind(spawn):
    process, conn = spawn(executor_process, "shm", SHAPE, "serve")
    decode = shm.open_decode_end(receive(conn), wait_timeout=10)
    run_layer(decode, decode.begin_step([1]), 0, [1])
    for pid in (os.getpid(), process.pid):
        with open(f"/proc/{pid}/maps") as maps:
            shared = [line.split(maxsplit=5) for line in maps if "/memfd:sglang-adrenaline" in line]
        assert [line[5].strip() for line in shared] == ["/memfd:sglang-adrenaline (deleted)"]
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    decode.close()
    assert mappings() == 0


def test_stale_address_is_refused(spawn):
    process, conn = spawn(executor_process, "shm", SHAPE, "serve")
    spec = receive(conn)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    with pytest.raises(ChannelError, match="not there"):
        shm.open_decode_end(spec, wait_timeout=1)


def test_flag_wraps_around(pair):
    """Flags are 32-bit; steps go on beyond what fits."""
    decode, executor = pair
    decode.steps = 2**32 // SHAPE.num_layers - 2
    for _ in range(5):
        step = decode.begin_step([1])
        for layer in range(SHAPE.num_layers):
            decode.send_q(layer, random_q(1))
            call = take(executor)
            assert (call.step, call.layer) == (step, layer)
            answer(executor, call)
            decode.recv(layer)
    assert executor.steps_done == step > 2**32 // SHAPE.num_layers


# ---- opening and releasing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"address": "1:x"}, "PID:FD"),
        ({"address": "../../etc/passwd"}, "PID:FD"),
        ({"address": "4194304999:3"}, "not there"),
        ({"address": f"{os.getpid()}:99999"}, "cannot open"),
        ({"token": "0" * 32}, "another channel"),
        ({"shape": msgspec.structs.replace(SHAPE, lanes=17)}, "bytes"),
        ({"shape": msgspec.structs.replace(SHAPE, num_layers=6)}, "another channel"),
        ({"shape": msgspec.structs.replace(SHAPE, dtype="bfloat16")}, "bytes"),
    ],
)
def test_bad_spec_is_refused(changes, complaint):
    executor = shm.create_executor_end(SHAPE)
    with pytest.raises(ChannelError, match=complaint):
        shm.open_decode_end(msgspec.structs.replace(executor.spec, **changes), wait_timeout=1)
    executor.close()
    assert mappings() == 0


def test_unexpected_shape_is_refused_before_opening():
    executor = shm.create_executor_end(SHAPE)
    expected = msgspec.structs.replace(SHAPE, head_dim=128)
    with pytest.raises(ChannelError, match="head_dim 8, not 128"):
        shm.open_decode_end(executor.spec, wait_timeout=1, expected=expected)
    executor.close()


def test_other_kinds_of_files_are_refused(tmp_path):
    executor = shm.create_executor_end(SHAPE)
    os.mkfifo(tmp_path / "fifo")
    files = [os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK), os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)]
    os.ftruncate(files[1], os.fstat(int(executor.spec.address.partition(":")[2])).st_size)
    for fd in files:
        spec = msgspec.structs.replace(executor.spec, address=f"{os.getpid()}:{fd}")
        with pytest.raises(ChannelError, match="cannot map"):
            shm.open_decode_end(spec, wait_timeout=1)
        os.close(fd)
    executor.close()


def test_second_opener_is_refused(pair):
    _, executor = pair
    with pytest.raises(ChannelError, match="in use"):
        shm.open_decode_end(executor.spec, wait_timeout=1)


def test_size_cannot_be_changed_by_the_peer(pair):
    _, executor = pair
    fd = int(executor.spec.address.partition(":")[2])
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)


def mappings() -> int:
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum("/memfd:sglang-adrenaline" in line for line in maps)


def test_close_releases_mappings_and_descriptors():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        executor = shm.create_executor_end(SHAPE)
        decode = shm.open_decode_end(executor.spec, wait_timeout=1)
        decode.begin_step([0])
        decode.send_q(0, random_q(1))
        answer(executor, take(executor))
        decode.recv(0)
        decode.close()
        executor.close()
    assert mappings() == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_results_outlive_close():
    """Tensors handed out keep the memory; touching them after close is harmless."""
    executor = shm.create_executor_end(SHAPE)
    decode = shm.open_decode_end(executor.spec, wait_timeout=1)
    decode.begin_step([0])
    q = random_q(1)
    decode.send_q(0, q)
    answer(executor, take(executor))
    o, lse = decode.recv(0)
    decode.close()
    executor.close()
    want = expected_answer(q, [0], 1, 0)
    assert torch.equal(o, want[0]) and torch.equal(lse, want[1])
    del o, lse
    assert mappings() == 0


# ---- futex ----------------------------------------------------------------------------------------------------------


def test_futex_waits_wakes_and_times_out():
    import ctypes

    word = ctypes.c_uint32(7)
    waiter, waker = futex.Futex(ctypes.addressof(word)), futex.Futex(ctypes.addressof(word))
    assert waiter.wait(6, 5.0) is False  # another value: back at once
    start = time.monotonic()
    assert waiter.wait(7, 0.15) is True
    assert 0.15 <= time.monotonic() - start < 0.5
    threading.Timer(0.1, waker.wake).start()
    start = time.monotonic()
    assert waiter.wait(7, 5.0) is False
    assert time.monotonic() - start < 2.0


def test_futex_on_unmapped_memory_is_channel_error():
    with pytest.raises(ChannelError, match="futex wait failed"):
        futex.Futex(4).wait(0, 0.1)


def test_fences_can_be_called():
    """This machine may not need them; those that it has must work."""
    fences = [fence for fence in (futex.libatomic_fence(), futex.membarrier_fence()) if fence is not None]
    assert fences
    for fence in fences:
        fence()
