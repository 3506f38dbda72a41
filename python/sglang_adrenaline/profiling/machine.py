"""What is measured on every kind of device, and how the figures become a profile."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Protocol

from sglang_adrenaline.figures import ModelFigures
from sglang_adrenaline.profile_data import LinearPoint, Profile, ShareFigures, TripPoint

CONTEXT = 512
"""KV tokens a row of the attention measurements has."""
PREFILL_TOKENS = 1024


class Machine(Protocol):
    """A device that kernels of one model shape are timed on. Times in seconds, of all layers."""

    device: str
    memory_bytes: float
    linear_rows: tuple[int, ...]
    attention_rows: int
    step_fixed_s: float
    overhead_layer_s: float
    transfer_bytes_s: float
    notes: list[str]

    def linear_s(self, rows: int) -> float:
        """Every matrix of the model once, for so many tokens (the output head as well)."""

    def attention_s(self, rows: int, context: int) -> float:
        """Decode attention of `rows` requests over `context` tokens each."""

    def prefill_attention_s(self, tokens: int) -> float:
        """Causal attention of one prompt over itself."""

    def shares(self) -> list[ShareFigures]:
        """Executor and prefill side by side."""

    def round_trip(self) -> list[TripPoint]:
        """Of one layer."""


def measure(machine: Machine, model: ModelFigures, tell: Callable[[str], None]) -> Profile:
    """Take all measurements; `tell` gets a line about each."""
    linear = []
    for rows in machine.linear_rows:
        linear.append(LinearPoint(rows=rows, seconds=machine.linear_s(rows)))
        tell(f"linear layers, {rows} rows: {linear[-1].seconds * 1e3:.2f} ms")
    attention_s = machine.attention_s(machine.attention_rows, CONTEXT)
    attention_bytes_s = machine.attention_rows * CONTEXT * model.kv_token_bytes / attention_s
    tell(f"decode attention, {machine.attention_rows} x {CONTEXT} tokens: {attention_bytes_s / 1e9:.1f} GB/s")
    token_s = machine.linear_s(PREFILL_TOKENS) / PREFILL_TOKENS
    pair_s = machine.prefill_attention_s(PREFILL_TOKENS) / (PREFILL_TOKENS**2 / 2)
    tell(f"prefill, {PREFILL_TOKENS} tokens: {1 / (token_s + pair_s * PREFILL_TOKENS / 2):,.0f} tokens/s")
    shares = machine.shares()
    for point in shares:
        tell(
            f"executor on {point.share:.0%} of the device: {point.attention_bytes_s / 1e9:.1f} GB/s, "
            f"prefill beside it at {point.prefill_factor:.0%}"
        )
    trips = machine.round_trip()
    for trip in trips:
        tell(f"round trip of a layer, {trip.rows} rows: {trip.seconds * 1e6:.1f} us")
    return Profile(
        device=machine.device,
        source="measured",
        notes=machine.notes,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=model,
        memory_bytes=machine.memory_bytes,
        linear=linear,
        attention_bytes_s=attention_bytes_s,
        step_fixed_s=machine.step_fixed_s,
        prefill_fixed_s=linear[0].seconds,
        prefill_token_s=token_s,
        prefill_pair_s=pair_s,
        shares=shares,
        round_trip=trips,
        overhead_layer_s=machine.overhead_layer_s,
        transfer_bytes_s=machine.transfer_bytes_s,
    )
