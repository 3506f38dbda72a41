"""What a server tells its peers about its model and host, so that only equals pair up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sglang_adrenaline import compat, messages
from sglang_adrenaline.errors import ConfigError


def local_model_shape(scheduler: Any) -> messages.ModelShape:
    """The shape of the model that this rank serves. Raises ConfigError on layers that cannot be offloaded."""
    layers = compat.attention_layers(compat.model_runner(scheduler))
    buffers = compat.kv_buffers(scheduler)
    if len(layers) != len(buffers):
        raise ConfigError(f"{len(layers)} attention layers but {len(buffers)} layers of KV cache: not supported")
    sizes = {(layer.num_qo_heads, layer.num_kv_heads, layer.head_dim, layer.v_head_dim) for layer in layers}
    if len(sizes) != 1:
        raise ConfigError(f"attention layers of different shapes are not supported: {sorted(sizes)}")
    if any(layer.logit_cap for layer in layers):
        raise ConfigError("models with a cap on attention scores (logit soft cap) are not supported")
    num_qo_heads, num_kv_heads, head_dim, v_head_dim = sizes.pop()
    return messages.ModelShape(
        fingerprint=compat.model_fingerprint(scheduler),
        num_layers=len(layers),
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        dtype=compat.model_dtype(scheduler),  # type: ignore[arg-type]
        kv_dtype=str(buffers[0][0].dtype).removeprefix("torch."),
        sm_scales=[layer.sm_scale for layer in layers],
        logit_caps=[layer.logit_cap for layer in layers],
    )


def host_id() -> str:
    """Equal for two processes that can open each other's /proc/PID/fd: one kernel, one PID namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}/{os.readlink('/proc/self/ns/pid')}"
