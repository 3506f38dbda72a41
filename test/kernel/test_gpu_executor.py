"""GpuExecutor in another process, against attention in float32 on the CPU; this process is the decode side."""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import executor_peer
import msgspec
import pytest
import torch
from executor_peer import Pool

from sglang_adrenaline.attention.ragged import RaggedPlan, attend
from sglang_adrenaline.channel import opening
from sglang_adrenaline.channel.base import ChannelSpec
from sglang_adrenaline.errors import PeerLostError

LENGTHS = (1, 2, 127, 128, 129, 500, 900)
MHA, GQA = Pool(), Pool(num_kv_heads=2)
STEP_S = 20.0


class Peer:
    """The prefill process; `ask` gives its answer to a command."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.process = subprocess.Popen(
            [sys.executable, executor_peer.__file__, str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parent,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the peer ended with code {self.process.wait(5.0)}"
        return json.loads(line)


@pytest.fixture(scope="module", params=[0, 1], ids=["one-gpu", "two-gpus"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    if request.param >= torch.cuda.device_count():
        pytest.skip(f"needs {request.param + 1} GPUs")
    made = Peer(request.param)
    yield made
    with contextlib.suppress(subprocess.TimeoutExpired):
        made.process.communicate(timeout=20.0)
    if made.process.poll() is None:
        made.process.kill()
        made.process.communicate(timeout=5.0)


class Decode:
    """One session: this process's end, and what its lanes attend to."""

    def __init__(self, peer: Peer, pool: Pool, lanes: int, wait_s: float = 20.0) -> None:
        self.peer, self.pool, self.num_lanes = peer, pool, lanes
        spec = peer.ask("open", pool=msgspec.to_builtins(pool), lanes=lanes, wait_s=wait_s)["spec"]
        self.end = opening.open_decode_end(
            msgspec.json.decode(spec, type=ChannelSpec),
            device=0,
            endpoints=None,
            wait_timeout=wait_s,
            expected=pool.channel(lanes),
            peer="prefill",
        )
        self.slots: dict[int, list[int]] = {}
        if not pool.on_device:
            layers = pool.layers(torch.device("cpu"))
            self.reference = [(layer.k.float(), layer.v.float()) for layer in layers]

    def attach(self, lane: int, slots: list[int]) -> None:
        self.peer.ask("attach", lane=lane, slots=slots)
        self.slots[lane] = slots

    def detach(self, lane: int) -> None:
        self.peer.ask("detach", lane=lane)
        del self.slots[lane]

    def begin(self, lanes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Enqueue a step; q, o and lse of its layers."""
        self.end.begin_step(lanes)
        step = []
        for layer in range(self.pool.num_layers):
            q = torch.randn(len(lanes), self.pool.num_qo_heads, self.pool.head_dim, device="cuda").bfloat16()
            self.end.send_q(layer, q)
            step.append((q, *self.end.recv(layer)))
        return step

    def finish(self) -> None:
        deadline = time.monotonic() + STEP_S
        while not torch.cuda.current_stream().query():
            assert time.monotonic() < deadline, "the step does not end"
            time.sleep(0.0005)
        self.end.check()

    def compare(self, lanes: list[int], step: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        plan = RaggedPlan.from_slots([torch.tensor(self.slots[lane]) for lane in lanes])
        for layer, (q, o, lse) in enumerate(step):
            k, v = self.reference[layer]
            o_ref, lse_ref = attend(q.float().cpu(), k, v, plan, sm_scale=self.pool.sm_scale(layer))
            torch.testing.assert_close(o.float().cpu(), o_ref, rtol=2e-2, atol=1e-2)
            torch.testing.assert_close(lse.cpu(), lse_ref, rtol=1e-3, atol=2e-3)

    def step(self, lanes: list[int]) -> None:
        step = self.begin(lanes)
        self.finish()
        self.compare(lanes, step)

    def close(self) -> None:
        self.end.close(timeout_s=10.0)
        self.peer.ask("stop")


@pytest.fixture
def decode(peer: Peer) -> Iterator[Any]:
    made: list[Decode] = []

    def make(pool: Pool, lanes: int, **kwargs: Any) -> Decode:
        made.append(Decode(peer, pool, lanes, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def random_slots(rng: random.Random, pool: Pool, length: int) -> list[int]:
    """Scattered or in a row; slot 0 is for padding."""
    if rng.random() < 0.5:
        start = rng.randrange(1, pool.num_slots - length)
        return list(range(start, start + length))
    return rng.sample(range(1, pool.num_slots), length)


@pytest.mark.parametrize(
    "pool",
    [MHA, GQA, Pool(head_dim=64), Pool(head_dim=64, num_kv_heads=4), Pool(num_qo_heads=32, num_layers=2)],
    ids=["mha-128", "gqa4-128", "mha-64", "gqa2-64", "32-heads"],
)
def test_lanes_that_come_and_go_equal_attention_in_float32(decode, pool):
    session = decode(pool, 40)  # buckets 8, 16, 32, 40
    rng = random.Random(0)
    for _ in range(40):
        for lane in [lane for lane in session.slots if rng.random() < 0.3]:
            session.detach(lane)
        free = [lane for lane in range(rng.choice((8, 16, 40))) if lane not in session.slots]
        for lane in rng.sample(free, min(len(free), rng.randint(1, 4))):
            session.attach(lane, random_slots(rng, pool, rng.choice(LENGTHS)))
        if session.slots:
            lanes = rng.sample(sorted(session.slots), rng.randint(1, len(session.slots)))
            session.step(lanes)
    assert session.end.failure is None


def test_one_long_lane_is_split_over_the_gpu(decode):
    session = decode(MHA, 8)
    session.attach(3, list(range(1, 3990)))
    session.step([3])


def test_steps_without_a_change_are_not_planned_again(decode, peer):
    session = decode(MHA, 16)
    for lane in range(10):
        session.attach(lane, list(range(1, 100 * lane + 2)))
    session.step(list(range(10)))
    plans = peer.ask("status")["plans"]
    for _ in range(20):
        session.step(list(range(9, -1, -1)))
    status = peer.ask("status")
    assert status["plans"] == plans and status["steps_done"] == 21
    assert status["read_tokens"] == 21 * 901  # each lane's slots begin with those of the one before
    assert 0 < status["busy_s"] < 21 * 0.1 and session.end.local_span_s > 0


def test_steps_that_are_queued_are_each_right(decode):
    session = decode(GQA, 16)
    for lane in range(12):
        session.attach(lane, list(range(1 + lane, 300 + 50 * lane)))
    steps = []
    for count in (3, 12, 5, 9, 1, 12, 7, 8):
        lanes = list(range(count))
        steps.append((lanes, session.begin(lanes)))
        if len(steps) == 4:
            session.attach(12, [5, 6, 7])  # a plan behind steps that are under way
    session.finish()
    for lanes, step in steps:
        session.compare(lanes, step)


def test_lanes_that_share_slots_may_hold_more_than_the_pool(decode):
    pool = Pool(num_slots=600)
    session = decode(pool, 16)
    for lane in range(16):
        session.attach(lane, list(range(1, 580 - lane)))
        if lane % 5 == 0:
            session.step(list(range(lane + 1)))
    session.step(list(range(16)))


def test_sessions_one_after_the_other_leave_no_memory(decode, peer):
    used = []
    for _ in range(4):
        session = decode(MHA, 64)
        session.attach(0, [1, 2, 3])
        session.step([0])
        session.close()
        time.sleep(1.0)  # the rest is freed in the background
        used.append(peer.ask("status")["allocated"])
    assert used[3] <= used[1], used


def test_decode_that_closes_ends_the_executor_with_one_report(decode, peer):
    session = decode(MHA, 8)
    session.attach(0, [1])
    session.step([0])
    session.end.close(timeout_s=10.0)
    deadline = time.monotonic() + 5.0
    while not (failures := peer.ask("status")["failures"]):
        assert time.monotonic() < deadline, "the executor did not notice"
        time.sleep(0.05)
    assert len(failures) == 1 and "closed" in failures[0]


def test_stop_in_the_middle_of_a_step_returns_soon_and_decode_knows(decode, peer):
    session = decode(MHA, 8, wait_s=60.0)
    session.attach(0, [1, 2])
    session.step([0])
    session.end.begin_step([0])
    session.end.send_q(0, torch.zeros(1, 8, 128, dtype=torch.bfloat16, device="cuda"))  # and never layer 1
    time.sleep(0.2)
    assert peer.ask("stop")["seconds"] < 2.0
    with pytest.raises(PeerLostError, match="test ends"):
        session.end.check()


def test_decode_that_stalls_is_late_and_reported(decode, peer):
    session = decode(MHA, 8, wait_s=1.0)
    session.attach(0, [1, 2])
    session.step([0])
    session.end.begin_step([0])
    session.end.send_q(0, torch.zeros(1, 8, 128, dtype=torch.bfloat16, device="cuda"))
    time.sleep(3.5)  # the executor waits twice as long as decode
    failures = peer.ask("status")["failures"]
    assert len(failures) == 1 and "layer 1" in failures[0]


def test_session_begins_and_serves_while_prefill_computes_and_samples(decode, peer):
    decode(MHA, 16).close()  # kernels are loaded
    peer.ask("load", on=True)
    try:
        for _ in range(3):
            session = decode(MHA, 16)
            for lane in range(16):
                session.attach(lane, list(range(1, 500)))
                session.step(list(range(lane + 1)))
            session.close()
    finally:
        peer.ask("load", on=False)
    assert peer.ask("status")["load_error"] == ""


def test_executor_on_its_own_sms_answers_right(decode, peer):
    sms = peer.ask("split", sms=32)
    try:
        assert sms["executor_sms"] >= 32 and sms["prefill_sms"] > 0
        for _ in range(2):  # the second session gets the stream of the first
            session = decode(GQA, 16)
            for lane in range(16):
                session.attach(lane, list(range(1, 1000)))
            for count in (1, 8, 9, 16):
                session.step(list(range(count)))
            session.close()
    finally:
        peer.ask("split", sms=0)


@pytest.mark.parametrize("kv_heads", [32, 8])
def test_measure_step_of_128_lanes(decode, kv_heads):
    layers, tokens = 8, 512
    pool = Pool(num_layers=layers, num_qo_heads=32, num_kv_heads=kv_heads, num_slots=128 * tokens + 1, on_device=True)
    session = decode(pool, 128)
    for lane in range(128):
        session.attach(lane, list(range(1 + lane * tokens, 1 + (lane + 1) * tokens)))
    lanes = list(range(128))
    for _ in range(3):
        session.begin(lanes)
    session.finish()
    begun, steps = time.monotonic(), 20
    for _ in range(steps):
        session.begin(lanes)
    session.finish()
    seconds = (time.monotonic() - begun) / steps / layers
    read = 128 * tokens * kv_heads * 128 * 2 * 2
    print(
        f"measured: 128 lanes x {tokens} tokens, {kv_heads} KV heads of 32: {seconds * 1e6:.0f} us a layer, round trip "
        f"included, {read / seconds / 1e9:.0f} GB/s of KV"
    )
    assert seconds < 0.1
