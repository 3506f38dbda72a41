"""Hook handlers of the prefill scheduler: unpack SGLang's arguments and call the runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_adrenaline.prefill.runtime import PrefillRuntime

logger = logging.getLogger(__name__)


class PrefillHandlers:
    """`scheduler` below is SGLang's Scheduler, the `self` of the hooked methods."""

    def __init__(self, runtime: PrefillRuntime) -> None:
        self.runtime = runtime

    def place_batch(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        if self.runtime.gpu is not None:
            self.runtime.gpu.place_batch(self.runtime.executor_share if self.runtime.keeps_prefixes else 0.0)

    def await_stream(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        if self.runtime.gpu is not None and self.runtime.serves_decode:
            self.runtime.gpu.await_stream()

    def send_kv_chunk(self, scheduler: Any, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
        if last_chunk:
            self.runtime.before_last_chunk(req)

    def pump(self, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        self.runtime.pump()

    def flush_cache(self, original: Callable[..., bool], scheduler: Any, *args: Any, **kwargs: Any) -> bool:
        held = self.runtime.holds_pins()
        if held:
            logger.warning("cache not flushed: %s", held)
            return False
        return original(scheduler, *args, **kwargs)

    def refuse_update(self, output: Callable[..., Any]) -> Callable[..., Any]:
        """A handler for an update method that answers with `output(success=, message=)`."""

        def update_weights(original: Callable[..., Any], updater: Any, recv_req: Any) -> Any:
            held = self.runtime.holds_pins()
            if held:
                return output(success=False, message=f"weights not updated: {held}; let them finish first")
            return original(updater, recv_req)

        return update_weights

    def release_memory(self, updater: Any, recv_req: Any) -> None:
        self.runtime.revoke_pins("the prefill server released its memory")
