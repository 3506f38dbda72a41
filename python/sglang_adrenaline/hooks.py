"""Every place where SGLang is touched, in one table; applied through SGLang's own hook registry and then verified.

A row says what is touched (below `sglang.srt`), how, where it applies, which handler runs and why. Handlers live in
the domain modules. SGLang only logs hooks that it cannot apply, so `verify` looks at each target itself and raises.

Beside the table, public registries are used: entry points (`sglang.srt.plugins`, `sglang.srt.platforms`), the attention
backend registry and the list of transfer backends (see `plugin.py`, `platform_cpu.py`, `transfer/local.py`).
"""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sglang_adrenaline.errors import HookError

logger = logging.getLogger(__name__)

Where = Literal["frontend", "transfer", "scheduler", "prefill", "decode"]
"""frontend: process of the HTTP server, both roles. transfer: all processes of a server that uses the backend `local`.
scheduler: scheduler process, both roles. prefill, decode: scheduler process of that role."""
Kind = Literal["before", "after", "around", "replace"]

MIXIN = "disaggregation.prefill.SchedulerDisaggregationPrefillMixin"
SCHEDULER = "managers.scheduler.Scheduler"
WEIGHTS = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
REQ = "managers.schedule_batch.Req"


@dataclass(frozen=True)
class Hook:
    """One touch point. `needs`: parameters of the target that the handler relies on."""

    where: Where
    target: str
    kind: Kind
    handler: str
    needs: tuple[str, ...]
    why: str


HOOKS = (
    Hook(
        "frontend",
        "managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "after",
        "check_request",
        ("obj", "input_ids"),
        "a malformed custom_params.adrenaline is a 400, before it reaches a scheduler",
    ),
    Hook(
        "frontend",
        "managers.tokenizer_manager.TokenizerManager._send_one_request",
        "before",
        "split_rooms",
        ("tokenized_obj",),
        "n > 1: the samples of one request would share a bootstrap room, on which schedulers fail",
    ),
    Hook(
        "frontend",
        "managers.tokenizer_manager.TokenizerManager.release_memory_occupation",
        "around",
        "release_memory",
        ("obj", "request"),
        "releasing the KV pool would break requests of decode that read it: refused while prefixes are pinned",
    ),
    Hook(
        "transfer",
        "disaggregation.utils.get_kv_class",
        "around",
        "get_kv_class",
        ("transfer_backend", "class_type"),
        "the transfer backend `local`: SGLang has no registry for their classes",
    ),
    Hook(
        "scheduler",
        f"{SCHEDULER}.init_disaggregation",
        "after",
        "attach",
        (),
        "the runtime meets the scheduler once pools and queues exist; hooks are verified here",
    ),
    Hook(
        "scheduler",
        f"{SCHEDULER}.get_internal_state",
        "after",
        "add_status",
        ("recv_req",),
        "GET /adrenaline/status is answered with the scheduler's state",
    ),
    Hook(
        "prefill",
        f"{MIXIN}.send_kv_chunk",
        "before",
        "send_kv_chunk",
        ("req", "last_chunk", "end_idx"),
        "the prefix is pinned before the last chunk lets decode see the transfer succeed",
    ),
    Hook(
        "prefill",
        f"{MIXIN}.process_disagg_prefill_inflight_queue",
        "before",
        "pump",
        (),
        "runs once a loop: ended requests are unpinned by the thread that owns the radix tree",
    ),
    Hook(
        "prefill",
        f"{SCHEDULER}.run_batch",
        "before",
        "place_batch",
        ("batch",),
        "while the executor works, prefill's kernels run on a stream that leaves it some SMs",
    ),
    Hook(
        "prefill",
        f"{MIXIN}.process_batch_result_disagg_prefill",
        "before",
        "await_stream",
        ("batch", "result"),
        "it copies to the host, behind the batch that runs; blocking in that would hold up the executor's launches",
    ),
    Hook("prefill", f"{SCHEDULER}.flush_cache", "around", "flush_cache", (), "a flush would free pinned slots"),
    *(
        Hook(
            "prefill",
            f"{WEIGHTS}.{method}",
            "around",
            method,
            ("recv_req",),
            "pinned KV belongs to the old weights: refused while there is any",
        )
        for method in (
            "update_weights_from_disk",
            "update_weights_from_distributed",
            "update_weights_from_tensor",
            "update_weights_from_ipc",
        )
    ),
    Hook(
        "prefill",
        f"{WEIGHTS}.release_memory_occupation",
        "before",
        "release_memory",
        ("recv_req",),
        "backstop of the front end's refusal: the executors stop before the pool goes",
    ),
    Hook(
        "decode",
        "disaggregation.decode.DecodePreallocQueue",
        "replace",
        "prealloc_queue",
        (),
        "an offloaded request is admitted with a prefix of dummy slots",
    ),
    Hook(
        "decode",
        "disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req",
        "after",
        "commit_transfer",
        ("decode_req",),
        "the dummy prefix must not be reported as cached tokens",
    ),
    Hook(
        "decode",
        "disaggregation.decode.SchedulerDisaggregationDecodeMixin.process_decode_queue",
        "before",
        "pump",
        (),
        "runs once a loop: requests whose prefix was lost end with an error",
    ),
    Hook(
        "decode",
        "model_executor.model_runner.ModelRunner._decode_cuda_graph_runner_cls",
        "after",
        "graph_runner",
        (),
        "decode steps with and without round trips are different CUDA graphs",
    ),
    Hook(
        "decode",
        f"{SCHEDULER}.process_batch_result",
        "before",
        "check_step",
        ("batch", "result"),
        "a step whose round trips failed on the GPU ends its offloaded requests before its tokens count",
    ),
    Hook(
        "decode",
        "mem_cache.common.release_kv_cache",
        "around",
        "release_kv_cache",
        ("req",),
        "the one place that every finish, abort and failure passes: END is sent",
    ),
    Hook(
        "decode",
        "managers.schedule_batch.release_req",
        "around",
        "release_req",
        ("req", "offload_kv"),
        "tells a retraction from an end",
    ),
    *(
        Hook(
            "decode",
            f"{REQ}.{method}",
            "around",
            "copy_suffix",
            ("req_to_token_pool", "token_to_kv_pool_allocator"),
            "retraction copies the KV that is here: [P, n), not [0, n)",
        )
        for method in ("offload_kv_cache", "load_kv_cache")
    ),
)


def hooks_for(*places: Where) -> list[Hook]:
    return [hook for hook in HOOKS if hook.where in places]


def probe(hooks: Iterable[Hook]) -> None:
    """Check that each target exists and has the parameters we use; imports their modules. Raises HookError."""
    for hook in hooks:
        try:
            target = pkgutil.resolve_name(_full(hook))
        except (ImportError, AttributeError) as error:
            raise HookError(f"this SGLang has no {_full(hook)} ({error})") from None
        if hook.kind != "replace":
            missing = set(hook.needs) - set(inspect.signature(target).parameters)
            if missing:
                raise HookError(f"{_full(hook)} has no parameter {', '.join(sorted(missing))} in this SGLang")


def register(hooks: Iterable[Hook], handlers: object) -> None:
    """Hand the rows to SGLang's registry, with the attributes of `handlers` that they name."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(_full(hook), getattr(handlers, hook.handler), HookType(hook.kind))


def verify(hooks: Iterable[Hook]) -> None:
    """Raise HookError listing the targets on which no handler of ours is in place."""
    hooks = list(hooks)
    missing = [_full(hook) for hook in hooks if not _is_applied(hook)]
    if missing:
        raise HookError(f"hooks were not applied, refusing to start: {', '.join(missing)}")
    for hook in hooks:
        logger.info("hook %s %s: %s", hook.kind, hook.target, hook.why)


def _is_applied(hook: Hook) -> bool:
    current: Any = pkgutil.resolve_name(_full(hook))
    if hook.kind == "replace":
        return _is_ours(current)
    while current is not None:  # down the chain of wrappers, each of which closes over its handler
        if any(_is_ours(cell.cell_contents) for cell in getattr(current, "__closure__", None) or ()):
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def _is_ours(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("sglang_adrenaline")


def _full(hook: Hook) -> str:
    return f"sglang.srt.{hook.target}"


def as_markdown() -> str:
    """The table as `docs/touch-points.md`."""
    rows = "\n".join(f"| {h.where} | `{h.target}` | {h.kind} | {h.why} |" for h in HOOKS)
    return f"""# Where SGLang is touched

Written by `python -m sglang_adrenaline.hooks`, from the table there; a test keeps both equal. Targets are below
`sglang.srt`, of SGLang 0.5.17. Hooks go through SGLang's own registry; every process verifies that its hooks applied
and ends with one line if not. Places: *frontend* is the HTTP process of both roles, *transfer* every process of a
server with the backend `local`, *scheduler* the scheduler of both roles, *prefill* and *decode* that of one role.

| where | target | how | why |
|---|---|---|---|
{rows}

Public registries, no hooks: entry points `sglang.srt.plugins` and `sglang.srt.platforms`; the registry of attention
backends (names `torch_native` on CPUs, `flashinfer` on GPUs), that of grammar backends (`xgrammar` on CPUs), the
choices of transfer backends.
"""


if __name__ == "__main__":
    print(as_markdown(), end="")
