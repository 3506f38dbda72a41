"""How long a thread waits to launch a kernel while another thread of the process copies behind a long kernel.

    python benchmark/launch_stalls.py

The stream of the copy waits for a stream on which a kernel of 60 ms runs, as SGLang's schedule stream waits for the
forward pass. Needs a GPU. What it showed: docs/gpu-results.md, "Launches that waited".
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import torch

BUSY_S = 0.06
CYCLES_PER_S = 1.9e9
ROUNDS = 5


def measure(other: Callable[[], object]) -> float:
    """Seconds from the wish to launch until the kernel is over, at worst; `other` runs in another thread meanwhile."""
    busy, copying, ours = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    value = torch.zeros(512, device="cuda")
    worst = 0.0

    def copy() -> None:
        with torch.cuda.stream(copying):
            other()

    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        with torch.cuda.stream(busy):
            torch.cuda._sleep(int(BUSY_S * CYCLES_PER_S))
        copying.wait_stream(busy)
        thread = threading.Thread(target=copy)
        thread.start()
        time.sleep(BUSY_S / 15)  # it is in the copy by now
        begun = time.perf_counter()
        with torch.cuda.stream(ours):
            value.add_(1)
            done = torch.cuda.Event()
            done.record()
        while not done.query():
            time.sleep(2e-5)
        worst = max(worst, time.perf_counter() - begun)
        thread.join()
    return worst


def wait_by_polling() -> None:
    done = torch.cuda.Event()
    done.record()
    while not done.query():
        time.sleep(1e-4)


def main() -> int:
    if not torch.cuda.is_available():
        print("launch_stalls.py: error: no GPU", file=sys.stderr)
        return 1
    source = torch.zeros(4096, device="cuda")
    pinned = torch.zeros(4096, pin_memory=True)
    ordinary = torch.zeros(4096)
    others: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "copies from pinned memory": lambda: source.copy_(pinned, non_blocking=True),
        "copies from ordinary memory": lambda: source.copy_(ordinary, non_blocking=True),
        "copies to pinned memory": lambda: pinned.copy_(source, non_blocking=True),
        "copies to ordinary memory (.cpu())": source.cpu,
        "polls, then copies to ordinary memory": lambda: (wait_by_polling(), source.cpu()),
    }
    for other in others.values():
        measure(other)  # the first launch of a kernel loads it
    for name, other in others.items():
        print(f"the other thread {name:40s} launch and kernel take at most {1e3 * measure(other):7.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
