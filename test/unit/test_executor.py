"""The executor's thread: what it tells its owner when its channel ends."""

from __future__ import annotations

import queue
import time

import numpy as np
import pytest
import torch

from sglang_adrenaline.channel import opening
from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.prefill.executor import LayerKV, ThreadExecutor

SHAPE = ChannelShape(lanes=4, num_layers=1, num_qo_heads=2, head_dim=8, v_head_dim=8, dtype="float32")


@pytest.fixture(params=["shm", "zmq"])
def parts(request):
    """(executor, decode's end, the failures that the executor told)."""
    end = opening.create_executor_end(request.param, SHAPE, device=None, wait_timeout=5.0, peer="decode")
    decode = opening.open_decode_end(
        end.spec, device=None, endpoints=None, wait_timeout=5.0, expected=SHAPE, peer="prefill"
    )
    failures: queue.Queue[str] = queue.Queue()
    layer = LayerKV(torch.randn(16, 2, 8), torch.randn(16, 2, 8), 0.5, 0.0)
    executor = ThreadExecutor(end, [layer], "test", failures.put)
    yield executor, decode, failures
    executor.stop("test is over")
    decode.close()


def ask(decode, lanes=(2,)) -> torch.Tensor:
    """lse of one row on each of these lanes."""
    decode.begin_step(lanes)
    decode.send_q(0, torch.randn(len(lanes), 2, 8))
    return decode.recv(0)[1]


def test_lane_without_prefix_is_empty_and_one_with_slots_is_not(parts):
    executor, decode, _ = parts
    assert torch.equal(ask(decode), torch.full((1, 2), -torch.inf))
    executor.attach(2, torch.tensor([3, 5]), np.array([3, 5]))
    assert ask(decode).isfinite().all()
    executor.detach(2)
    assert torch.equal(ask(decode), torch.full((1, 2), -torch.inf))


def test_reads_are_counted_with_the_time_that_they_took(parts):
    executor, decode, _ = parts
    assert (executor.busy_s, executor.worked_s, executor.read_tokens) == (0.0, 0.0, 0)
    executor.attach(2, torch.tensor([3, 5, 6]), np.array([3, 5, 6]))
    executor.attach(1, torch.tensor([3, 5, 7, 8]), np.array([3, 5, 7, 8]))
    begun = time.monotonic()
    for lanes in ([2], [1, 2], [2, 3], [1]):
        ask(decode, lanes)
    took_s = time.monotonic() - begun
    executor.stop("counted")  # the last answer is there a little before it is counted
    assert executor.read_tokens == 3 + 5 + 3 + 4 and 0.0 < executor.busy_s < took_s + 0.1
    assert 0.0 < executor.worked_s < took_s + 0.1


def test_channel_that_ends_is_a_failure_told_once(parts):
    """The decode instance may be there still, and its control connection: it shall come back with another channel."""
    _, decode, failures = parts
    ask(decode)
    decode.abort("the step took too long")
    assert "the step took too long" in failures.get(timeout=5)
    with pytest.raises(queue.Empty):
        failures.get(timeout=0.3)


def test_stop_is_no_failure(parts):
    executor, decode, failures = parts
    ask(decode)
    executor.stop("session over")
    with pytest.raises(queue.Empty):
        failures.get(timeout=0.3)
