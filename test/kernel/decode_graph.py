"""The decode side of tests with executors in other processes: a step as a CUDA graph, and how to start executors."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Collection, Mapping

import msgspec
import peer as peer_process
import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.attention.merge import merge_rows_
from sglang_adrenaline.channel import ipc
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoints

SHAPE = ChannelShape(lanes=16, num_layers=3, num_qo_heads=8, head_dim=128, v_head_dim=128, dtype="bfloat16")
BATCH = 20

Start = Callable[..., subprocess.Popen[str]]
"""Starts peer.py with these arguments."""


class DecodeGraph:
    """A decode step over a rank's endpoints, captured before there is a channel."""

    def __init__(self, shape: ChannelShape, *, forked: bool = False) -> None:
        """`forked`: put beside the local work, as a branch of the graph that the merge joins."""
        self.endpoints = IpcEndpoints(0)
        self.shape = shape
        self.stream = torch.cuda.Stream()
        self.factors: dict[ipc.IpcDecodeEnd, float] = {}
        """What an executor multiplies by, if not by 2."""
        size = (shape.num_layers, BATCH, shape.num_qo_heads)
        self.q = torch.zeros(*size, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        self.o_local, self.o = torch.zeros_like(self.q), torch.zeros_like(self.q)
        self.lse_local = torch.zeros(size, device="cuda")
        self.lse = torch.zeros_like(self.lse_local)
        self.rows = torch.full((BATCH,), -1, dtype=torch.int32, device="cuda")
        self.places = torch.full_like(self.rows, -1)
        self._parts: list[tuple[ipc.IpcDecodeEnd, torch.Tensor, torch.Tensor]] = []
        self.graph = torch.cuda.CUDAGraph()
        words = self.endpoints.words
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            branch = torch.cuda.Stream() if forked else self.stream
            for layer in range(shape.num_layers):
                branch.wait_stream(self.stream)
                with torch.cuda.stream(branch):
                    kernels.put_queries(words, self.q[layer], self.rows, self.places, layer)
                self.o[layer].copy_(self.o_local[layer])
                self.lse[layer].copy_(self.lse_local[layer])
                self.stream.wait_stream(branch)
                kernels.wait_and_merge_(words, self.o[layer], self.lse[layer], self.rows, self.places, layer)

    def step(self, offloaded: Mapping[ipc.IpcDecodeEnd, int]) -> None:
        """Random inputs, then one replay with so many rows of each link; does not wait for it."""
        rows = torch.randperm(BATCH)[: sum(offloaded.values())]
        parts = list(zip(offloaded, rows.split(list(offloaded.values())), strict=True))
        self._parts = [(end, mine, torch.randperm(self.shape.lanes)[: len(mine)]) for end, mine in parts]
        with torch.cuda.stream(self.stream):
            for tensor in (self.q, self.o_local, self.lse_local):
                tensor.normal_()
            places: list[int] = []
            for end, _, lanes in self._parts:
                end.begin_step(lanes.tolist())
                places += end.places(lanes.tolist())
            padding = [-1] * (BATCH - len(rows))
            for tensor, values in ((self.rows, rows.tolist()), (self.places, places)):
                pinned = torch.tensor(values + padding, dtype=torch.int32).pin_memory()
                tensor.copy_(pinned, non_blocking=True)
            self.graph.replay()

    def check(self, *, unanswered: Collection[ipc.IpcDecodeEnd] = ()) -> None:
        """Compare the outputs of the last step with the torch reference; rows of `unanswered` are as they were."""
        self.stream.synchronize()
        o, lse = self.o_local.clone(), self.lse_local.clone()
        for end, rows, lanes in self._parts:
            if end in unanswered:
                continue
            rows, remote_lse = rows.cuda(), peer_process.lane_lse(self.shape)[lanes].cuda()
            for layer in range(self.shape.num_layers):
                answer = self.q[layer][rows] * self.factors.get(end, 2.0)
                merge_rows_(o[layer], lse[layer], answer, remote_lse, rows)
        torch.testing.assert_close(self.o, o)
        torch.testing.assert_close(self.lse, lse, rtol=1e-5, atol=1e-5)


def spec_of(process: subprocess.Popen[str]) -> ChannelSpec:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the peer ended with code {process.wait(5.0)}"
    return msgspec.json.decode(line, type=ChannelSpec)


def start_executor(
    start: Start, gpu: int, mode: str, shape: ChannelShape = SHAPE, wait_s: float = 20.0, factor: float = 2.0
) -> subprocess.Popen[str]:
    return start("executor", gpu, mode, msgspec.json.encode(shape).decode(), wait_s, factor)


def executor_for(start: Start, gpu: int, mode: str, **kwargs: object) -> ChannelSpec:
    return spec_of(start_executor(start, gpu, mode, **kwargs))


def open_end(opened: list, spec: ChannelSpec, wait_s: float = 20.0, **kwargs: object) -> ipc.IpcDecodeEnd:
    """`opened`: the fixture that closes it."""
    end = ipc.open_decode_end(spec, device=0, wait_timeout=wait_s, **kwargs)
    opened.append(end)
    return end


def wait_for(condition: Callable[[], object], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
