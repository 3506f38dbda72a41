"""SGLang's preallocation queue of the decode server, taught about prompts whose prefix is remote.

An offloaded request looks like a hit in the decode radix cache: its first P tokens "are there" already, on P dummy
slots (the padding page 0, which is never allocated and never freed) that hang off the tree's root. Admission,
allocation of the other L - P slots, the transferred range, positions and freeing are then SGLang's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.disaggregation.decode_hicache_mixin import DecodePrefixMatch

from sglang_adrenaline import compat
from sglang_adrenaline.decode.offload import Offload
from sglang_adrenaline.decode.receiver import GatedReceiver
from sglang_adrenaline.decode.runtime import DecodeRuntime

LOOK_AHEAD = 32
"""Hardly more requests are admitted in one scheduler loop."""


@dataclass(frozen=True)
class _Loop:
    """Figures that hold for one scheduler loop; upstream asks for them with every request that it admits."""

    number: int
    remote: int
    """Tokens of running requests that are not here."""
    largest: int
    """Tokens that one of them may come to here."""
    longest_next: int
    """Limit of the longest of the answers whose turn to be admitted it may be."""


IDLE = _Loop(0, 0, 0, 1)


def make_prealloc_queue(base: type, runtime: DecodeRuntime) -> type:
    """The class that takes the place of `base` (SGLang's DecodePreallocQueue) in the decode scheduler."""

    class OffloadPreallocQueue(base):
        _loop: _Loop | None = None

        def _create_receiver_and_enqueue(self, req: Any, is_rebootstrap: bool = False) -> Any:
            # A rebootstrapped request is recomputed by prefill and sent whole.
            decode_req = super()._create_receiver_and_enqueue(req, is_rebootstrap=is_rebootstrap)
            offload = None if is_rebootstrap else runtime.consider(req)
            if offload is not None:
                decode_req.kv_receiver = GatedReceiver(decode_req.kv_receiver, offload, runtime)
            return decode_req

        def _match_prefix_and_lock(self, req: Any) -> DecodePrefixMatch:
            offload = runtime.of(req)
            if offload is None:
                return super()._match_prefix_and_lock(req)
            indices = self._remote_prefix(req, offload)
            return DecodePrefixMatch(indices, 0, 0, last_device_node=req.last_node)

        def _remote_prefix(self, req: Any, offload: Offload) -> torch.Tensor:
            """Give `req` its dummy prefix: int64 [P] slots of the padding page."""
            page_size = self.token_to_kv_pool_allocator.page_size
            device = self.req_to_token_pool.req_to_token.device
            indices = torch.arange(offload.remote_prefix_len, dtype=torch.int64, device=device) % page_size
            req.skip_radix_cache_insert = True
            req.last_node = self.tree_cache.root_node_handle()
            req.prefix_indices = indices
            return indices

        def _pre_alloc(
            self,
            req: Any,
            prefix_indices: torch.Tensor | None = None,
            prefix_len: int | None = None,
            total_prefix_len: int | None = None,
        ) -> torch.Tensor:
            offload = runtime.of(req)
            if offload is not None and prefix_indices is None:  # a retracted request comes back
                prefix_indices = self._remote_prefix(req, offload)
                prefix_len = total_prefix_len = offload.remote_prefix_len
                req.cache_protected_len = offload.remote_prefix_len
            slots = super()._pre_alloc(req, prefix_indices, prefix_len, total_prefix_len)
            if req.last_node is None:
                # A local request comes back from a retraction with slots of its own for all its tokens. Upstream would
                # match it against the tree once more, take the matched part for the tree's and never free those slots.
                req.last_node = self.tree_cache.root_node_handle()
            runtime.on_row(req, own_tokens=compat.prompt_len(req) - (total_prefix_len or 0))
            return slots

        def _prealloc_required_tokens(self, req: Any) -> tuple[int, int]:
            full, swa = super()._prealloc_required_tokens(req)
            offload = runtime.of(req)
            return (full - offload.remote_prefix_len if offload is not None else full), swa

        def _active_reserved_tokens(self, n_active: int | None = None, extra_reserved_reqs: int = 0) -> int:
            if runtime.forecast is None or not runtime.forecast.num_rows:  # asked in every loop of an idle server, too
                return super()._active_reserved_tokens(n_active, extra_reserved_reqs)
            # Upstream adds its constant for the newcomer, whose part is in the forecast already.
            return runtime.forecast.growth(self._now().longest_next).tokens - self.num_reserved_decode_tokens

        def _need_space_for_single_req(self, retractable_tokens: int | None = None) -> int:
            # Upstream counts prompts whole: what an offloaded request may grow to here is its suffix.
            return self._now().largest - retractable_tokens if retractable_tokens is not None else 0

        def _allocatable_token_budgets(self, retractable_tokens: int | None = None, **kwargs: Any) -> int:
            # Retracting an offloaded request frees its suffix only.
            if retractable_tokens is not None:
                retractable_tokens = max(0, retractable_tokens - self._now().remote)
            return super()._allocatable_token_budgets(retractable_tokens=retractable_tokens, **kwargs)

        def _now(self) -> _Loop:
            if self._loop is None or self._loop.number != runtime.loops:
                running = compat.running_requests(self.scheduler)
                if not (running or self.queue or self.retracted_queue):
                    return IDLE
                remote = [o.remote_prefix_len if (o := runtime.of(req)) is not None else 0 for req in running]
                sizes = (compat.most_tokens(req) - part for req, part in zip(running, remote, strict=True))
                waiting = [*self.retracted_queue[:LOOK_AHEAD], *(entry.req for entry in self.queue[:LOOK_AHEAD])]
                longest = max(map(compat.answer_limit, waiting), default=1)
                self._loop = _Loop(runtime.loops, sum(remote), max(sizes, default=0), longest)
            return self._loop

    return OffloadPreallocQueue
