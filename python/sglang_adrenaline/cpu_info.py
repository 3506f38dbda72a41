"""Facts about the machine: accelerator, processor, usable cores, bfloat16 arithmetic. Reads only; imports no SGLang."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

X86_64 = ("x86_64", "amd64")
ARM64 = ("arm64", "aarch64")
_ACCELERATOR_PACKAGES = ("torch_npu", "torch_musa", "torchada", "habana_frameworks")


def is_supported_cpu() -> bool:
    return platform.machine().lower() in X86_64 + ARM64


def is_arm64() -> bool:
    return platform.machine().lower() in ARM64


def has_accelerator() -> bool:
    """Whether PyTorch, or a vendor's package beside it, offers a device that SGLang would rather run on."""
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available():
        return True
    return any(importlib.util.find_spec(name) is not None for name in _ACCELERATOR_PACKAGES)


def has_bf16_arithmetic() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16, AMX, Arm BF16); elsewhere it is emulated."""
    import torch

    if is_arm64():
        return "bf16" in _arm_features()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def usable_cores() -> int:
    """Cores this process may use: its affinity mask, further limited by a cgroup v2 quota; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cgroup_cores()
    return max(1, cores if quota is None else min(cores, round(quota)))


def device_name(path: str = "/proc/cpuinfo") -> str:
    """Of this machine, as its profiles name it: the processor as the system calls it, and the cores that there are."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count() or 1} cores"


def _cgroup_cores(path: str = "/sys/fs/cgroup/cpu.max") -> float | None:
    """Cores' worth of CPU time that the control group allows, or None without a limit."""
    try:
        with open(path) as file:
            quota, period = file.read().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _arm_features(path: str = "/proc/cpuinfo") -> set[str]:
    try:
        with open(path) as file:
            return {word for line in file if line.startswith("Features") for word in line.split(":", 1)[1].split()}
    except OSError:
        return set()
