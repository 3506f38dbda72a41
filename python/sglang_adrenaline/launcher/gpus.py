"""Which GPUs each server of a deployment gets: its own where there are enough, else those with the fewest servers.

Looks at files and variables of the environment only, so that the launcher needs no CUDA library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_SHARED_FRACTION = 0.85
"""Of a GPU's memory, over all servers on it, where servers share GPUs."""


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs the servers will see; 0 on a CPU machine."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1")])
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))


def has_mps(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether processes that share a GPU will run side by side, by NVIDIA MPS, whose daemon keeps a socket."""
    return (Path(environment.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").is_socket()


def placements(num_gpus: int, gpus_per_server: Sequence[int]) -> list[list[str]]:
    """SGLang arguments that place each server; empty lists where there is nothing to say.

    Each server gets the block of GPUs with the fewest servers so far, the first of equal ones. Where GPUs have to be
    shared, so is their memory, evenly.
    """
    if num_gpus == 0:
        return [[] for _ in gpus_per_server]
    shared = sum(gpus_per_server) > num_gpus
    load = [0] * num_gpus
    blocks = []
    for size in gpus_per_server:
        # Blocks do not overlap by halves where they are shared: a GPU would have more than its part of servers.
        starts = range(0, max(num_gpus - size, 0) + 1, size if shared else 1)
        first = min(starts, key=lambda start: max(load[start : start + size]))
        for gpu in range(first, min(first + size, num_gpus)):
            load[gpu] += 1
        blocks.append(range(first, min(first + size, num_gpus)))
    placed = [["--base-gpu-id", str(block.start)] for block in blocks]
    if shared:
        for arguments, block in zip(placed, blocks, strict=True):
            servers = max(load[gpu] for gpu in block)
            arguments += ["--mem-fraction-static", f"{_SHARED_FRACTION / servers:.3f}"]
    return placed


def without_given(placement: Sequence[str], given: Sequence[str]) -> list[str]:
    """The flag-value pairs of `placement` whose flag the user did not give."""
    flags = {text.partition("=")[0] for text in given}
    pairs = zip(placement[::2], placement[1::2], strict=True)
    return [text for flag, value in pairs if flag not in flags for text in (flag, value)]
