"""Round trip of a layer through the shm channel between two processes, the executor answering at once."""

from __future__ import annotations

import multiprocessing
import threading
import time
from multiprocessing.connection import Connection

import torch

from sglang_adrenaline.channel import shm
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec, ExecutorEnd
from sglang_adrenaline.errors import AdrenalineError, ConfigError, PeerLostError

STEPS = 20
REPEATS = 5
DEADLINE_S = 120.0


def measure_shm(num_layers: int, num_qo_heads: int, head_dim: int, dtype: str, rows: list[int]) -> dict[int, float]:
    """Median seconds of a layer for each number of rows. Raises ConfigError if it takes too long or fails."""
    shape = ChannelShape(
        lanes=max(rows),
        num_layers=num_layers,
        num_qo_heads=num_qo_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        dtype=dtype,  # type: ignore[arg-type]
    )
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    end = shm.create_executor_end(shape)
    process = context.Process(target=_decode, args=(end.spec, rows, sender), daemon=True)
    thread = threading.Thread(target=answer, args=(end,))
    try:
        process.start()
        thread.start()
        sender.close()
        if not results.poll(DEADLINE_S):
            raise ConfigError(f"the channel's round trip was not measured within {DEADLINE_S:.0f} s")
        try:
            return results.recv()
        except EOFError:
            raise ConfigError("the channel's round trip could not be measured: the other process ended") from None
    finally:
        end.abort("measured")
        thread.join(10)
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join(10)
        end.close()


def _decode(spec: ChannelSpec, rows: list[int], results: Connection) -> None:
    torch.set_num_threads(1)
    end = shm.open_decode_end(spec, wait_timeout=30.0)
    try:
        results.send({count: _median_s(end, spec.shape, count) for count in rows})
    except AdrenalineError:
        results.close()
    finally:
        end.close()


def _median_s(end: shm.ShmDecodeEnd, shape: ChannelShape, rows: int) -> float:
    q = torch.randn(rows, shape.num_qo_heads, shape.head_dim).to(getattr(torch, shape.dtype))
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        for _ in range(STEPS):
            end.begin_step(list(range(rows)))
            for layer in range(shape.num_layers):
                end.send_q(layer, q)
                end.recv(layer)
        times.append((time.perf_counter() - begun) / STEPS / shape.num_layers)
    return sorted(times)[REPEATS // 2]


def answer(end: ExecutorEnd) -> None:
    """Answer every call with its own queries, at once, until the channel ends."""
    lse = torch.zeros(end.spec.shape.lanes, end.spec.shape.num_qo_heads)
    try:
        while True:
            call = end.wait_call(1.0)
            if call is not None:
                end.answer(call, call.q, lse[: len(call.lanes)])
    except PeerLostError:
        return
