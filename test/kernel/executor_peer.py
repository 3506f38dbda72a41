"""The prefill side of test_gpu_executor.py: a GpuExecutor over a random KV pool, driven by JSON lines on stdin.

    python executor_peer.py DEVICE

Each line is a command {"do": name, ...}, answered by one line of JSON. The methods of `Prefill` are the commands. The
process ends with stdin.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time

import msgspec
import torch

from sglang_adrenaline.channel import opening
from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.prefill import gpu_executor
from sglang_adrenaline.prefill.executor import LayerKV
from sglang_adrenaline.prefill.sm_partition import SmPartition


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """A KV pool that both processes can make: equal on CPU and GPU unless it is `on_device`."""

    num_layers: int = 3
    num_qo_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 128
    num_slots: int = 4000
    on_device: bool = False

    def layers(self, device: torch.device) -> list[LayerKV]:
        generator = torch.Generator(device if self.on_device else "cpu").manual_seed(1)
        size = (self.num_slots, self.num_kv_heads, self.head_dim)

        def values() -> torch.Tensor:
            made = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
            return made.normal_(generator=generator).to(device)

        return [LayerKV(values(), values(), self.sm_scale(layer), 0.0) for layer in range(self.num_layers)]

    def sm_scale(self, layer: int) -> float:
        return self.head_dim**-0.5 * (1 + layer / 4)

    def channel(self, lanes: int) -> ChannelShape:
        return ChannelShape(
            lanes=lanes,
            num_layers=self.num_layers,
            num_qo_heads=self.num_qo_heads,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            dtype="bfloat16",
        )


class Prefill:
    def __init__(self, device: int) -> None:
        self.device = device
        self.executor: gpu_executor.GpuExecutor | None = None
        self.failures: list[str] = []
        self.layers: list[LayerKV] = []
        self.pool: Pool | None = None
        self.partition: SmPartition | None = None
        self.load_error = ""
        self.loading = threading.Event()

    def open(self, pool: dict, lanes: int, wait_s: float) -> dict:
        wanted = msgspec.convert(pool, Pool)
        if wanted != self.pool:
            self.layers = wanted.layers(torch.device("cuda", self.device))
            self.pool = wanted
            gpu_executor.warm_up(self.layers, lanes=lanes, num_qo_heads=wanted.num_qo_heads)
        end = opening.create_executor_end(
            "ipc", wanted.channel(lanes), device=self.device, wait_timeout=wait_s, peer="decode"
        )
        self.failures.clear()
        self.executor = gpu_executor.GpuExecutor(
            end, self.layers, "test", self.failures.append, partition=self.partition
        )
        return {"spec": msgspec.json.encode(end.spec).decode()}

    def attach(self, lane: int, slots: list[int]) -> dict:
        on_host = torch.tensor(slots)
        self.executor.attach(lane, on_host.to(torch.device("cuda", self.device)), on_host.numpy())
        return {}

    def detach(self, lane: int) -> dict:
        self.executor.detach(lane)
        return {}

    def status(self) -> dict:
        gc.collect()
        return {
            "plans": self.executor.plans if self.executor else 0,
            "steps_done": self.executor.steps_done if self.executor else 0,
            "read_tokens": self.executor.read_tokens if self.executor else 0,
            "busy_s": self.executor.busy_s if self.executor else 0.0,
            "failures": self.failures,
            "allocated": torch.cuda.memory_allocated(self.device),
            "load_error": self.load_error,
        }

    def stop(self) -> dict:
        begun = time.monotonic()
        if self.executor is not None:
            self.executor.stop("test ends")
        self.executor = None
        return {"seconds": time.monotonic() - begun}

    def split(self, sms: int) -> dict:
        """Executors from now on stay on so many SMs; 0 = on all of them."""
        self.partition = None
        if not sms:
            return {}
        self.partition = SmPartition(self.device, sms)
        return {"executor_sms": self.partition.executor_sms, "prefill_sms": self.partition.prefill_sms}

    def load(self, on: bool) -> dict:
        """Matrix products and sampling on a stream of another thread, as a prefill server has them."""
        if on:
            self.loading.set()
            threading.Thread(target=self._load, daemon=True).start()
        else:
            self.loading.clear()
        return {}

    def _load(self) -> None:
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream()):
                a = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
                b = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
                while self.loading.is_set():
                    for _ in range(8):
                        scores = a @ b
                    torch.multinomial(torch.softmax(scores[:4].float(), -1), 1).cpu()
        except Exception as error:
            self.load_error = repr(error)


def main() -> None:
    prefill = Prefill(int(sys.argv[1]))
    torch.cuda.set_device(prefill.device)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(prefill, command.pop("do"))(**command)), flush=True)
    prefill.stop()


if __name__ == "__main__":
    main()
