"""Splits the SMs of a prefill GPU between prefill and the attention executor: two green contexts in one process.

What runs on a stream of a green context stays on its SMs, kernels of a CUDA graph included, if the graph was captured
on such a stream. Memory bandwidth is not split. Prefill's SMs are those that the executor's leave.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from sglang_adrenaline.errors import ConfigError


class SmPartition:
    """Lives as long as the process; streams may be taken from any thread."""

    def __init__(self, device: int, executor_sms: int) -> None:
        """`executor_sms` is rounded up to what the GPU can set apart. Raises ConfigError if that is not possible."""
        torch.cuda.init()
        with torch.cuda.device(device):
            torch.zeros(1, device=torch.device("cuda", device))  # the primary context, which both parts belong to
            driver = _driver()
            handle = _check(driver.cuDeviceGet(device))
            everything = _check(driver.cuDeviceGetDevResource(handle, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
            total = everything.sm.smCount
            if not 0 < executor_sms < total:
                raise ConfigError(f"--adrenaline-executor-sms must leave some of the GPU's {total} SMs to prefill")
            parts, _, rest = _check(driver.cuDevSmResourceSplitByCount(1, everything, 0, executor_sms))
            if not parts or rest.sm.smCount == 0:
                raise ConfigError(f"--adrenaline-executor-sms {executor_sms}: the GPU cannot set that many SMs apart")
            self.device = device
            self.executor_sms: int = parts[0].sm.smCount
            self.prefill_sms: int = rest.sm.smCount
            self._executor_context = _green_context(handle, parts[0])
            self._prefill_context = _green_context(handle, rest)
        self._lock = threading.Lock()
        self._idle: list[torch.cuda.Stream] = []

    def prefill_stream(self) -> torch.cuda.Stream:
        """A new stream on prefill's SMs."""
        return self._stream(self._prefill_context)

    def take_executor_stream(self) -> torch.cuda.Stream:
        """A stream on the executor's SMs that nobody else uses until it is given back."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._stream(self._executor_context)

    def give_back(self, stream: torch.cuda.Stream) -> None:
        """All work of the stream is over."""
        with self._lock:
            self._idle.append(stream)

    def _stream(self, context: Any) -> torch.cuda.Stream:
        driver = _driver()
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        pointer = int(_check(driver.cuGreenCtxStreamCreate(context, flags, 0)))
        return torch.cuda.ExternalStream(pointer, device=torch.device("cuda", self.device))


def _green_context(device: Any, resource: Any) -> Any:
    driver = _driver()
    description = _check(driver.cuDevResourceGenerateDesc([resource], 1))
    return _check(
        driver.cuGreenCtxCreate(description, device, driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM)
    )


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ConfigError(f"--adrenaline-executor-sms needs the package cuda-bindings: {error}") from None
    return driver


def _check(result: tuple[Any, ...]) -> Any:
    """The values that a driver call returned after its status. Raises ConfigError."""
    status, *values = result
    if int(status) != 0:
        raise ConfigError(f"--adrenaline-executor-sms: the driver refuses to split the GPU: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
