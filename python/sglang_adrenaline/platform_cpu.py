"""SGLang platform for machines without a GPU: the unmodified wheel on plain PyTorch CPU operators.

Entry point group `sglang.srt.platforms`; runs in every process of a server. It picks defaults and classes that
upstream already has, and puts our attention behind upstream's backend name `torch_native` (SGLang decides by that
name which operators it may use, so the name stays). It is inactive where an accelerator is there, or where the user
asked for SGLang's own CPU engine with `SGLANG_USE_CPU_ENGINE=1`. It patches nothing.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_adrenaline import cpu_info, slot_runs
from sglang_adrenaline.config import HOST_SERVERS_ENV
from sglang_adrenaline.errors import ConfigError

logger = logging.getLogger(__name__)

ATTENTION_ENV = "SGLANG_ADRENALINE_CPU_ATTENTION"
"""`adrenaline` (default) or `upstream`: which implementation answers to the backend name `torch_native`."""

_MIN_POOL_TOKENS = 1024
_MAX_POOL_TOKENS = 65_536
_MAX_RUNNING_REQUESTS = 256

# Early sending of a cached prefix records a torch.cuda.Event; there is no CPU stand-in for it.
# Before it dies of an error, a server waits a minute for dumps of GPUs that are not there.
_ENV_DEFAULTS = {
    "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
}


def activate() -> str | None:
    """Qualified name of the platform class, or None where another platform should serve. Never raises."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or not cpu_info.is_supported_cpu():
        return None
    try:
        if cpu_info.has_accelerator():
            return None
    except Exception:
        logger.debug("probing for accelerators failed; leaving the choice of a platform to SGLang", exc_info=True)
        return None
    return f"{AdrenalineCpuPlatform.__module__}:{AdrenalineCpuPlatform.__name__}"


def choose_dtype(requested: str, model_dtype: object, bf16_arithmetic: bool) -> str:
    """What `--dtype` becomes; only `auto` is touched.

    bfloat16 needs hardware for it and a checkpoint stored in it (`model_dtype`, a torch.dtype). Everything else
    runs in float32: float16 has no fast CPU operators, and upstream would halve float32 checkpoints.
    """
    if requested != "auto":
        return requested
    return "bfloat16" if bf16_arithmetic and model_dtype == torch.bfloat16 else "float32"


def default_pool_tokens(bytes_per_token: int, available_bytes: int, context_len: int, servers: int = 2) -> int:
    """Size of the KV pool in tokens where the user named none.

    All `servers` of the host together take two fifths of the memory that is free now; upstream's estimate would take
    nearly all of it for each. Never more than 65,536 tokens or four contexts, whichever is more, because
    the pool is zeroed (and so paid for) at start; never fewer than 1,024, where upstream's own limit decides.
    """
    affordable = available_bytes * 2 // (5 * max(2, servers)) // max(1, bytes_per_token)
    return max(_MIN_POOL_TOKENS, min(affordable, max(_MAX_POOL_TOKENS, 4 * context_len)))


class AdrenalineCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU as an out-of-tree device. The mixin stands first: SRTPlatform's stubs would shadow it otherwise."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int | None = 0) -> str:
        # The interface says str; the in-tree mixin returns torch.device, which ServerArgs cannot split.
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        """Upstream's token allocator, behind the constructor of its paged one (SGLang passes `page_size` to both), with
        neighbouring slots for prompts."""
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        class CpuTokenAllocator(TokenToKVPoolAllocator):
            free_pages: torch.Tensor

            def __init__(self, size: int, *, page_size: int, **kwargs: Any) -> None:
                if page_size != 1:
                    raise ConfigError(f"--page-size must be 1 on a CPU, not {page_size}: paged allocation needs Triton")
                super().__init__(size, **kwargs)

            def alloc(self, need_size: int) -> torch.Tensor | None:
                if not slot_runs.RUN_TOKENS <= need_size <= self.available_size():
                    return super().alloc(need_size)
                self.merge_and_sort_free()
                taken, rest = slot_runs.take(self.free_pages.numpy(), need_size)
                self.free_pages = torch.from_numpy(rest)
                return torch.from_numpy(taken)

            def merge_and_sort_free(self) -> None:
                if len(self.release_pages):
                    super().merge_and_sort_free()
                    ordered = slot_runs.shortest_first(self.free_pages.numpy())
                    self.free_pages = torch.from_numpy(ordered)

        return CpuTokenAllocator

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "inductor"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open. Runs once in the launching process, before SGLang resolves the rest.

        Raises ConfigError on options that cannot work on a CPU.
        """
        if server_args.device != "cpu":
            return
        if server_args.enable_torch_compile:
            raise ConfigError("--enable-torch-compile is not supported on a CPU: remove the flag")
        if server_args.page_size not in (None, 1):
            raise ConfigError(f"--page-size must be 1 on a CPU, not {server_args.page_size}")
        if server_args.attention_backend in (None, "intel_amx"):
            # intel_amx is what upstream fills in for any x86 CPU; its operators come with the in-tree CPU engine.
            server_args.attention_backend = self.get_default_attention_backend()
        server_args.sleep_on_idle = True
        for name, value in _ENV_DEFAULTS.items():
            os.environ.setdefault(name, value)
        if server_args.tp_size > 1:
            _prepare_tensor_parallel(server_args)
        threads = max(1, cpu_info.usable_cores() // max(1, server_args.tp_size))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        self._size_to_machine(server_args)

    def _size_to_machine(self, server_args: Any) -> None:
        model = server_args.get_model_config()
        dtype = choose_dtype(server_args.dtype, getattr(model.hf_config, "dtype", None), cpu_info.has_bf16_arithmetic())
        if dtype != server_args.dtype:
            server_args.dtype = dtype
            del server_args.model_config  # cached with the dtype that `auto` meant before
            model = server_args.get_model_config()
        if server_args.max_running_requests is None:
            server_args.max_running_requests = _MAX_RUNNING_REQUESTS
        if server_args.max_total_tokens is None:
            available, _ = self.get_available_memory()
            servers = int(os.environ.get(HOST_SERVERS_ENV, "2"))
            server_args.max_total_tokens = default_pool_tokens(_kv_bytes(model), available, model.context_len, servers)

    def init_backend(self) -> None:
        """Called while SGLang's model runner is imported, in each process that does so."""
        if not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(min(torch.get_num_threads(), cpu_info.usable_cores()))
        if cpu_info.is_arm64():
            _define_arm_thread_ops()
        _register_grammar()
        choice = os.environ.get(ATTENTION_ENV, "adrenaline")
        if choice not in ("adrenaline", "upstream"):
            raise ConfigError(f"{ATTENTION_ENV} must be adrenaline or upstream, not {choice!r}")
        if choice == "adrenaline":
            _register_attention()


def _prepare_tensor_parallel(server_args: Any) -> None:
    """Let collectives go through gloo, and ranks share a NUMA node. Raises ConfigError where upstream has no way."""
    if cpu_info.is_arm64():
        raise ConfigError(
            "--tp-size > 1 is not supported on arm64 CPUs: SGLang's all-reduce for them is not in its wheel"
        )
    server_args.disable_custom_all_reduce = True
    # With CUDA's libraries installed upstream would find NCCL and ask it for a GPU.
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "none-on-a-cpu")
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank :: server_args.tp_size] or cores for rank in range(server_args.tp_size)]
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, share)) for share in shares))


def _kv_bytes(model: Any) -> int:
    """Bytes of KV that one token takes over all layers (an upper bound under tensor parallelism)."""
    heads = model.get_num_kv_heads(1)
    return int(2 * model.num_hidden_layers * heads * model.head_dim * model.dtype.itemsize)


def _register_attention() -> None:
    from sglang.srt.layers.attention import attention_registry

    # Whoever registered before us (the decode plugin builds on our backend) knows better.
    current = attention_registry.ATTENTION_BACKENDS["torch_native"]
    if current.__module__ == attention_registry.__name__:
        attention_registry.register_attention_backend("torch_native")(_create_attention)


def _register_grammar() -> None:
    from sglang_adrenaline.grammar_cpu import register_cpu_grammar

    register_cpu_grammar()


def _create_attention(runner: Any) -> Any:
    from sglang_adrenaline.attention.cpu_backend import CpuAttnBackend

    return CpuAttnBackend(runner)


def _define_arm_thread_ops() -> None:
    """On Arm, SGLang binds threads and sets up its all-reduce through compiled operators that its wheel lacks.

    Thread counts are OMP_NUM_THREADS' business here and collectives go through gloo, so both do nothing.
    """
    for name, signature in (
        ("init_cpu_threads_env", "(str? cpu_ids) -> ()"),
        ("initialize", "(int size, int rank) -> ()"),
    ):
        if hasattr(torch.ops.sgl_kernel, name):
            continue
        torch.library.define(f"sgl_kernel::{name}", signature)
        torch.library.impl(f"sgl_kernel::{name}", "CompositeExplicitAutograd")(lambda *args: None)
