"""The other process of a test: an executor that answers o = FACTOR q, lse = lane / 8 + head, or a decode end.

    python peer.py executor DEVICE MODE SHAPE_JSON WAIT_S FACTOR   prints the spec, then serves until stdin closes
    python peer.py decode DEVICE SPEC_JSON WAIT_S                  runs steps until it is killed, printing "steps N"


MODE: eager, graph, or stall:N (eager, answers nothing from step N on). Exit code 3: the channel ended first.
"""

from __future__ import annotations

import sys
import threading
import time

import msgspec
import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.channel import ipc
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.errors import PeerLostError

AHEAD = 2
"""Graph launches that may wait for a step at a time."""


def lane_lse(shape: ChannelShape) -> torch.Tensor:
    """[lanes, num_qo_heads] float32: the lse that the executor answers."""
    lanes = torch.arange(shape.lanes, dtype=torch.float32)[:, None] / 8
    return lanes + torch.arange(shape.num_qo_heads, dtype=torch.float32)[None, :]


def executor(device: int, mode: str, shape: ChannelShape, wait_s: float, factor: float) -> None:
    torch.cuda.set_device(device)
    end = ipc.create_executor_end(shape, device=device, wait_timeout=wait_s)
    print(msgspec.json.encode(end.spec).decode(), flush=True)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    with torch.cuda.stream(torch.cuda.Stream()):
        try:
            while not end.connect(0.2):
                if stop.is_set():
                    return
            (serve_graphs if mode == "graph" else serve_calls)(end, mode, stop, factor)
        except PeerLostError as error:
            print(error, file=sys.stderr)
            sys.exit(0 if end.close(timeout_s=10.0) and stop.wait(5.0) else 3)
    sys.exit(0 if end.close(timeout_s=10.0) else 4)


def serve_calls(end: ipc.IpcExecutorEnd, mode: str, stop: threading.Event, factor: float) -> None:
    last = int(mode.partition(":")[2] or sys.maxsize)
    lse = lane_lse(end.shape).cuda()
    while not stop.is_set():
        call = end.wait_call(0.2)
        if call is not None and call.step < last:
            end.answer(call, call.q * factor, lse[list(call.lanes)])
        elif call is not None:
            while not stop.is_set():
                time.sleep(0.05)
                end.check()


def serve_graphs(end: ipc.IpcExecutorEnd, mode: str, stop: threading.Event, factor: float) -> None:
    lse, answer = lane_lse(end.shape).cuda(), torch.zeros_like(end.q[0])
    torch.cuda.current_stream().synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for layer in range(end.shape.num_layers):
            kernels.wait_layer(end.endpoint.words, layer) if layer else kernels.wait_step(end.endpoint.words)
            torch.mul(end.q[layer & 1], factor, out=answer)
            kernels.put_answers(end.endpoint.words, answer, lse, layer)
    launched = 0
    while not stop.is_set():
        end.check()
        if launched - end.launches_over < AHEAD:
            end.launching()
            graph.replay()
            launched += 1
        else:
            time.sleep(20e-6)


def decode(device: int, spec: ChannelSpec, wait_s: float) -> None:
    torch.cuda.set_device(device)
    end = ipc.open_decode_end(spec, device=device, wait_timeout=wait_s)
    q = torch.ones(1, end.shape.num_qo_heads, end.shape.head_dim, dtype=torch.bfloat16, device="cuda")
    while True:
        end.begin_step([0])
        for layer in range(end.shape.num_layers):
            end.send_q(layer, q)
            end.recv(layer)
        torch.cuda.synchronize()
        if end.steps % 20 == 0:
            print(f"steps {end.steps}", flush=True)


if __name__ == "__main__":
    role, where, *rest = sys.argv[1:]
    if role == "executor":
        executor(int(where), rest[0], msgspec.json.decode(rest[1], type=ChannelShape), float(rest[2]), float(rest[3]))
    else:
        decode(int(where), msgspec.json.decode(rest[0], type=ChannelSpec), float(rest[1]))
