"""Rows of tensors inside a buffer that another process reads or writes, and the quick way to fill them. CPU only."""

from __future__ import annotations

import ctypes

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_QUICK_COPY_BYTES = 64 * 1024
_memmove = ctypes.PyDLL(None).memmove  # keeps the GIL
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = None


class Room:
    """The place of some rows in a buffer, and the way to fill it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._shape, self._dtype = tensor.shape, tensor.dtype
        self._address, self._nbytes = tensor.data_ptr(), tensor.nbytes

    def fill(self, name: str, given: torch.Tensor) -> None:
        """Copy `given` in. Raises ValueError on another shape or dtype.

        The usual small copy keeps the GIL: giving it up for a microsecond can cost milliseconds in a process
        whose other threads compute.
        """
        if given.shape != self._shape or given.dtype != self._dtype:
            raise ValueError(
                f"{name} must be {tuple(self._shape)} {self._dtype}, not {tuple(given.shape)} {given.dtype}"
            )
        if self._nbytes <= _QUICK_COPY_BYTES and given.is_cpu and given.is_contiguous():
            _memmove(self._address, given.data_ptr(), self._nbytes)
        else:
            self.tensor.copy_(given)
