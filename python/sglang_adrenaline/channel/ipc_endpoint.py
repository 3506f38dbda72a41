"""The endpoint of an `ipc` channel: the fixed place in device memory from which kernels read where a channel is.

Made once per decode rank and executor, before CUDA graphs are captured; channels come and go under it.
"""

from __future__ import annotations

import ctypes
import threading

import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.channel.ipc_words import ENDPOINT_WORDS, Endpoint


class IpcEndpoint:
    """words: int64 [ENDPOINT_WORDS] on the device, what `kernels` takes.

    Its kernels must run one after the other, as on one stream: on a fork of it, join before the next one.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.words = torch.zeros(ENDPOINT_WORDS, dtype=torch.int64, device=torch.device("cuda", device))
        kernels.warm_up(self.words)
        torch.cuda.current_stream(device).synchronize()
        self._lock = threading.Lock()
        self._owner: object = None
        self._stream: torch.cuda.Stream | None = None

    def bind(self, owner: object, descriptor: Endpoint) -> None:
        """Put a channel under the endpoint, for kernels that are enqueued on the current stream from now on.

        Replaces the channel that was there. Does not wait. Not while the stream is being captured.
        """
        # A tensor of the pinned allocator: PyTorch reuses its memory only after the copy.
        host = torch.frombuffer(bytearray(descriptor), dtype=torch.int64).pin_memory()
        with self._lock, torch.cuda.device(self.device):
            self.words.copy_(host, non_blocking=True)
            self._owner = owner
            self._stream = torch.cuda.current_stream(self.device)

    def unbind(self, owner: object) -> torch.cuda.Event | None:
        """Take `owner`'s channel away if it is there. From any thread.

        Returns an event after which no kernel uses its memory, or None if it never was bound.
        """
        with self._lock, torch.cuda.device(self.device):
            if self._stream is None:
                return None
            with torch.cuda.stream(self._stream):
                if self._owner is owner:
                    self._owner = None
                    self.words.zero_()
                event = torch.cuda.Event()
                event.record()
            return event


def descriptor(**fields: int) -> Endpoint:
    """A bound endpoint with these words; all that kernels write starts at 0."""
    result = Endpoint(connected=1, **fields)
    assert ctypes.sizeof(result) == ENDPOINT_WORDS * 8
    return result
