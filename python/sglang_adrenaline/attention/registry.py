"""Puts the attention backends of a decode server that offloads behind the names of SGLang's own.

The names stay, because SGLang decides by them which operators may be used and which options go together. Nothing of a
backend is imported before SGLang builds it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_adrenaline.decode.runtime import DecodeRuntime

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def register_backends(runtime: DecodeRuntime) -> None:
    """Must run before the CPU platform starts, which registers the attention of CPUs unless it is there already."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    def torch_native(model_runner: ModelRunner) -> Any:
        from sglang_adrenaline.attention.offload_cpu import OffloadCpuAttnBackend

        return OffloadCpuAttnBackend(model_runner, runtime)

    def flashinfer(model_runner: ModelRunner) -> Any:
        from sglang_adrenaline.attention.offload_flashinfer import OffloadFlashInferBackend

        return OffloadFlashInferBackend(model_runner, runtime)

    register_attention_backend("torch_native")(torch_native)
    register_attention_backend("flashinfer")(flashinfer)
