"""The GPU transfer engine as far as it goes without a GPU: real processes, ordinary memory, refusals, ended peers.

What needs a GPU is in test/kernel/test_cuda_ipc_transfer.py.
"""

import logging
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from sglang_adrenaline.transfer.cuda_ipc import CudaIpcEngine
from sglang_adrenaline.transfer.process_vm import ProcessVmEngine
from sglang_adrenaline.transfer.published import PublishedSession

SIZE = 1 << 16


def _receiver(pipe) -> None:
    """Registers the first half of SIZE bytes, tells session and address, then does as it is told."""
    engine = CudaIpcEngine(receives=True)
    memory = np.zeros(SIZE, dtype=np.uint8)
    engine.batch_register([memory.ctypes.data], [SIZE // 2])
    pipe.send((engine.get_session_id(), memory.ctypes.data))
    while True:
        command = pipe.recv()
        if command == "register the rest":
            engine.batch_register([memory.ctypes.data + SIZE // 2], [SIZE // 2])
        elif command == "forget all":
            engine.batch_deregister([memory.ctypes.data, memory.ctypes.data + SIZE // 2])
        pipe.send(memory.tobytes())


class Receiver:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_receiver, args=(theirs,), daemon=True)
        self.process.start()
        assert self.pipe.poll(120), "the receiver did not start"
        self.session_id, self.address = self.pipe.recv()

    def tell(self, command: str) -> np.ndarray:
        """The receiver's memory after the command."""
        self.pipe.send(command)
        assert self.pipe.poll(30)
        return np.frombuffer(self.pipe.recv(), dtype=np.uint8)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.kill()


@pytest.fixture
def engine():
    engine = CudaIpcEngine(receives=False)
    yield engine
    engine.close()
    assert engine._reaper is None or not engine._reaper.is_alive()


@pytest.fixture
def source(engine):
    memory = np.random.default_rng(0).integers(1, 256, SIZE, dtype=np.uint8)
    engine.batch_register([memory.ctypes.data], [SIZE])
    return memory


def test_transfer_writes_registered_memory_and_nothing_else(engine, receiver, source, caplog):
    here, there, half = source.ctypes.data, receiver.address, SIZE // 2

    def send(src: int, dst: int, length: int) -> int:
        return engine.batch_transfer_sync(receiver.session_id, [here, src], [there, dst], [8, length])

    expected = np.zeros(SIZE, dtype=np.uint8)
    assert send(here + 100, there + 1000, 500) == 0
    expected[1000:1500] = source[100:600]
    expected[:8] = source[:8]
    assert engine.batch_transfer_sync(receiver.session_id, [here], [there], [0]) == 0
    assert np.array_equal(receiver.tell("show"), expected)
    with caplog.at_level(logging.ERROR):
        for dst, length in [(there + half, 8), (there + half - 4, 8), (there - 1, 8), (there, half + 1), (0, 8)]:
            caplog.clear()
            assert send(here, dst, length) == -1
            assert len(caplog.records) == 1 and "target range" in caplog.text
        assert send(here + SIZE - 4, there, 8) == -1 and "source range" in caplog.text
        assert send(-1, there, 8) == send(2**64, there, 8) == send(here, there, -8) == -1
    assert np.array_equal(receiver.tell("show"), expected)
    assert np.array_equal(receiver.tell("register the rest"), expected)
    assert send(here, there + half - 4, 8) == 0
    expected[half - 4 : half + 4] = source[:8]
    assert np.array_equal(receiver.tell("forget all"), expected)
    assert send(here, there, 8) == -1
    assert np.array_equal(receiver.tell("show"), expected)


def test_transfer_of_slots_outside_or_on_no_gpu_is_refused(engine, receiver, source, caplog):
    def send(slots, item=64) -> int:
        return engine.transfer_slots(
            receiver.session_id, [source.ctypes.data], [receiver.address], [item], np.array([0] * len(slots)), slots
        )

    assert send(np.array([], dtype=np.int32)) == 0
    for slots, item in [([SIZE // 128], 64), ([-1], 64), ([1 << 40], 64), ([0], 0), ([0], 1 << 62), ([1], 1 << 30)]:
        assert send(np.array(slots), item) == -1
    caplog.clear()
    assert send(np.array([1, 5])) == -1 and "not on a GPU" in caplog.text
    assert not receiver.tell("show").any()


def test_transfer_to_a_killed_process_fails_and_its_peer_is_closed(engine, receiver, source):
    def send() -> int:
        return engine.batch_transfer_sync(receiver.session_id, [source.ctypes.data], [receiver.address], [64])

    assert send() == 0 and engine.send_probe(receiver.session_id) == 0
    assert list(engine._peers) == [receiver.session_id]
    pidfd = engine._peers[receiver.session_id].pidfd
    os.kill(receiver.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while engine._peers:
        assert time.monotonic() < deadline, "the reaper did not close the peer"
        time.sleep(0.01)
    with pytest.raises(OSError):
        os.fstat(pidfd)
    assert send() == -1 and engine.send_probe(receiver.session_id) == -1
    assert not engine._peers


def test_transfer_to_a_stranger_is_refused(engine, receiver, source, caplog):
    right = PublishedSession.parse(receiver.session_id)
    plain = ProcessVmEngine(receives=False)
    wrong = [
        str(PublishedSession(right.process, right.fd, "0" * 32)),
        str(PublishedSession(right.process, 0, right.token)),
        receiver.session_id.replace(right.process.machine, "elsewhere.1"),
        receiver.session_id.replace(f":{right.process.start_ticks}:", f":{right.process.start_ticks - 1}:"),
        plain.get_session_id(),
        "10.0.0.1:8998",
    ]
    for session_id in wrong:
        caplog.clear()
        assert engine.batch_transfer_sync(session_id, [source.ctypes.data], [receiver.address], [64]) == -1
        assert len(caplog.records) == 1
        assert engine.send_probe(session_id) in (-1, 0)
    assert not engine._peers
    assert not receiver.tell("show").any()
    plain.close()


def test_transfer_after_close_is_refused(engine, receiver, source):
    engine.close()
    assert engine.batch_transfer_sync(receiver.session_id, [source.ctypes.data], [receiver.address], [64]) == -1
    assert not receiver.tell("show").any()
