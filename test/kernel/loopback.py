"""Both ends of a channel in one process, on one GPU, each with a stream of its own: kernels without CUDA IPC."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint, descriptor
from sglang_adrenaline.channel.ipc_memory import DeviceBuffer, HostWords
from sglang_adrenaline.channel.ipc_words import Endpoint

FLAG_BYTES = 256


@dataclass
class Loopback:
    lanes: int = 8
    num_layers: int = 4
    num_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    wait_limit_s: float = 10.0
    bound: bool = True
    in_group: IpcEndpoint | None = None
    """Decode's endpoint, if it is one of a group."""
    decode: IpcEndpoint = field(init=False)
    executor: IpcEndpoint = field(init=False)

    def __post_init__(self) -> None:
        rows = (2, self.lanes, self.num_heads, self.head_dim)
        self.data_bytes = torch.Size(rows).numel() * 2
        lse_bytes = 2 * self.lanes * self.num_heads * 4
        self.q_memory = DeviceBuffer(0, FLAG_BYTES + self.data_bytes)
        self.o_memory = DeviceBuffer(0, FLAG_BYTES + self.data_bytes + lse_bytes)
        self.q = self.q_memory.tensor(FLAG_BYTES, self.dtype, rows)
        self.q_flag = self.q_memory.tensor(0, torch.int64, (1,))
        self.o = self.o_memory.tensor(FLAG_BYTES, self.dtype, rows)
        self.lse = self.o_memory.tensor(FLAG_BYTES + self.data_bytes, torch.float32, rows[:3])
        self.o_flag = self.o_memory.tensor(0, torch.int64, (1,))
        self.decode_host, self.executor_host = HostWords(0), HostWords(0)
        for host in (self.decode_host, self.executor_host):
            host.control.wait_limit_ns = host.control.open_limit_ns = int(self.wait_limit_s * 1e9)
        self.decode, self.executor = self.in_group or IpcEndpoint(0), IpcEndpoint(0)
        self.decode_stream, self.executor_stream = torch.cuda.Stream(), torch.cuda.Stream()
        if self.bound:
            self.bind()

    def bind(self) -> None:
        q, o, row = self.q_memory.address, self.o_memory.address, self.num_heads * self.head_dim * 2
        for endpoint, host, own, peer in (
            (self.decode, self.decode_host, o, q),
            (self.executor, self.executor_host, q, o),
        ):
            lse = {"own_lse" if endpoint is self.decode else "peer_lse": o + FLAG_BYTES + self.data_bytes}
            endpoint.bind(
                self,
                descriptor(
                    num_layers=self.num_layers,
                    lanes=self.lanes,
                    num_heads=self.num_heads,
                    send_row_bytes=row,
                    recv_row_bytes=row,
                    peer_flag=peer,
                    peer_rows=peer + FLAG_BYTES,
                    own_flag=own,
                    own_rows=own + FLAG_BYTES,
                    control=host.control_address,
                    status=host.status_address,
                    **lse,
                ),
            )
        torch.cuda.synchronize()

    def words(self, endpoint: IpcEndpoint) -> dict[str, int]:
        """What the kernels wrote into an endpoint."""
        words = Endpoint.from_buffer_copy(endpoint.words.cpu().numpy())
        names = ("step", "open", "launches", "error", "arrivals", "wait_ns", "waits", "work_ns", "joins")
        return {name: getattr(words, name) for name in names}

    def abort(self) -> None:
        """End every wait."""
        self.decode_host.control.abort = self.executor_host.control.abort = 1

    def close(self) -> None:
        self.abort()
        torch.cuda.synchronize()
        for memory in (self.q_memory, self.o_memory, self.decode_host, self.executor_host):
            memory.free()


def finishes(stream: torch.cuda.Stream, timeout_s: float) -> bool:
    """Whether all work of the stream ends within the time."""
    deadline = time.monotonic() + timeout_s
    while not stream.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def index(values: list[int] | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32).cuda()
