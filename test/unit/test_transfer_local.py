"""The `local` transfer engine between real processes: what is written, and what is refused."""

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_adrenaline.transfer import process_vm
from sglang_adrenaline.transfer.process_vm import IOV_MAX, ProcessVmEngine, Session

SIZE = 1 << 20


def _receiver(pipe) -> None:
    """Owns SIZE bytes, tells session and address, then returns the bytes whenever asked."""
    engine = ProcessVmEngine(receives=True)
    memory = np.zeros(SIZE, dtype=np.uint8)
    pipe.send((engine.get_session_id(), memory.ctypes.data))
    while pipe.recv() == "read":
        pipe.send(memory.tobytes())


class Receiver:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_receiver, args=(theirs,), daemon=True)
        self.process.start()
        assert self.pipe.poll(60), "the receiver did not start"
        self.session_id, self.address = self.pipe.recv()

    def memory(self) -> np.ndarray:
        self.pipe.send("read")
        assert self.pipe.poll(30)
        return np.frombuffer(self.pipe.recv(), dtype=np.uint8)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


@pytest.fixture(scope="module")
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.kill()


@pytest.fixture
def engine():
    engine = ProcessVmEngine(receives=False)
    yield engine
    engine.close()


def test_session_roundtrip_keeps_the_pid_behind_the_last_colon():
    session = Session.of_this_process()
    assert Session.parse(str(session)) == session
    assert int(str(session).rsplit(":", 1)[1]) == os.getpid()


@pytest.mark.parametrize("text", ["", "host:1", "10.0.0.1:8998", "m:x:3", "m:1:2:3", ":1:2", "m:-1:2", "m:1:0"])
def test_session_parse_garbage_raises(text):
    with pytest.raises(ValueError):
        Session.parse(text)


def test_transfer_writes_exactly_the_given_ranges(engine, receiver):
    source = np.random.default_rng(0).integers(1, 256, SIZE, dtype=np.uint8)
    expected = receiver.memory().copy()
    moves = [(0, 4096, 100), (5000, 0, 1), (70_000, 100_000, 300_000), (9, 9, 0)]
    for src, dst, length in moves:
        expected[dst : dst + length] = source[src : src + length]
    ret = engine.batch_transfer_sync(
        receiver.session_id,
        [source.ctypes.data + src for src, _, _ in moves],
        [receiver.address + dst for _, dst, _ in moves],
        [length for _, _, length in moves],
    )
    assert ret == 0
    assert np.array_equal(receiver.memory(), expected)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.sampled_from([0, 1, IOV_MAX - 1, IOV_MAX, IOV_MAX + 1, 3 * IOV_MAX + 7]),
    length=st.integers(1, 64),
    seed=st.integers(0, 2**32 - 1),
)
def test_transfer_of_scattered_tokens_puts_each_in_its_place(engine, receiver, count, length, seed):
    random = np.random.default_rng(seed)
    source = random.integers(0, 256, SIZE, dtype=np.uint8)
    src = random.permutation(SIZE // 64)[:count] * 64
    dst = random.permutation(SIZE // 64)[:count] * 64
    expected = receiver.memory().copy()
    for a, b in zip(src, dst, strict=True):
        expected[b : b + length] = source[a : a + length]
    ret = engine.batch_transfer_sync(
        receiver.session_id,
        (src + source.ctypes.data).tolist(),
        (dst + receiver.address).tolist(),
        [length] * count,
    )
    assert ret == 0
    assert np.array_equal(receiver.memory(), expected)


def test_transfer_resumes_after_a_short_write(engine, receiver, monkeypatch):
    """A kernel that takes at most 1000 bytes a call, and splits vectors doing so, as it does at 2 GiB."""
    real, calls = process_vm._writev, []

    def short(pid, local, count, remote, remote_count, flags):
        class Iovec(ctypes.Structure):
            _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))

        mine = (Iovec * count).from_address(local)
        theirs = (Iovec * count).from_address(remote)
        left, n = 1000, 0
        cut_local, cut_remote = (Iovec * count)(), (Iovec * count)()
        for i in range(count):
            assert mine[i].length == theirs[i].length > 0
            take = min(left, mine[i].length)
            cut_local[i].base, cut_local[i].length = mine[i].base, take
            cut_remote[i].base, cut_remote[i].length = theirs[i].base, take
            left, n = left - take, n + 1
            if not left:
                break
        calls.append(n)
        return real(pid, ctypes.addressof(cut_local), n, ctypes.addressof(cut_remote), n, flags)

    monkeypatch.setattr(process_vm, "_writev", short)
    source = np.random.default_rng(1).integers(0, 256, 10_000, dtype=np.uint8)
    lengths = [300, 700, 1, 2999, 6000]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ret = engine.batch_transfer_sync(
        receiver.session_id,
        (starts + source.ctypes.data).tolist(),
        (starts + receiver.address).tolist(),
        lengths,
    )
    assert ret == 0
    assert len(calls) == 10
    assert np.array_equal(receiver.memory()[:10_000], source)


def test_transfer_from_many_threads_is_correct(engine, receiver):
    source = np.random.default_rng(2).integers(0, 256, SIZE, dtype=np.uint8)
    part, results = SIZE // 8, []

    def send(i: int) -> None:
        offsets = np.arange(i * part, (i + 1) * part, 32)
        results.append(
            engine.batch_transfer_sync(
                receiver.session_id,
                (offsets + source.ctypes.data).tolist(),
                (offsets + receiver.address).tolist(),
                [32] * len(offsets),
            )
        )

    threads = [threading.Thread(target=send, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [0] * 8
    assert np.array_equal(receiver.memory(), source)
    assert len(engine._pidfds) == 1


def test_transfer_to_an_unmapped_address_fails_with_a_line(engine, receiver, caplog):
    source = np.zeros(64, dtype=np.uint8)
    with caplog.at_level(logging.ERROR):
        ret = engine.batch_transfer_sync(
            receiver.session_id, [source.ctypes.data] * 2, [receiver.address, 4096], [64, 64]
        )
    assert ret != 0
    assert "not mapped there" in caplog.text
    assert receiver.process.is_alive()


def test_transfer_to_a_killed_process_fails_even_before_it_is_reaped(engine, caplog):
    target = Receiver()
    source = np.zeros(64, dtype=np.uint8)

    def send() -> int:
        return engine.batch_transfer_sync(target.session_id, [source.ctypes.data], [target.address], [64])

    assert send() == 0
    assert engine.send_probe(target.session_id) == 0
    os.kill(target.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while send() == 0:
        assert time.monotonic() < deadline
    assert "has ended" in caplog.text
    target.kill()
    assert send() != 0
    assert engine.send_probe(target.session_id) != 0


def test_transfer_to_a_pid_given_to_another_process_is_refused(engine, receiver, caplog):
    """The same PID with another start time is a stranger: nothing may be written."""
    real = Session.parse(receiver.session_id)
    before = receiver.memory().copy()
    source = np.full(64, 77, dtype=np.uint8)
    stale = str(Session(real.machine, real.start_ticks - 1, real.pid))
    assert engine.batch_transfer_sync(stale, [source.ctypes.data], [receiver.address], [64]) != 0
    assert "has ended" in caplog.text
    assert np.array_equal(receiver.memory(), before)


def test_transfer_to_another_host_is_refused_with_the_remedy(engine, receiver, caplog):
    real = Session.parse(receiver.session_id)
    other = str(Session("elsewhere.1", real.start_ticks, real.pid))
    assert engine.batch_transfer_sync(other, [0], [receiver.address], [64]) != 0
    assert "another host" in caplog.text and "mooncake" in caplog.text


def test_descriptors_of_dead_sessions_are_closed_when_new_ones_come(engine, receiver):
    source = np.zeros(8, dtype=np.uint8)
    target = Receiver()
    assert engine.batch_transfer_sync(target.session_id, [source.ctypes.data], [target.address], [8]) == 0
    target.kill()
    assert engine.batch_transfer_sync(receiver.session_id, [source.ctypes.data], [receiver.address], [8]) == 0
    assert list(engine._pidfds) == [receiver.session_id]


def test_backend_local_is_known_to_sglang():
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class
    from sglang.srt.server_args import DISAGG_TRANSFER_BACKEND_CHOICES

    from sglang_adrenaline.errors import ConfigError
    from sglang_adrenaline.transfer import local

    before = list(TransferBackend)
    local.register_local_backend()
    local.register_local_backend()
    member = TransferBackend("local")
    assert member.name == "LOCAL" and TransferBackend.LOCAL is member
    assert list(TransferBackend) == [*before, member] or before.count(member) == 1
    assert len({backend.value for backend in TransferBackend}) == len(list(TransferBackend))
    assert DISAGG_TRANSFER_BACKEND_CHOICES.count("local") == 1

    for kind in KVClassType:
        ours = local.get_kv_class_around(get_kv_class, member, kind)
        theirs = get_kv_class(TransferBackend.MOONCAKE, kind)
        assert issubclass(ours, theirs)
        assert local.get_kv_class_around(get_kv_class, TransferBackend.MOONCAKE, kind) is theirs
    assert local.get_kv_class_around(get_kv_class, member, KVClassType.MANAGER) is local.LocalKVManager
    local.check_device("cpu")
    local.check_device("cuda")
    with pytest.raises(ConfigError, match="not of xpu"):
        local.check_device("xpu")


class _Event:
    """As SGLang's scheduler leaves one at the sender: over once it is told so."""

    def __init__(self) -> None:
        self.over = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        assert self.over, "would block the scheduler"


def test_sender_holds_a_cached_prefix_until_the_step_that_writes_it_is_over(monkeypatch):
    from sglang.srt.disaggregation.mooncake import conn as mooncake

    from sglang_adrenaline.transfer import local

    sent = []
    monkeypatch.setattr(mooncake.MooncakeKVSender, "__init__", lambda self: None)
    monkeypatch.setattr(mooncake.MooncakeKVSender, "send", lambda self, *chunk: sent.append(chunk[0]))
    monkeypatch.setattr(mooncake.MooncakeKVSender, "poll", lambda self: "polled")
    for polled in (True, False):
        sent.clear()
        sender, event = local.LocalKVSender(), _Event()
        sender._early_send_wait_event = event
        sender.send("prefix")
        assert sender.poll() == "polled" and sent == []
        event.over = True
        if polled:
            sender.poll()
            assert sent == ["prefix"]
        sender.send("rest")
        assert sent == ["prefix", "rest"]
        sender._early_send_wait_event = event
        sender.send("ready at once")
        assert sent == ["prefix", "rest", "ready at once"]
