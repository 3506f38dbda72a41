"""KV transfer between two processes' GPUs: what arrives, what is refused, an ended peer, a capture, and GB/s (-s)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sglang_adrenaline.transfer.cuda_ipc import CudaIpcEngine

ITEM = 2048
SLOTS = 512
LAYERS = 3
START_S = 120.0


def buffers_of(count: int, num_bytes: int, device: int) -> list[torch.Tensor]:
    """As SGLang's KV pool: tensors of PyTorch's allocator, some of which share a cudaMalloc."""
    return [torch.zeros(num_bytes, dtype=torch.uint8, device=torch.device("cuda", device)) for _ in range(count)]


def _receiver(pipe, device: int, count: int, num_bytes: int) -> None:
    torch.cuda.set_device(device)
    engine = CudaIpcEngine(receives=True)
    kv, metadata = buffers_of(count, num_bytes, device), torch.zeros(4096, dtype=torch.uint8)
    torch.cuda.synchronize()
    engine.batch_register([buffer.data_ptr() for buffer in kv], [num_bytes] * count)
    engine.batch_register([metadata.data_ptr()], [metadata.nbytes])
    pipe.send((engine.get_session_id(), [buffer.data_ptr() for buffer in kv], metadata.data_ptr()))
    while True:
        command = pipe.recv()
        if command == "kv":
            pipe.send([buffer.cpu().numpy() for buffer in kv])
        elif command == "sums":
            pipe.send([int(buffer.view(torch.int64).sum()) for buffer in kv])
        elif command == "metadata":
            pipe.send(metadata.numpy())


class Receiver:
    def __init__(self, device: int, count: int = 2 * LAYERS, num_bytes: int = SLOTS * ITEM) -> None:
        self.device = device
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_receiver, args=(theirs, device, count, num_bytes), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.poll(START_S), "the receiver did not start"
        self.session_id, self.ptrs, self.metadata = self.pipe.recv()

    def ask(self, command: str) -> list:
        self.pipe.send(command)
        assert self.pipe.poll(60.0)
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(20.0)


@pytest.fixture(params=[0, 1], ids=["one-gpu", "two-gpus"])
def gpu(request: pytest.FixtureRequest) -> int:
    """The receiver's GPU; this process is on GPU 0."""
    if request.param >= torch.cuda.device_count():
        pytest.skip(f"needs {request.param + 1} GPUs")
    return request.param


@pytest.fixture
def receiver(gpu: int) -> Iterator[Receiver]:
    receiver = Receiver(gpu)
    yield receiver
    receiver.kill()


@pytest.fixture
def engine() -> Iterator[CudaIpcEngine]:
    torch.cuda.set_device(0)
    engine = CudaIpcEngine(receives=False)
    yield engine
    engine.close()


@pytest.fixture
def source(engine: CudaIpcEngine) -> list[torch.Tensor]:
    result = [buffer.random_(1, 256) for buffer in buffers_of(2 * LAYERS, SLOTS * ITEM, 0)]
    torch.cuda.synchronize()
    engine.batch_register([buffer.data_ptr() for buffer in result], [buffer.nbytes for buffer in result])
    return result


def send_slots(engine: CudaIpcEngine, receiver: Receiver, source: list[torch.Tensor], src, dst, item=ITEM) -> int:
    ptrs = [buffer.data_ptr() for buffer in source]
    return engine.transfer_slots(receiver.session_id, ptrs, receiver.ptrs, [item] * len(ptrs), src, dst)


@pytest.mark.parametrize("kind", ["scattered", "contiguous", "mixed", "one", "none"])
def test_slots_arrive_in_their_places_and_nowhere_else(engine, receiver, source, kind):
    random = np.random.default_rng(1)
    src, dst = {
        "scattered": (random.permutation(SLOTS)[:300], random.permutation(SLOTS)[:300]),
        "contiguous": (np.arange(100, 400), np.arange(7, 307)),
        "mixed": (np.r_[0:50, 90, 91, 200:230], np.r_[10:60, 300, 5, 400:430]),
        "one": (np.array([SLOTS - 1]), np.array([SLOTS - 1])),
        "none": (np.array([], dtype=np.int64), np.array([], dtype=np.int64)),
    }[kind]
    assert send_slots(engine, receiver, source, src.astype(np.int32), dst.astype(np.int32)) == 0
    for mine, theirs in zip(source, receiver.ask("kv"), strict=True):
        expected = np.zeros((SLOTS, ITEM), dtype=np.uint8)
        expected[dst] = mine.cpu().numpy().reshape(SLOTS, ITEM)[src]
        assert np.array_equal(theirs.reshape(SLOTS, ITEM), expected)


def test_ranges_of_odd_sizes_and_metadata_arrive(engine, receiver, source):
    metadata = torch.arange(4096).to(torch.uint8)
    engine.batch_register([metadata.data_ptr()], [metadata.nbytes])
    src, dst = source[1].data_ptr(), receiver.ptrs[2]
    ret = engine.batch_transfer_sync(
        receiver.session_id,
        [src + 3, src, metadata.data_ptr() + 100, src + 5],
        [dst + 5, dst + 100_001, receiver.metadata + 200, dst],
        [10_001, 50_000, 1000, 0],
    )
    assert ret == 0
    mine, expected = source[1].cpu().numpy(), np.zeros(SLOTS * ITEM, dtype=np.uint8)
    expected[5:10_006] = mine[3:10_004]
    expected[100_001:150_001] = mine[:50_000]
    kv = receiver.ask("kv")
    assert np.array_equal(kv[2], expected)
    assert not any(buffer.any() for buffer in kv[:2] + kv[3:])
    assert np.array_equal(receiver.ask("metadata")[200:1200], metadata.numpy()[100:1100])


def test_addresses_outside_what_is_registered_are_refused(engine, receiver, source, caplog):
    here, there, size = source[0].data_ptr(), max(receiver.ptrs), SLOTS * ITEM
    stranger = torch.zeros(1 << 22, dtype=torch.uint8, device="cuda:0").data_ptr()
    for src, dst, length in [
        (here, there + size, 16),
        (here, there + size - 8, 16),
        (here, min(receiver.ptrs) - 16, 16),
        (here, 16, 16),
        (stranger, there, 16),
        (here, receiver.metadata, 16),
        (here, 1 << 46, 16),
    ]:
        caplog.clear()
        assert engine.batch_transfer_sync(receiver.session_id, [src], [dst], [length]) == -1
        assert len(caplog.records) == 1
    slots = np.array([0, SLOTS])
    assert (
        send_slots(engine, receiver, source, slots, slots) == send_slots(engine, receiver, source, -slots, slots) == -1
    )
    assert not any(buffer.any() for buffer in receiver.ask("kv"))


def test_killed_peer_fails_transfers_and_gives_its_memory_back(engine, gpu, source):
    """Its 4 GiB stay on the GPU while we map them: a restarted decode server needs them."""
    free_before = torch.cuda.mem_get_info(gpu)[0]
    receiver = Receiver(gpu, num_bytes=(4 << 30) // (2 * LAYERS) // ITEM * ITEM)
    slots = np.arange(SLOTS)
    assert send_slots(engine, receiver, source, slots, slots) == 0
    assert torch.cuda.mem_get_info(gpu)[0] < free_before - (3 << 30)
    receiver.kill()
    deadline = time.monotonic() + 20.0
    while engine._peers or torch.cuda.mem_get_info(gpu)[0] < free_before - (1 << 30):
        assert time.monotonic() < deadline, (engine._peers, torch.cuda.mem_get_info(gpu), free_before)
        time.sleep(0.05)
    begin = time.monotonic()
    assert send_slots(engine, receiver, source, slots, slots) == -1
    assert time.monotonic() - begin < 5.0
    successor = Receiver(gpu)
    assert send_slots(engine, successor, source, slots, slots) == 0
    assert np.array_equal(successor.ask("kv")[0], source[0].cpu().numpy())
    successor.kill()


def test_peer_killed_during_transfers_fails_one_and_leaves_the_gpu_usable(engine, receiver, source):
    outcomes, slots = [], np.random.default_rng(2).permutation(SLOTS)

    def send() -> None:
        while not outcomes or outcomes[-1] == 0:
            outcomes.append(send_slots(engine, receiver, source, slots, slots))

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(1.0)
    os.kill(receiver.process.pid, 9)
    thread.join(30.0)
    assert not thread.is_alive() and len(outcomes) > 10 and outcomes[-1] == -1
    assert int(torch.ones(8, device="cuda:0").sum()) == 8


def test_first_transfer_while_another_thread_captures_a_graph(engine, receiver, source):
    """Opening the peer's memory and polling events must neither fail nor spoil a capture in CUDA's strictest mode."""
    slots, outcomes, x = np.arange(SLOTS), [], torch.ones(8, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        x.mul_(2)
        thread = threading.Thread(target=lambda: outcomes.append(send_slots(engine, receiver, source, slots, slots)))
        thread.start()
        thread.join(60.0)
        x.mul_(2)
    graph.replay()
    assert outcomes == [0] and float(x[0]) == 4.0
    assert np.array_equal(receiver.ask("kv")[-1], source[-1].cpu().numpy())


@pytest.mark.parametrize("item", [2048, 8192], ids=["gqa-2KiB", "mha-8KiB"])
@pytest.mark.parametrize("kind", ["contiguous", "scattered"])
def test_speed_of_4k_tokens_in_32_layers(engine, gpu, item, kind):
    """Prints GB/s; asserts that all arrived."""
    tokens, layers, slots = 4096, 32, 8192
    receiver = Receiver(gpu, 2 * layers, slots * item)
    source = [buffer.random_() for buffer in buffers_of(2 * layers, slots * item, 0)]
    torch.cuda.synchronize()
    engine.batch_register([buffer.data_ptr() for buffer in source], [buffer.nbytes for buffer in source])
    random, times = np.random.default_rng(3), []
    src, dst = np.arange(tokens), np.arange(tokens) + 1000
    if kind == "scattered":
        src, dst = random.permutation(slots)[:tokens], random.permutation(slots)[:tokens]
    for _ in range(6):
        begin = time.perf_counter()
        assert send_slots(engine, receiver, source, src, dst, item) == 0
        times.append(time.perf_counter() - begin)
    sent = 2 * layers * tokens * item
    best = sorted(times[1:])[len(times[1:]) // 2]
    print(
        f"\n{torch.cuda.get_device_name(0)}, GPU 0 to GPU {gpu}, {item} B a slot, {kind}: {sent / best / 1e9:.0f} GB/s "
        f"({sent / 1e6:.0f} MB in {best * 1e3:.2f} ms; the first call, which maps, took {times[0] * 1e3:.1f} ms)"
    )
    index = torch.from_numpy(src).cuda()
    wanted = [int(buffer.view(slots, item)[index].view(torch.int64).sum()) for buffer in source]
    assert receiver.ask("sums") == wanted
    receiver.kill()
