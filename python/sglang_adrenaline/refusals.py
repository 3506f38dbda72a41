"""What this version does not serve: one table of conditions, checked before any weight is loaded.

Runs in the main process of a prefill or decode server, after SGLang resolved its arguments. Imports SGLang only inside
functions, so that the launcher can check the version without paying for that import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_adrenaline.config import AdrenalineConfig
from sglang_adrenaline.errors import ConfigError

SUPPORTED_SGLANG = ("0.5.17",)

CPU_BACKENDS = ("torch_native",)
DECODE_GPU_BACKENDS = ("flashinfer",)
"""Those that have a suffix-only subclass of ours."""
PREFILL_GPU_BACKENDS = ("flashinfer", "fa3", "triton")
"""Those whose KV pool the executor can read; it brings its own attention."""

Rule = tuple[Callable[[Any], bool], str]


def check_sglang_version() -> None:
    """Raise ConfigError if the installed SGLang is not one whose internals we know."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        raise ConfigError(f"SGLang is not installed; install sglang=={SUPPORTED_SGLANG[-1]}") from None
    if installed not in SUPPORTED_SGLANG:
        raise ConfigError(f"SGLang {installed} is not supported; install sglang=={SUPPORTED_SGLANG[-1]}")


SERVER_RULES: tuple[Rule, ...] = (
    (lambda a: a.pp_size > 1, "pipeline parallelism (--pp-size > 1)"),
    (lambda a: a.enable_dp_attention, "DP attention (--enable-dp-attention)"),
    (lambda a: a.dp_size > 1, "data parallelism inside one server (--dp-size > 1)"),
    (lambda a: a.dcp_size > 1 or a.attn_cp_size > 1, "context parallelism"),
    (lambda a: a.nnodes > 1, "one server on several nodes (--nnodes > 1)"),
    (lambda a: a.speculative_algorithm is not None, "speculative decoding (--speculative-algorithm)"),
    (lambda a: a.enable_hierarchical_cache, "HiCache (--enable-hierarchical-cache)"),
    (lambda a: a.enable_lmcache, "LMCache (--enable-lmcache)"),
    (lambda a: a.enable_hisparse, "hierarchical sparse attention (--enable-hisparse)"),
    (lambda a: a.enable_pdmux, "PD multiplexing (--enable-pdmux)"),
    (lambda a: a.enable_two_batch_overlap, "two-batch overlap (--enable-two-batch-overlap)"),
    (lambda a: a.dllm_algorithm is not None, "diffusion language models (--dllm-algorithm)"),
    (lambda a: a.is_embedding, "embedding models (--is-embedding)"),
    (lambda a: a.radix_cache_backend is not None, "another radix cache (--radix-cache-backend)"),
    (lambda a: a.disaggregation_decode_enable_offload_kvcache, "--disaggregation-decode-enable-offload-kvcache"),
    (lambda a: a.enable_session_radix_cache, "sessions that own KV (--enable-session-radix-cache)"),
    (lambda a: a.enable_streaming_session, "sessions that own KV (--enable-streaming-session)"),
    (lambda a: a.page_size not in (None, 1), "KV pages of more than one token (--page-size > 1)"),
    (lambda a: a.tokenizer_worker_num > 1, "several tokenizer processes (--tokenizer-worker-num > 1)"),
    (lambda a: a.smg_grpc_mode or a.grpc_mode or a.use_ray or a.encoder_only, "gRPC, Ray and encoder-only servers"),
)
"""(condition on SGLang's resolved ServerArgs, what is not supported)"""


def _is_mla(model: Any) -> bool:
    from sglang.srt.configs.model_config import AttentionArch, is_deepseek_dsa

    return model.attention_arch == AttentionArch.MLA or is_deepseek_dsa(model.hf_config)


def _has_state_layers(model: Any) -> bool:
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import is_nemotron_h

    return (
        mambaish_config(model) is not None
        or model.linear_attn_registry_result is not None
        or is_nemotron_h(model.hf_config)
    )


def _has_window(model: Any) -> bool:
    return (
        model.is_hybrid_swa
        or model.sliding_window_size is not None
        or model.attention_chunk_size is not None
        or model.is_local_attention_model
    )


MODEL_RULES: tuple[Rule, ...] = (
    (lambda m: not m.is_generation, "models that do not generate text"),
    (lambda m: m.is_encoder_decoder, "encoder-decoder models"),
    (lambda m: m.is_multimodal, "multimodal models (text only: --no-enable-multimodal where the model allows it)"),
    (_is_mla, "models with MLA or DSA attention"),
    (_has_state_layers, "models with SSM or linear-attention layers"),
    (_has_window, "models with sliding-window or chunked attention"),
    (lambda m: m.has_attention_sinks, "models with attention sinks"),
    (lambda m: m.has_asymmetric_kv, "models whose K and V heads differ in size"),
)
"""(condition on SGLang's ModelConfig, what is not supported)"""


def check(server_args: Any, model_config: Any, config: AdrenalineConfig) -> None:
    """Raise ConfigError, naming all that stands in the way in one line, if this server cannot offload attention.

    server_args   SGLang's ServerArgs after resolution
    model_config  SGLang's ModelConfig of the served model (configuration only, no weights)
    """
    reasons = [text for rule, text in SERVER_RULES if rule(server_args)]
    reasons += [text for rule, text in MODEL_RULES if rule(model_config)]
    reasons += _backend_reasons(server_args, config)
    if reasons:
        raise ConfigError("not supported with attention offloading: " + "; ".join(reasons))
    from sglang_adrenaline.channel import opening

    opening.check_kind(config.channel, server_args.device)
    if config.role == "decode" and config.offload_ratio == "auto":
        from sglang_adrenaline import auto_cost

        auto_cost.check(config, model_config)


def _backend_reasons(server_args: Any, config: AdrenalineConfig) -> Iterator[str]:
    if config.role == "prefill" and server_args.disable_radix_cache:
        yield "a prefill server without radix cache (--disable-radix-cache)"
    if config.role == "decode" and not server_args.disaggregation_decode_enable_radix_cache:
        yield "a decode server without --disaggregation-decode-enable-radix-cache"
    if server_args.disaggregation_transfer_backend == "fake":
        yield "--disaggregation-transfer-backend fake"
    if server_args.kv_cache_dtype not in ("auto", "bf16", "bfloat16"):
        yield f"a quantised KV cache (--kv-cache-dtype {server_args.kv_cache_dtype})"
    supported: tuple[str, ...] = CPU_BACKENDS
    if server_args.device != "cpu":
        supported = DECODE_GPU_BACKENDS if config.role == "decode" else PREFILL_GPU_BACKENDS
    for backend in sorted({name for name in server_args.get_attention_backends() if name is not None}):
        if backend not in supported:
            yield f"attention backend {backend!r} (supported: {', '.join(supported)})"
