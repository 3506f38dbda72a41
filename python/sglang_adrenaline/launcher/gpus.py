"""Which GPUs each server of a deployment gets: the next ones that are free, or all servers on one GPU.

Looks at device files and CUDA_VISIBLE_DEVICES only, so that the launcher needs no CUDA library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_SHARED_FRACTION = 0.85
"""Of a GPU's memory, over all servers that share it."""


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """How many NVIDIA GPUs the servers will see; 0 on a CPU machine."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([name for name in named.split(",") if name.strip() not in ("", "-1")])
    return sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))


def placements(num_gpus: int, gpus_per_server: Sequence[int]) -> list[list[str]]:
    """SGLang arguments that place each server; empty lists where there is nothing to say.

    Servers get GPUs of their own, in order, as long as there are enough for all; otherwise all of them begin at GPU 0
    and share its memory evenly.
    """
    if num_gpus == 0:
        return [[] for _ in gpus_per_server]
    if sum(gpus_per_server) <= num_gpus:
        first = [sum(gpus_per_server[:index]) for index in range(len(gpus_per_server))]
        return [["--base-gpu-id", str(gpu)] for gpu in first]
    fraction = f"{_SHARED_FRACTION / len(gpus_per_server):.3f}"
    return [["--base-gpu-id", "0", "--mem-fraction-static", fraction] for _ in gpus_per_server]


def without_given(placement: Sequence[str], given: Sequence[str]) -> list[str]:
    """The flag-value pairs of `placement` whose flag the user did not give."""
    flags = {text.partition("=")[0] for text in given}
    pairs = zip(placement[::2], placement[1::2], strict=True)
    return [text for flag, value in pairs if flag not in flags for text in (flag, value)]
