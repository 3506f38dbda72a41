"""What both ends of an `ipc` channel share: memory, binding to an endpoint, abort, trouble, release."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint, descriptor
from sglang_adrenaline.channel.ipc_memory import DeviceBuffer, HostWords, PeerMemory
from sglang_adrenaline.channel.ipc_segment import IpcSegment
from sglang_adrenaline.channel.ipc_watchdog import StepClock, Watchdog
from sglang_adrenaline.channel.ipc_words import EndpointError
from sglang_adrenaline.errors import ChannelError, PeerLostError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FLAG_BYTES = 256
"""A flag stands at the start of a buffer, away from the data's cache lines."""

_LATE_MARGIN_S = 1.0  # the kernels' own limit comes first; this one is for a step that is not even running


def check_shape(shape: ChannelShape) -> None:
    """Raises ChannelError where the kernels cannot serve the shape."""
    if shape.dtype not in DTYPES:
        raise ChannelError(f"channel ipc carries bfloat16 or float16, not {shape.dtype}")
    if shape.head_dim % 8 or shape.v_head_dim not in (64, 128, 256):
        raise ChannelError(
            f"channel ipc needs head_dim a multiple of 8 and v_head_dim 64, 128 or 256, "
            f"not {shape.head_dim} and {shape.v_head_dim}"
        )


def q_bytes(shape: ChannelShape) -> int:
    """Bytes of the q buffer, both parities."""
    return 2 * shape.lanes * shape.num_qo_heads * shape.head_dim * 2


def o_bytes(shape: ChannelShape) -> int:
    return 2 * shape.lanes * shape.num_qo_heads * shape.v_head_dim * 2


def lse_bytes(shape: ChannelShape) -> int:
    return 2 * shape.lanes * shape.num_qo_heads * 4


class IpcEnd:
    """Owns: the segment's mapping, `_own`, `_peer_memory`, `_host` and the watchdog's thread, until that has ended."""

    own_abort: int
    peer_abort: int
    own_unmapped: int
    peer_unmapped: int

    def __init__(
        self,
        segment: IpcSegment,
        own: DeviceBuffer,
        host: HostWords,
        endpoint: IpcEndpoint | None,
        wait_timeout: float,
        peer: str,
    ) -> None:
        self.peer = peer
        self.name = f"ipc-{peer}"
        self.shape = segment.shape
        self.device = own.device
        self.endpoint = endpoint or IpcEndpoint(own.device)
        self._segment = segment
        self._own = own
        self._host = host
        self._peer_memory: PeerMemory | None = None
        self._bound = False
        self._wait_timeout = wait_timeout
        self._aborted = ""
        self._closed = False
        self._lock = threading.Lock()
        self._clock = StepClock()
        host.control.wait_limit_ns = host.control.open_limit_ns = int(wait_timeout * 1e9)
        self._watchdog = Watchdog(self)

    def start_watchdog(self) -> None:
        self._watchdog.start()

    # ---- binding ----------------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Put this channel under the endpoint, for work that the current stream gets from now on. Idempotent."""
        self.check()
        if self._bound:
            return
        assert self._peer_memory is not None
        self._bound = True
        self.endpoint.bind(self, descriptor(**self._addresses(self._own.address, self._peer_memory.address)))

    def _addresses(self, own: int, peer: int) -> dict[str, int]:
        raise NotImplementedError

    def _common(self) -> dict[str, int]:
        return {
            "num_layers": self.shape.num_layers,
            "lanes": self.shape.lanes,
            "num_heads": self.shape.num_qo_heads,
            "control": self._host.control_address,
            "status": self._host.status_address,
        }

    # ---- the end of it ----------------------------------------------------------------------------------------------

    @property
    def failure(self) -> str | None:
        """Why the channel ended, or None. Looks at host memory only: cheap, from any thread, ahead of the watchdog."""
        return self._aborted or self.trouble()

    def check(self) -> None:
        """Raises PeerLostError once the channel has ended."""
        reason = self.failure
        if reason is not None:
            self.abort(reason)
            raise PeerLostError(f"channel to {self.peer} has ended: {self._aborted}")

    def trouble(self) -> str | None:
        """Part of `Watched`."""
        status = self._host.status
        peer_reason = self._segment.aborted(self.peer_abort)
        if peer_reason is not None:
            return f"{self.peer} closed the channel: {peer_reason}"
        if self._segment.peer_died():
            return f"{self.peer} is gone: its process has ended"
        if status.error:
            step, layer = divmod(status.error_call, self.shape.num_layers)
            return f"{self.peer}, step {step}, layer {layer}: {self._words(EndpointError(status.error))}"
        late_s = self._clock.late_s(status.steps_opened, status.steps_done)
        if late_s > self._wait_timeout + _LATE_MARGIN_S:
            return f"{self.peer}, step {status.steps_done + 1}: not done after {late_s:.1f} s"
        return None

    def _words(self, error: EndpointError) -> str:
        return {
            EndpointError.LATE: f"nothing came within {self._wait_timeout:g} s",
            EndpointError.ABORTED: "the wait was given up",
            EndpointError.SHAPE: "rows of another size than the channel's",
        }.get(error, error.name)

    def abort(self, reason: str) -> None:
        """See `base.DecodeEnd.abort`."""
        with self._lock:
            if self._aborted:
                return
            self._aborted = reason or "no reason given"
        self.endpoint.free()
        self._host.control.abort = 1
        self._segment.abort(self.own_abort, self._aborted)

    def close(self, timeout_s: float = 0.0) -> bool:
        """Abort, and leave the freeing to the watchdog; True if that was over within `timeout_s`. Idempotent."""
        self.abort("closed")
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._watchdog.release()
        return self._watchdog.join(timeout_s)

    def release_steps(self) -> list[Callable[[], bool]]:
        """Part of `Watched`."""
        event = self.endpoint.unbind(self) if self._bound else None

        def kernels_are_over() -> bool:
            return event is None or event.query()

        def unmap() -> bool:
            if self._peer_memory is not None:
                self._peer_memory.free()
            self._segment.mark(self.own_unmapped)
            return True

        def peer_is_out() -> bool:
            return not self._shared() or self._segment.marked(self.peer_unmapped) or self._segment.peer_died()

        def free() -> bool:
            self._drop_views()
            self._own.free()
            self._host.free()
            return True

        return [kernels_are_over, unmap, peer_is_out, free]

    def _shared(self) -> bool:
        """Whether the peer may have mapped our memory."""
        return True

    def _drop_views(self) -> None:
        """Forget tensors over `_own`."""
