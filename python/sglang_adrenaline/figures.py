"""What sizes of a model and data sheets of devices say: bytes and operations. No measurement, no SGLang, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec

from sglang_adrenaline.errors import ConfigError

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of a dense decoder with gated MLPs (Llama's), as one TP rank sees nothing else: whole-model sizes."""

    num_layers: Size
    hidden_size: Size
    intermediate_size: Size
    num_qo_heads: Size
    num_kv_heads: Size
    head_dim: Size
    vocab_size: Size
    weight_bytes_each: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    kv_bytes_each: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's matrices as SGLang joins them: qkv, o, gate and up, down."""
        qo, kv = self.num_qo_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return [
            (qo + 2 * kv, self.hidden_size),
            (self.hidden_size, qo),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        ]

    @property
    def layer_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def linear_parameters(self) -> int:
        """Of every matrix a decode step multiplies with; the embedding table is looked up, not multiplied."""
        return self.num_layers * self.layer_parameters + self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.linear_parameters * self.weight_bytes_each

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes_each

    @property
    def row_bytes(self) -> int:
        """What a row sends and gets back in one layer: q, o and lse."""
        return self.num_qo_heads * (2 * self.head_dim * self.kv_bytes_each + 4)


def model_from_config(path: str, *, bytes_each: int = 2) -> ModelFigures:
    """Figures of a Hugging Face `config.json` (or the directory that holds one). Raises ConfigError, one line."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"no model shape in {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"no model shape in {file}: {error}") from None
    return model_from_settings(config, str(file), bytes_each=bytes_each)


def model_from_settings(config: dict[str, Any], source: str, *, bytes_each: int) -> ModelFigures:
    """Figures of what a `config.json` says; `source` names it in errors. Raises ConfigError, one line."""
    try:
        heads = config["num_attention_heads"]
        figures = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "intermediate_size": config["intermediate_size"],
            "num_qo_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            "vocab_size": config["vocab_size"],
            "weight_bytes_each": bytes_each,
            "kv_bytes_each": bytes_each,
        }
        model = msgspec.convert(figures, ModelFigures)
    except KeyError as error:
        raise ConfigError(f"no model shape in {source}: {error} is missing") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, msgspec.ValidationError) as error:
        raise ConfigError(f"no model shape in {source}: {error}") from None
    if config.get("num_local_experts") or config.get("n_routed_experts"):
        raise ConfigError(f"{source}: the cost model knows dense models only, not mixtures of experts")
    return model


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Data sheet of one device. Bytes, bytes per second, dense 16-bit operations per second."""

    memory_bytes: float
    memory_bytes_s: float
    flops: float
    peer_bytes_s: float
    """To a peer on the same host, one direction."""
    sms: int
    sm_bytes_s: float
    """Memory bandwidth that one SM reaches while others leave room."""
    gpu: bool = True

    def part_of_bandwidth(self, share: float) -> float:
        """Of the device's memory bandwidth, what so much of its SMs reach (0..1, like the answer).

        A smooth minimum of what the SMs can ask for and what memory gives. Its order is fitted to green contexts of
        8 to 96 SMs of an H100 (within 10 %).
        """
        asked = share * self.sms * self.sm_bytes_s / (BANDWIDTH_EFFICIENCY * self.memory_bytes_s)
        return asked / (1.0 + asked**4) ** 0.25


BANDWIDTH_EFFICIENCY = 0.89
"""Share of the data sheet's memory bandwidth that weights and KV are read with: 2,972 of 3,350 GB/s on an H100."""

_H100 = DeviceFigures(
    memory_bytes=85.0e9,
    memory_bytes_s=3.35e12,
    flops=989e12,
    peer_bytes_s=450e9,
    sms=132,
    sm_bytes_s=77e9,  # 8 SMs read and write 615 GB/s
)

DEVICES: dict[str, DeviceFigures] = {
    "H100": _H100,
    "H200": msgspec.structs.replace(_H100, memory_bytes=150.0e9, memory_bytes_s=4.8e12),
    # An SM's bandwidth is a guess: an H100's by their clocks.
    "A100": DeviceFigures(
        memory_bytes=85.0e9, memory_bytes_s=2.04e12, flops=312e12, peer_bytes_s=300e9, sms=108, sm_bytes_s=58e9
    ),
    # One core of a server CPU with wide vectors; memory as a small virtual machine has it.
    "CPU": DeviceFigures(
        memory_bytes=8e9, memory_bytes_s=12e9, flops=60e9, peer_bytes_s=4e9, sms=1, sm_bytes_s=12e9, gpu=False
    ),
}


def known_device(name: str) -> str:
    """The data sheet's key for a device name such as "NVIDIA H100 80GB HBM3". Raises ConfigError on unknown ones."""
    for key in DEVICES:
        if key in name.upper():
            return key
    raise ConfigError(f"no data sheet figures for device {name!r}, only for {', '.join(DEVICES)}: measure a profile")
