"""Endpoints of `ipc` channels: the fixed places in device memory from which kernels read where a channel is.

Made before CUDA graphs are captured, one for an executor, MAX_LINKS in a row for a decode rank; channels come and go
under them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import torch

from sglang_adrenaline import kernels
from sglang_adrenaline.channel.ipc_words import ENDPOINT_WORDS, LANE_BITS, Endpoint
from sglang_adrenaline.errors import ChannelError

MAX_LINKS = 4
"""Prefill servers to which a decode server on a GPU offloads at a time."""


class IpcEndpoint:
    """words: int64 [ENDPOINT_WORDS] on the device, what `kernels` takes.

    Its kernels must run one after the other, as on one stream: on a fork of it, join before the next one.
    """

    def __init__(self, device: int, group: IpcEndpoints | None = None, index: int = 0) -> None:
        """By itself, or the one of this index of a group."""
        self.device = device
        self.words = _ready_words(device, 1) if group is None else group.words.view(-1, ENDPOINT_WORDS)[index]
        self._group = group
        self._index = index
        self._lock = threading.Lock()
        self._owner: object = None
        self._stream: torch.cuda.Stream | None = None

    def places(self, lanes: Sequence[int]) -> list[int]:
        """The lanes of this endpoint's channel as kernels name them that take the whole group."""
        return [self._index << LANE_BITS | lane for lane in lanes]

    def free(self) -> None:
        """No step begins on it any more: the group may give it to another channel. Idempotent, from any thread."""
        if self._group is not None:
            self._group.put_back(self)

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


class IpcEndpoints:
    """The endpoints of a decode rank, one for each link that it may have at a time.

    words: int64 [MAX_LINKS * ENDPOINT_WORDS] on the device. Kernels that take all of it serve every link of a step, and
    rows name their link by their place.
    """

    def __init__(self, device: int) -> None:
        self.words = _ready_words(device, MAX_LINKS)
        self._free = [IpcEndpoint(device, self, index) for index in range(MAX_LINKS)]
        self._lock = threading.Lock()

    def take(self) -> IpcEndpoint:
        """For a new channel, which frees it. From any thread. Raises ChannelError if none is free."""
        with self._lock:
            if not self._free:
                raise ChannelError(
                    f"a decode server on a GPU offloads to at most {MAX_LINKS} prefill servers at a time"
                )
            return self._free.pop(0)

    def put_back(self, endpoint: IpcEndpoint) -> None:
        with self._lock:
            if endpoint not in self._free:
                self._free.append(endpoint)


def _ready_words(device: int, endpoints: int) -> torch.Tensor:
    """Unbound endpoints; the kernels are loaded."""
    words = torch.zeros(endpoints * ENDPOINT_WORDS, dtype=torch.int64, device=torch.device("cuda", device))
    kernels.warm_up(words)
    torch.cuda.current_stream(device).synchronize()
    return words


def descriptor(**fields: int) -> Endpoint:
    """A bound endpoint with these words; all that kernels write starts at 0."""
    result = Endpoint(connected=1, **fields)
    assert ctypes.sizeof(result) == ENDPOINT_WORDS * 8
    return result
