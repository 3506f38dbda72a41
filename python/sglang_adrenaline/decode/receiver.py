"""Wraps SGLang's KV receiver of a request that may be offloaded: its poll waits for the prefill side's word.

SGLang drives requests by polling their receivers. Two states are held back: the handshake is not reported as done
before prefill accepted or refused the prefix, and a transfer not as successful before the prefix is pinned.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.base.conn import KVPoll

from sglang_adrenaline import compat
from sglang_adrenaline.decode.offload import Offload, OffloadState

if TYPE_CHECKING:
    from sglang_adrenaline.decode.runtime import DecodeRuntime


class GatedReceiver:
    """Everything but the members defined here is the wrapped receiver's."""

    def __init__(self, inner: Any, offload: Offload, runtime: DecodeRuntime) -> None:
        self._inner = inner
        self._offload = offload
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @property
    def conclude_state(self) -> int | None:
        """SGLang polls a request that waits for memory again only if this says that it failed."""
        return KVPoll.Failed if self._offload.state is OffloadState.FAILED else self._inner.conclude_state

    def poll(self) -> int:
        poll = self._inner.poll()
        if poll == KVPoll.Failed:
            return poll
        if poll == KVPoll.Bootstrapping and self._offload.split_open:
            return poll  # its turn has not come before SGLang could admit it
        self._runtime.advance(self._offload)
        if self._offload.state is OffloadState.FAILED:
            # Tell the prefill side and SGLang's own bookkeeping, as for an aborted request.
            self._inner.abort()
            return KVPoll.Failed
        if poll == KVPoll.WaitingForInput and self._offload.undecided:
            return KVPoll.Bootstrapping
        if poll == KVPoll.Success and self._offload.is_remote:
            if self._offload.state is not OffloadState.READY:
                self._runtime.await_ready(self._offload)
                return KVPoll.Transferring
            self._runtime.on_transferred(self._offload)
        return poll

    def failure_exception(self) -> None:
        if self._offload.failure:
            with contextlib.suppress(Exception):
                self._inner.failure_exception()  # drops SGLang's own record of it
            raise RuntimeError(self._offload.failure)
        self._inner.failure_exception()

    def clear(self) -> None:
        """Called when the transfer is over, well or badly. Without a KV row nothing else would end the offload."""
        self._inner.clear()
        if compat.row(self._offload.req) is None:
            self._runtime.end(self._offload)
