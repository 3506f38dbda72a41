"""Memory of an `ipc` channel: device memory that another process may map, the peer's mapping, mapped host words.

Device memory comes straight from cudaMalloc, since a CUDA IPC handle stands for a whole allocation and PyTorch's
allocator hands out parts. Each object here has one owner, who calls `free` once no kernel uses the memory any more;
whatever is left goes with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from sglang_adrenaline.channel.ipc_words import HostControl, HostStatus
from sglang_adrenaline.errors import ChannelError

HANDLE_BYTES = 64

_GRANULE = 1 << 21  # the driver may put smaller allocations into one block, which a handle would then open whole
_LAZY_PEER_ACCESS = 1
_HOST_PORTABLE_MAPPED = 1 | 2
_HOST_BYTES = 4096
_STATUS_AT = 256  # another pair of cache lines than the control words


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


@functools.cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that PyTorch has loaded. Raises ChannelError without one."""
    if torch.version.cuda is None:
        raise ChannelError("channel ipc needs a PyTorch build with CUDA")
    name = f"libcudart.so.{torch.version.cuda.partition('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise ChannelError(f"channel ipc needs {name}: {error}") from None
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaIpcOpenMemHandle.argtypes = (ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint)
    return library


def call_runtime(device: int, function: str, *args: object) -> None:
    """Call the runtime with `device` current. Raises ChannelError with the runtime's own words."""
    with torch.cuda.device(device):
        runtime = _runtime()
        code = getattr(runtime, function)(*args)
        if code != 0:
            runtime.cudaGetLastError()  # else the next launch would report this error as its own
            raise ChannelError(f"{function} on GPU {device}: {runtime.cudaGetErrorString(code).decode()}")


class DeviceBuffer:
    """Zeroed memory of one GPU. `export` gives what another process needs to map it."""

    def __init__(self, device: int, num_bytes: int) -> None:
        torch.zeros(1, device=device)  # the primary context, before the runtime is called behind PyTorch's back
        pointer = ctypes.c_void_p()
        size = -(-num_bytes // _GRANULE) * _GRANULE
        call_runtime(device, "cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        assert pointer.value is not None
        self.device = device
        self.num_bytes = num_bytes
        self.address: int = pointer.value
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            self.tensor(0, torch.uint8, (num_bytes,)).zero_()
        stream.synchronize()

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """A view; must not outlive `free`."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        assert offset >= 0 and offset + size <= self.num_bytes, (offset, size, self.num_bytes)
        flat = torch.as_tensor(_CudaBytes(self.address + offset, size), device=torch.device("cuda", self.device))
        return flat.view(dtype).view(*shape)

    def export(self) -> bytes:
        handle = _Handle()
        call_runtime(self.device, "cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(self.address))
        return bytes(handle)

    def free(self) -> None:
        call_runtime(self.device, "cudaFree", ctypes.c_void_p(self.address))


class PeerMemory:
    """Another process's DeviceBuffer, mapped for kernels of the *local* `device`.

    A mapping that was opened with the peer's device current cannot be used by kernels of ours.
    """

    def __init__(self, device: int, handle: bytes) -> None:
        pointer = ctypes.c_void_p()
        call_runtime(
            device,
            "cudaIpcOpenMemHandle",
            ctypes.byref(pointer),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        assert pointer.value is not None
        self.device = device
        self.address: int = pointer.value

    def free(self) -> None:
        call_runtime(self.device, "cudaIpcCloseMemHandle", ctypes.c_void_p(self.address))


class HostWords:
    """HostControl and HostStatus in host memory that kernels of any GPU reach.

    Written and read without CUDA calls, so that a thread can end a wait while everything else is stuck.
    """

    def __init__(self, device: int) -> None:
        pointer = ctypes.c_void_p()
        call_runtime(
            device,
            "cudaHostAlloc",
            ctypes.byref(pointer),
            ctypes.c_size_t(_HOST_BYTES),
            ctypes.c_uint(_HOST_PORTABLE_MAPPED),
        )
        assert pointer.value is not None
        self._device = device
        self._address: int = pointer.value
        ctypes.memset(self._address, 0, _HOST_BYTES)
        self.control = HostControl.from_address(self._address)
        self.status = HostStatus.from_address(self._address + _STATUS_AT)
        mapped = ctypes.c_void_p()
        call_runtime(device, "cudaHostGetDevicePointer", ctypes.byref(mapped), pointer, ctypes.c_uint(0))
        assert mapped.value is not None
        self.control_address = mapped.value
        self.status_address = mapped.value + _STATUS_AT

    def free(self) -> None:
        """The words keep their last values for readers."""
        self.control = HostControl.from_buffer_copy(self.control)
        self.status = HostStatus.from_buffer_copy(self.status)
        call_runtime(self._device, "cudaFreeHost", ctypes.c_void_p(self._address))


class _CudaBytes:
    """Lets PyTorch wrap memory that it did not allocate."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class Freeable(Protocol):
    def free(self) -> None: ...


@contextlib.contextmanager
def freed_on_error(*owned: Freeable) -> Iterator[None]:
    """Free what was made so far if the block raises."""
    try:
        yield
    except BaseException:
        for item in owned:
            with contextlib.suppress(ChannelError):
                item.free()
        raise
