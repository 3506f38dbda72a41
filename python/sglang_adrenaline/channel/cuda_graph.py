"""A CUDA graph that is captured without PyTorch's bookkeeping, next to a thread that computes.

`torch.cuda.graph` waits for the whole device, gives the allocator's cached memory back and puts the default random
generator into a state in which sampling on any other stream raises. None of that may happen in a prefill server that
is serving. Here the capture is the stream's and the thread's alone; in return nothing may be allocated in it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from sglang_adrenaline.channel.ipc_memory import call_runtime

_THREAD_LOCAL = 1


class CudaGraph:
    """Owns the executable graph; `free` it once it does not run any more. What it reads and writes is its user's."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        """`stream`: what is captured, and where the graph is launched; not the default stream."""
        self._device = stream.device.index
        self._stream = ctypes.c_void_p(stream.cuda_stream)
        self._executable: ctypes.c_void_p | None = None

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Record what this thread enqueues on the stream, which must be current. Raises ChannelError."""
        assert self._executable is None
        call_runtime(self._device, "cudaStreamBeginCapture", self._stream, ctypes.c_int(_THREAD_LOCAL))
        graph = ctypes.c_void_p()
        try:
            yield
        except BaseException:
            # The capture has to end, and what ends it may only repeat the error.
            with contextlib.suppress(Exception):
                call_runtime(self._device, "cudaStreamEndCapture", self._stream, ctypes.byref(graph))
            raise
        call_runtime(self._device, "cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        executable = ctypes.c_void_p()
        try:
            call_runtime(
                self._device, "cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
            )
        finally:
            call_runtime(self._device, "cudaGraphDestroy", graph)
        self._executable = executable
        # Else the first launch does it, while decode waits.
        call_runtime(self._device, "cudaGraphUpload", executable, self._stream)

    def launch(self) -> None:
        """Enqueue the graph on its stream. Raises ChannelError."""
        assert self._executable is not None, "nothing was captured"
        call_runtime(self._device, "cudaGraphLaunch", self._executable, self._stream)

    def free(self) -> None:
        if self._executable is not None:
            executable, self._executable = self._executable, None
            call_runtime(self._device, "cudaGraphExecDestroy", executable)
