"""The only reader of SGLang's private fields: accessors for what we need of its scheduler, requests and radix tree.

A new SGLang version should be a matter of this module and of the table in `hooks.py`. Nothing here keeps state.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import torch

from sglang_adrenaline import cpu_info
from sglang_adrenaline.ranks import Ranks

Scheduler = Any
Req = Any


# ---- requests -----------------------------------------------------------------------------------------------------


def room(req: Req) -> int | None:
    return req.bootstrap_room


def rid(req: Req) -> str:
    """Name of the request; the tokenizer manager refuses a second one of the same name."""
    return req.rid


def row(req: Req) -> int | None:
    """Row of the request in req_to_token, or None while it has none."""
    return req.req_pool_idx


def prompt_len(req: Req) -> int:
    return len(req.origin_input_ids)


def new_prompt_tokens(req: Req) -> int:
    """Prefill: prompt tokens that were computed, not found in the cache."""
    return max(prompt_len(req) - int(req.cached_tokens), 1)


def cached_prompt_tokens(req: Req) -> int:
    """Prefill: the others."""
    return prompt_len(req) - new_prompt_tokens(req)


def prompt_ids(req: Req) -> Sequence[int]:
    return req.origin_input_ids


def prompt_digest(req: Req) -> str:
    """Names the prompt's tokens: two requests of one bootstrap room need not be one request."""
    return hashlib.blake2b(array("q", req.origin_input_ids), digest_size=16).hexdigest()


def most_tokens(req: Req) -> int:
    """Prompt and answer at their longest, as SGLang's admission reckons."""
    return prompt_len(req) + min(req.sampling_params.max_new_tokens, _usual_limit())


def answer_limit(req: Req) -> int:
    """Tokens that the answer may come to, >= 1; of a request that allows more than is usual, what it may double to."""
    return max(min(req.sampling_params.max_new_tokens, max(_usual_limit(), 2 * len(req.output_ids))), 1)


@functools.cache
def _usual_limit() -> int:
    from sglang.srt.disaggregation.decode import CLIP_MAX_NEW_TOKEN

    return int(CLIP_MAX_NEW_TOKEN)


def output_len(req: Req) -> int:
    return len(req.output_ids)


def is_finished(req: Req) -> bool:
    """Whether the request has ended, well or badly; false for one that is retracted."""
    return bool(req.finished())


def custom_params(req: Req) -> dict[str, Any] | None:
    return req.sampling_params.custom_params


def is_warmup(req: Req) -> bool:
    """Health checks and SGLang's own warm-up go to a bootstrap host that does not exist."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    return req.bootstrap_host is None or req.bootstrap_host == FAKE_BOOTSTRAP_HOST


def bootstrap_address(req: Req) -> tuple[str, int]:
    return req.bootstrap_host.strip("[]"), int(req.bootstrap_port)


def finish_with_error(req: Req, message: str) -> None:
    """Let a request that has a KV row end with an error at the next result processing.

    Tokens that are appended after this call are not shown to the client.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    if req.finished():
        return
    req.finished_len = len(req.output_ids)
    req.to_finish = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


def abort_retracted(scheduler: Scheduler, req: Req, message: str) -> None:
    """End a retracted request, which has neither a row nor a place in a batch, with an error to its client."""
    from sglang.srt.disaggregation.utils import prepare_abort

    queue = scheduler.disagg_decode_prealloc_queue
    queue.retracted_queue = [r for r in queue.retracted_queue if r is not req]
    if hasattr(req, "kv_cache_cpu"):
        del req.kv_cache_cpu
    prepare_abort(req, message, status_code=HTTPStatus.INTERNAL_SERVER_ERROR)
    scheduler.output_streamer.stream_output([req], req.return_logprob)


def is_retracted_and_waiting(scheduler: Scheduler, req: Req) -> bool:
    queue = scheduler.disagg_decode_prealloc_queue
    return any(r is req for r in queue.retracted_queue) or any(r is req for r in queue.held_rebootstrap_reqs)


# ---- radix tree of the prefill side -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeLock:
    """What `unlock_prefix` needs to undo `lock_prefix`."""

    node: Any
    params: Any


def lock_prefix(scheduler: Scheduler, req: Req, length: int) -> tuple[torch.Tensor, TreeLock] | None:
    """Lock the first `length` prompt tokens of `req` in the radix tree.

    Returns their KV slots (int64 [length]) and the lock, or None if the tree does not hold all of them.
    """
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    tree = scheduler.tree_cache
    match = tree.match_prefix(MatchPrefixParams(key=RadixKey(req.origin_input_ids[:length], req.extra_key)))
    if len(match.device_indices) != length:
        return None
    lock = tree.inc_lock_ref(match.last_device_node)
    return match.device_indices, TreeLock(match.last_device_node, lock.to_dec_params())


def locked_prefix_len(scheduler: Scheduler, req: Req) -> int:
    """Leading prompt tokens in this server's radix tree that other requests keep from being evicted.

    Changes nothing in the tree, whose order of eviction has to be that of the other ranks' trees.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    tree, length = scheduler.tree_cache, 0
    page_size, node = tree.page_size, tree.root_node
    key = RadixKey(req.origin_input_ids, req.extra_key).page_aligned(page_size)
    while len(key):
        child = node.children.get(key.child_key(page_size))
        if child is None or child.lock_ref == 0:
            break
        matched = child.key.match(key, page_size=page_size)
        length += matched
        if matched < len(child.key):
            break
        node, key = child, key[matched:]
    return length


def unlock_prefix(scheduler: Scheduler, lock: TreeLock) -> None:
    scheduler.tree_cache.dec_lock_ref(lock.node, lock.params)


# ---- pools and model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolShape:
    """tokens: size of the KV pool; num_slots: rows of its tensors; rows: rows of req_to_token."""

    tokens: int
    num_slots: int
    page_size: int
    rows: int


def pool_shape(scheduler: Scheduler) -> PoolShape:
    allocator = scheduler.token_to_kv_pool_allocator
    return PoolShape(
        tokens=allocator.size,
        num_slots=kv_buffers(scheduler)[0][0].shape[0],
        page_size=allocator.page_size,
        rows=scheduler.req_to_token_pool.req_to_token.shape[0],
    )


def pool_free_tokens(scheduler: Scheduler) -> int:
    """Tokens a new request could get: free slots plus what the radix tree may evict."""
    return scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()


def pool_locked_tokens(scheduler: Scheduler) -> int:
    """Tokens of the radix tree that may not be evicted."""
    return scheduler.tree_cache.protected_size()


def kv_buffers(scheduler: Scheduler) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(k, v) [num_slots, num_kv_heads, head_dim] of each layer, in place."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    return list(zip(pool.k_buffer, pool.v_buffer, strict=True))


@dataclass(frozen=True)
class AttentionLayer:
    """What one attention layer computes with, per rank."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    sm_scale: float
    logit_cap: float


def attention_layers(model_runner: Any) -> list[AttentionLayer]:
    """The model's attention layers in order of layer id."""
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [m for m in model_runner.model.modules() if isinstance(m, RadixAttention)]
    layers.sort(key=lambda m: m.layer_id)
    return [
        AttentionLayer(
            num_qo_heads=m.tp_q_head_num,
            num_kv_heads=m.tp_k_head_num,
            head_dim=m.qk_head_dim,
            v_head_dim=m.v_head_dim,
            sm_scale=float(m.scaling),
            logit_cap=float(m.logit_cap or 0.0),
        )
        for m in layers
    ]


def write_kv_slots(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    lens: torch.Tensor,
    indptr: torch.Tensor,
    starts: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Slots of positions starts[i] to starts[i] + lens[i] of each of these rows, from out[indptr[i]] on.

    All on one GPU, integers; indptr, out int32; starts None = 0 for all. In the order of the current stream.
    """
    from sglang.kernels.ops.attention.utils import create_flashinfer_kv_indices_triton

    create_flashinfer_kv_indices_triton[(len(rows),)](
        req_to_token, rows, lens, indptr, starts, out, req_to_token.shape[1]
    )


def model_runner(scheduler: Scheduler) -> Any:
    return scheduler.tp_worker.model_runner


def overlaps(scheduler: Scheduler) -> bool:
    """Whether the event loop launches a batch before it looks at the results of the one before."""
    return bool(scheduler.enable_overlap)


def forward_stream(scheduler: Scheduler) -> torch.cuda.Stream:
    return scheduler.forward_stream


def use_forward_stream(scheduler: Scheduler, stream: torch.cuda.Stream) -> None:
    """The forward passes of the overlapping event loops run on this stream from here on, behind those so far."""
    if scheduler.forward_stream is not stream:
        stream.wait_stream(scheduler.forward_stream)
        scheduler.forward_stream = stream
        scheduler.forward_stream_ctx = scheduler.device_module.stream(stream)


def model_dtype(scheduler: Scheduler) -> str:
    return str(model_runner(scheduler).dtype).removeprefix("torch.")


def model_fingerprint(scheduler: Scheduler) -> str:
    """Hash over a sample of every weight, so that two servers with different weights never pair up."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model_runner(scheduler).model.named_parameters():
        sample = parameter.detach().reshape(-1)[:32].to(torch.float32).cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


# ---- forward passes ------------------------------------------------------------------------------------------------


def batch_rows(forward_batch: Any, rows: slice) -> Any:
    """A ForwardBatch of decode with these of its rows; its tensors are views: graphs read the same memory."""
    size = forward_batch.batch_size
    part = copy.copy(forward_batch)
    for name, value in vars(forward_batch).items():
        if isinstance(value, torch.Tensor) and value.dim():
            if value.shape[0] == size:
                setattr(part, name, value[rows])
            elif value.dim() == 2 and value.shape[1] == size:  # positions in several dimensions
                setattr(part, name, value[:, rows])
        elif isinstance(value, list) and len(value) == size:
            setattr(part, name, value[rows])
    part.batch_size = len(range(*rows.indices(size)))
    return part


def joined_outputs(first: Any, second: Any) -> Any:
    """LogitsProcessorOutput of a batch from those of its rows."""

    def joined(name: str) -> torch.Tensor | None:
        parts = getattr(first, name), getattr(second, name)
        return None if parts[0] is None else torch.cat(parts)

    return dataclasses.replace(
        first, next_token_logits=joined("next_token_logits"), hidden_states=joined("hidden_states")
    )


def is_dense(model_config: Any) -> bool:
    """Whether a pass over some rows computes for them what a pass over more rows does: no mixture of experts."""
    config = text_config(model_config)
    return not any(config.get(name) for name in ("num_local_experts", "n_routed_experts", "num_experts"))


# ---- scheduler ----------------------------------------------------------------------------------------------------


def ranks(scheduler: Scheduler) -> Ranks:
    """The group is the one in which SGLang compares the polls of its receivers."""
    return Ranks(scheduler.ps.tp_rank, scheduler.ps.tp_size, scheduler.attn_tp_cpu_group)


def rids(batch: Any) -> list[str]:
    """Names of a ScheduleBatch's requests, in its order."""
    return [req.rid for req in batch.reqs]


def running_requests(scheduler: Scheduler) -> Sequence[Req]:
    return scheduler.running_batch.reqs


def num_admitted(scheduler: Scheduler) -> int:
    """Requests with a row: running, about to, or with their KV on the way."""
    return int(scheduler.disagg_decode_prealloc_queue._active_req_count())


def unclaimed_tokens(scheduler: Scheduler) -> int:
    """Tokens of decode's pool that nobody holds or waits for with a claim; may be negative.

    What the tree can evict counts, what retracted requests need does not.
    """
    return int(scheduler.disagg_decode_prealloc_queue._allocatable_token_budgets(reserved_tokens=0))


def reserved_decode_tokens(scheduler: Scheduler) -> int:
    """What admission asks for beside a request's prompt."""
    return int(scheduler.disagg_decode_prealloc_queue.num_reserved_decode_tokens)


def requests_in_transfer(scheduler: Scheduler) -> list[Req]:
    """Decode: requests with a row whose prompts are being computed, are yet to be, or whose KV is on the way."""
    return [each.req for each in scheduler.disagg_decode_transfer_queue.queue]


def no_request_waits_for_a_row(scheduler: Scheduler) -> bool:
    """Of new requests; retracted ones are not meant."""
    return not scheduler.disagg_decode_prealloc_queue.queue


def known_prefill(scheduler: Scheduler, address: tuple[str, int]) -> Any:
    """What decode has cached about the prefill server at a bootstrap address, None if nothing. Any thread."""
    return _kv_manager(scheduler).prefill_info_table.get(_host_port(address))


def forget_prefill(scheduler: Scheduler, address: tuple[str, int]) -> None:
    """What SGLang does when its own heartbeats miss a prefill server: drop what is cached, fail what waits for it.

    From any thread: upstream calls it from a thread of its own.
    """
    _kv_manager(scheduler)._handle_node_failure(_host_port(address))


def _kv_manager(scheduler: Scheduler) -> Any:
    return scheduler.disagg_decode_prealloc_queue.kv_manager


def _host_port(address: tuple[str, int]) -> str:
    """As SGLang writes bootstrap addresses."""
    from sglang.srt.utils.network import NetworkAddress

    return NetworkAddress(*address).to_host_port_str()


def ran_decode_step(scheduler: Scheduler) -> bool:
    """Whether the scheduler's loop before this one ran a decode step. Before a loop's batch is chosen."""
    return scheduler.last_batch is not None and scheduler.last_batch.forward_mode.is_decode()


def runs_prompts(scheduler: Scheduler) -> bool:
    """Prefill: whether this loop launched a batch or completed one. After a loop's batch was launched."""
    return bool(scheduler.cur_batch_for_debug or scheduler.last_batch)


def waiting_prompts(scheduler: Scheduler) -> Sequence[Req]:
    """Prefill: requests that decode has admitted and whose prompts are not begun."""
    return scheduler.waiting_queue


def begun_prompts(scheduler: Scheduler) -> Sequence[Req]:
    """Prefill: requests whose prompts are being computed. After a loop's batch was launched."""
    batch = scheduler.cur_batch_for_debug if overlaps(scheduler) else None  # else its results have been looked at
    begun = {req.rid: req for req in (batch.reqs if batch else ())}
    if scheduler.chunked_req is not None:
        begun[scheduler.chunked_req.rid] = scheduler.chunked_req
    return list(begun.values())


def has_nothing_to_run(scheduler: Scheduler) -> bool:
    """Whether there is no request that the scheduler could compute something for now."""
    return (
        scheduler.running_batch.is_empty()
        and not scheduler.waiting_queue
        and scheduler.chunked_req is None
        and scheduler.last_batch is None
    )


def waits_for_peer(scheduler: Scheduler) -> bool:
    """Whether the scheduler has requests, but nothing to run."""
    return has_nothing_to_run(scheduler) and not scheduler.is_fully_idle()


def device(scheduler: Scheduler) -> torch.device:
    """Where the rank computes; with an index on a GPU."""
    return torch.device("cuda", scheduler.ps.gpu_id) if scheduler.server_args.device == "cuda" else torch.device("cpu")


def is_cpu(scheduler: Scheduler) -> bool:
    return scheduler.server_args.device == "cpu"


def model_config(scheduler: Scheduler) -> Any:
    """SGLang's ModelConfig."""
    return model_runner(scheduler).model_config


def text_config(model_config: Any) -> dict[str, Any]:
    """The model's own `config.json`, that of the language model where there are several."""
    return dict(model_config.hf_text_config.to_dict())


def bytes_each(model_config: Any) -> int:
    """Of a weight, and of a number in the KV cache (quantised ones are not served)."""
    return int(model_config.dtype.itemsize)


def device_name(scheduler: Scheduler) -> str:
    """As `python -m sglang_adrenaline.profile` names it."""
    where = device(scheduler)
    if where.type == "cuda":
        return torch.cuda.get_device_properties(where).name
    return cpu_info.device_name()


def publishes_metrics(scheduler: Scheduler) -> bool:
    """One rank of a server does."""
    return bool(scheduler.server_args.enable_metrics) and ranks(scheduler).is_first


def bootstrap_port(scheduler: Scheduler) -> int:
    return int(scheduler.server_args.disaggregation_bootstrap_port)
