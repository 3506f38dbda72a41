"""Hook handlers of the decode scheduler: unpack SGLang's arguments and call the runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang_adrenaline import compat
from sglang_adrenaline.decode.runtime import DecodeRuntime


@dataclass(frozen=True)
class _SuffixRows:
    """req_to_token as SGLang's retraction indexes it, [row, :n], but without the remote prefix of the row."""

    req_to_token: _SuffixRows | torch.Tensor
    start: int = 0

    def __getitem__(self, key: tuple[int, slice]) -> torch.Tensor:
        row, columns = key
        assert columns.start is None and columns.step is None and isinstance(self.req_to_token, torch.Tensor), key
        return self.req_to_token[row, self.start : columns.stop]


class DecodeHandlers:
    def __init__(self, runtime: DecodeRuntime) -> None:
        self.runtime = runtime

    def pump(self, scheduler: Any) -> None:
        self.runtime.pump()

    def graph_runner(self, result: type, model_runner: Any) -> type:
        """On a GPU decode steps with and without round trips are different graphs."""
        from sglang_adrenaline.decode.graphs import make_graph_runner

        return make_graph_runner(result)

    def check_step(self, scheduler: Any, batch: Any, result: Any) -> None:
        """The batch's tokens are about to count. On a GPU only its completion tells whether its round trips worked."""
        if batch.forward_mode.is_decode() and self.runtime.table.any_remote(compat.rids(batch)):
            if result.copy_done is not None:
                result.copy_done.synchronize()  # upstream waits for it next in any case
            self.runtime.after_step()

    def commit_transfer(self, result: Any, queue: Any, decode_req: Any) -> None:
        """The dummy prefix is no cache hit: keep it out of the request's cached_tokens."""
        req = decode_req.req
        offload = self.runtime.of(req)
        if offload is not None:
            req.already_computed = max(req.already_computed, offload.remote_prefix_len)

    def release_kv_cache(self, original: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
        """Every finish, abort, failure and retraction passes here."""
        self.runtime.before_release(req)
        original(req, *args, **kwargs)

    def release_req(self, original: Callable[..., None], *, req: Any, offload_kv: bool = True, **kwargs: Any) -> None:
        """A retraction. With offload_kv the request comes back with its suffix; without, it is computed anew."""
        if offload_kv:
            self.runtime.retracting(req)
        original(req=req, offload_kv=offload_kv, **kwargs)

    def copy_suffix(self, original: Callable[..., None], req: Any, req_to_token_pool: Any, allocator: Any) -> None:
        """Retraction saves and restores the KV of [0, n); of an offloaded request only [P, n) is here."""
        offload = self.runtime.of(req)
        if offload is not None:
            table = _SuffixRows(req_to_token_pool.req_to_token, start=offload.remote_prefix_len)
            req_to_token_pool = _SuffixRows(table)
        original(req, req_to_token_pool, allocator)
