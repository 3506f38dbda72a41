"""What CUDA knows of memory that PyTorch allocated: which GPU, which allocation, its IPC handle."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

from sglang_adrenaline.channel.ipc_memory import HANDLE_BYTES, call_runtime
from sglang_adrenaline.errors import ChannelError

_TYPE_DEVICE, _TYPE_MANAGED = 2, 3
_CAPTURE_RELAXED = 2


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("reserved", ctypes.c_long * 8),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuMemGetAddressRange_v2.argtypes = (
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_uint64,
    )
    return library


def device_of(address: int) -> int | None:
    """The GPU that holds the memory at `address`; None for ordinary memory, pinned or not. Raises ChannelError."""
    if not torch.cuda.is_initialized():
        return None  # no GPU memory exists in this process yet
    attributes = _Attributes()
    where = torch.cuda.current_device()
    call_runtime(where, "cudaPointerGetAttributes", ctypes.byref(attributes), ctypes.c_void_p(address))
    if attributes.type == _TYPE_MANAGED:
        raise ChannelError(f"memory at {address:#x} is managed, which other processes cannot map")
    return attributes.device if attributes.type == _TYPE_DEVICE else None


def allocation_of(device: int, address: int) -> tuple[int, int]:
    """(base, bytes) of the cudaMalloc that `address` lies in; PyTorch's tensors share one. Raises ChannelError."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    with torch.cuda.device(device):
        code = _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
    if code != 0:
        raise ChannelError(f"cuMemGetAddressRange of {address:#x} on GPU {device}: error {code}")
    return base.value, size.value


def export(device: int, base: int) -> bytes:
    """The IPC handle of an allocation. Raises ChannelError unless it came from a plain cudaMalloc."""
    handle = ctypes.create_string_buffer(HANDLE_BYTES)
    call_runtime(device, "cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(base))
    return handle.raw


@contextlib.contextmanager
def while_others_capture() -> Iterator[None]:
    """Let this thread query events and map memory although another thread may be capturing a CUDA graph.

    CUDA else takes such a call for a mistake of the capturing code, fails it and spoils the capture.
    """
    if not torch.cuda.is_initialized():
        yield
        return
    device, mode = torch.cuda.current_device(), ctypes.c_int(_CAPTURE_RELAXED)
    call_runtime(device, "cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        call_runtime(device, "cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode))
