"""The profile of a machine: what was measured (or taken from data sheets) for one model, as a versioned JSON file.

Times in seconds, of one rank; `share` is the executor's part of a device's SMs (of the cores, on a CPU).
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.figures import BANDWIDTH_EFFICIENCY, DEVICES, ModelFigures, known_device

VERSION: Literal[1] = 1

Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
MaybeSeconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1e18)]
Rows = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class LinearPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decode step of `rows` requests without its attention."""

    rows: Rows
    seconds: Seconds


class TripPoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer's round trip for `rows` offloaded rows, the executor having nothing to read."""

    rows: Rows
    seconds: Seconds


class ShareFigures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What executor and prefill reach side by side."""

    share: Share
    attention_bytes_s: Rate
    prefill_factor: Annotated[float, msgspec.Meta(gt=0, le=1)]
    """Prefill's speed as share of what it reaches alone."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the cost model computes with."""

    version: Literal[1] = VERSION
    device: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    source: Literal["measured", "datasheet"]
    notes: list[str] = []
    """How figures were obtained, for people."""
    created: str = ""
    model: ModelFigures
    tp_size: Rows = 1
    memory_bytes: Rate
    linear: Annotated[list[LinearPoint], msgspec.Meta(min_length=2, max_length=200)]
    attention_bytes_s: Rate
    """Decode attention of a server that has the device to itself, KV bytes read per second."""
    step_fixed_s: MaybeSeconds = 0.0
    """Of every decode step, beside linear and attention work."""
    prefill_fixed_s: MaybeSeconds
    """Of every prefill batch."""
    prefill_token_s: Seconds
    """Of every new token."""
    prefill_pair_s: MaybeSeconds
    """Of every pair of a new token and a token before it."""
    shares: Annotated[list[ShareFigures], msgspec.Meta(min_length=1, max_length=200)]
    round_trip: Annotated[list[TripPoint], msgspec.Meta(min_length=1, max_length=200)]
    overhead_layer_s: MaybeSeconds
    """What a layer's offloading costs the step even when hidden."""
    transfer_bytes_s: Rate
    """KV from prefill to decode."""

    def __post_init__(self) -> None:
        for name, values in (
            ("linear", [point.rows for point in self.linear]),
            ("round_trip", [point.rows for point in self.round_trip]),
            ("shares", [point.share for point in self.shares]),
        ):
            if any(one >= two for one, two in itertools.pairwise(values)):
                raise ValueError(f"{name} is not in rising order")


def load_profile(path: str, *, device: str | None = None, model: ModelFigures | None = None) -> Profile:
    """Read a profile. `device`: name of the device at hand, `model`: the model to be served; None: any.

    Raises ConfigError, one line, on an unreadable or invalid file and on a profile of something else.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read profile {path}: {error.strerror}") from None
    try:
        profile = msgspec.json.decode(raw, type=Profile)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a profile of version {VERSION}: {error}") from None
    remedy = "measure one with python -m sglang_adrenaline.profile"
    if device is not None and device != profile.device:
        raise ConfigError(f"{path} is a profile of {profile.device!r}, this device is {device!r}: {remedy}")
    if model is not None and model != profile.model:
        raise ConfigError(f"{path} is a profile of a model of another shape: {remedy}")
    return profile


def write_whole(path: str, content: bytes) -> None:
    """Write a file all at once or not at all. Raises ConfigError."""
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def encode_profile(profile: Profile) -> bytes:
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"


FLOPS_EFFICIENCY = 0.55
LINEAR_ROWS = (1, 8, 16, 32, 64, 128, 192, 256, 384, 512, 1024, 2048)
BESIDE_PREFILL, BESIDE_EXECUTOR = 0.8, 0.8
"""On SMs of their own, what attention reaches beside prefill's matrix products, and these beside attention that never
rests, as share of what each reaches there alone: they share the memory and the power. An H200, 32 and 64 SMs of 132:
1,799 of 2,221 GB/s and 2,999 of 3,528; 0.83 and 0.79 of the products' speed (docs/gpu-results.md, "Attention of the
executor")."""
SM_SHARES = (0.06, 0.12, 0.18, 0.24, 0.36, 0.48, 0.6, 0.73)


def datasheet_profile(device: str, model: ModelFigures, tp_size: int = 1) -> Profile:
    """Conservative figures where nothing was measured. Raises ConfigError on an unknown device or uneven TP."""
    key = known_device(device)
    sheet = DEVICES[key]
    if model.num_kv_heads % tp_size:
        raise ConfigError(f"{model.num_kv_heads} KV heads cannot be divided among {tp_size} ranks")
    bandwidth = sheet.memory_bytes_s * BANDWIDTH_EFFICIENCY
    flops = sheet.flops * FLOPS_EFFICIENCY
    weights_s = model.weight_bytes / tp_size / bandwidth
    token_s = 2 * model.linear_parameters / tp_size / flops
    pair_s = 4 * model.num_layers * model.num_qo_heads * model.head_dim / tp_size / flops
    # GPUs: 12 us a layer and NVLink for the payload, as channel ipc was measured; CPUs: 60 us, as shm was.
    trip_s, overhead_s = (11e-6, 4e-6) if sheet.gpu else (70e-6, 20e-6)
    trips = [
        TripPoint(rows=rows, seconds=trip_s + rows * model.row_bytes / tp_size / sheet.peer_bytes_s)
        for rows in (1, 32, 256)
    ]
    if sheet.gpu:
        shares = [
            ShareFigures(
                share=share,
                attention_bytes_s=bandwidth * sheet.part_of_bandwidth(share) * BESIDE_PREFILL,
                prefill_factor=(1 - share) * BESIDE_EXECUTOR,
            )
            for share in SM_SHARES
        ]
    else:
        shares = [ShareFigures(share=0.5, attention_bytes_s=bandwidth / 2, prefill_factor=0.5)]
    return Profile(
        device=key,
        source="datasheet",
        notes=[f"data sheet, {BANDWIDTH_EFFICIENCY:.0%} of bandwidth, {FLOPS_EFFICIENCY:.0%} of operations"],
        model=model,
        tp_size=tp_size,
        memory_bytes=sheet.memory_bytes,
        linear=[LinearPoint(rows=rows, seconds=max(weights_s, rows * token_s)) for rows in LINEAR_ROWS],
        attention_bytes_s=bandwidth,
        step_fixed_s=3e-4 if sheet.gpu else 2e-3,
        prefill_fixed_s=max(weights_s, 2e-3),
        prefill_token_s=token_s,
        prefill_pair_s=pair_s,
        shares=shares,
        round_trip=trips,
        overhead_layer_s=overhead_s,
        transfer_bytes_s=sheet.peer_bytes_s * 0.85,
    )
