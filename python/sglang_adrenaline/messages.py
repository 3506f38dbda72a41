"""Control messages between a decode rank (client) and a prefill rank (server), and their codec.

One frame is one message: msgpack, tagged, at most MAX_MESSAGE_BYTES. Decoding validates every field and the direction;
what does not fit raises ControlError. Fields may be added with a default; anything else needs a new PROTOCOL.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Annotated

import msgspec

from sglang_adrenaline.channel.base import MAX_LANES, ChannelSpec, DType
from sglang_adrenaline.errors import ControlError

PROTOCOL = 2
MAX_MESSAGE_BYTES = 64 * 1024
MAX_TEXT = 2000

MAX_ROOM = 2**63 - 1

Room = Annotated[int, msgspec.Meta(ge=0, le=MAX_ROOM)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Lane = Annotated[int, msgspec.Meta(ge=0, lt=MAX_LANES)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Code = Annotated[str, msgspec.Meta(pattern="^[a-z][a-z_]{0,39}$")]
InstanceId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Scale = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Scales = Annotated[list[Scale], msgspec.Meta(min_length=1, max_length=1024)]


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What attention over the prefix depends on, per rank. Both sides must agree in every field."""

    fingerprint: Name
    """Names the weights, e.g. a hash over config and parameters' sizes."""
    num_layers: Positive
    num_qo_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    v_head_dim: Positive
    dtype: DType
    kv_dtype: Name
    sm_scales: Scales
    """Softmax scale per layer."""
    logit_caps: Scales
    """Logit soft cap per layer, 0 = none."""

    def __post_init__(self) -> None:
        if not len(self.sm_scales) == len(self.logit_caps) == self.num_layers:
            raise ValueError(
                f"sm_scales ({len(self.sm_scales)}) and logit_caps ({len(self.logit_caps)}) "
                f"must have num_layers ({self.num_layers}) entries"
            )

    def difference(self, other: ModelShape) -> str | None:
        """The fields in which `other` differs, as "head_dim 64, not 128", or None if there are none."""
        names = [name for name in self.__struct_fields__ if getattr(self, name) != getattr(other, name)]
        parts = [_told(name, getattr(other, name), getattr(self, name)) for name in names]
        return "; ".join(parts) or None


def _told(name: str, theirs: object, ours: object) -> str:
    return f"other {name}" if isinstance(theirs, list) else f"{name} {theirs}, not {ours}"


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Decode introduces itself; first message on every connection."""

    protocol: Positive
    instance: InstanceId
    """Random, new with every start of the decode process."""
    sglang_version: Name
    model: ModelShape
    host_id: Name
    """Equal on both sides when they can share memory."""
    pid: Positive
    tp_rank: Annotated[int, msgspec.Meta(ge=0, le=4095)]
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    page_size: Positive
    lanes_wanted: Annotated[int, msgspec.Meta(ge=1, le=MAX_LANES)]


def make_hello(
    *, instance: str, model: ModelShape, host_id: str, tp_rank: int, tp_size: int, page_size: int, lanes_wanted: int
) -> Hello:
    """The HELLO of this process."""
    return Hello(
        protocol=PROTOCOL,
        instance=instance,
        sglang_version=importlib.metadata.version("sglang"),
        model=model,
        host_id=host_id,
        pid=os.getpid(),
        tp_rank=tp_rank,
        tp_size=tp_size,
        page_size=page_size,
        lanes_wanted=lanes_wanted,
    )


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """Prefill accepts a HELLO and names the channel it made for this decode rank."""

    instance: InstanceId
    """The prefill rank's own, random, new with every start."""
    channel: ChannelSpec


class Refuse(msgspec.Struct, frozen=True, tag="refuse"):
    """Prefill will not work with this decode rank."""

    reason: Text


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """Decode asks prefill to keep the first `remote_prefix_len` tokens of a prompt. May overtake the request itself."""

    room: Room
    remote_prefix_len: Positive
    prompt_len: Positive
    prompt_digest: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Names the prompt's tokens, so that another request of the same room is not taken for this one."""

    def __post_init__(self) -> None:
        if self.remote_prefix_len > self.prompt_len:
            raise ValueError(f"remote_prefix_len {self.remote_prefix_len} > prompt_len {self.prompt_len}")


class Accept(msgspec.Struct, frozen=True, tag="accept"):
    """Prefill will pin the prefix once it is computed; READY or NACK follows."""

    room: Room


class Nack(msgspec.Struct, frozen=True, kw_only=True, tag="nack"):
    """Prefill does not (or no longer) hold the prefix of this request."""

    room: Room
    reason: Code
    """Short and countable, e.g. "no_lane", "pin_cap", "not_cached"."""
    detail: Text = ""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The prefix is computed and pinned; the executor answers on `lane`."""

    room: Room
    lane: Lane


class End(msgspec.Struct, frozen=True, kw_only=True, tag="end"):
    """Decode is done with a request: unpin once the executor has passed `last_step` (0: it was in none).

    May overtake the pin, so an unknown room is remembered, not an error.
    """

    room: Room
    last_step: Count


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """How full the prefill rank is; sent now and then, only the newest counts. Sizes in tokens."""

    pool_tokens: Count
    free_tokens: Count
    pinned_tokens: Count
    pinned_requests: Count
    lanes: Count
    lanes_in_use: Count
    steps: Count = 0
    prefill_load: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    """Work of prompts that arrive, in seconds of the device alone per second; of late."""
    lasting_load: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    """The same over a longer time."""
    executor_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """Of the device's SMs, set apart for the executor; 0: executor and prefill use all."""
    busy_s: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    """Seconds that this decode rank's executor has computed so far, waits for queries left out; 0: not measured."""
    worked_s: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0
    """What it has taken of the device so far, on a clock that stands while prefill has it; 0: not measured."""
    read_tokens: Count = 0
    """Prefix tokens that steps attended to in that time; what requests of a step share, once."""


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent by both sides so that silence means death."""


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """The sender leaves on purpose; nothing more will come."""

    reason: Text = ""


FromDecode = Hello | Offer | End | Heartbeat | Bye
FromPrefill = Welcome | Refuse | Accept | Nack | Ready | Stats | Heartbeat | Bye
Message = FromDecode | FromPrefill


class _HelloOfAnyVersion(msgspec.Struct, frozen=True, tag="hello"):
    protocol: int


_encoder = msgspec.msgpack.Encoder()
_any = msgspec.msgpack.Decoder(Message)
_from_decode = msgspec.msgpack.Decoder(FromDecode)
_from_prefill = msgspec.msgpack.Decoder(FromPrefill)
_hello = msgspec.msgpack.Decoder(_HelloOfAnyVersion)


def encode(message: Message) -> bytes:
    """The frame of a message. Raises ControlError if the peer would refuse it (constructors don't validate)."""
    frame = _encoder.encode(message)
    _decode(_any, frame)
    return frame


def decode_from_decode(frame: bytes) -> FromDecode:
    """Decode what a decode rank may send. Raises ControlError."""
    return _decode(_from_decode, frame)


def decode_from_prefill(frame: bytes) -> FromPrefill:
    """Decode what a prefill rank may send. Raises ControlError."""
    return _decode(_from_prefill, frame)


def foreign_protocol(frame: bytes) -> int | None:
    """The protocol version of a HELLO that is not ours (so that it can be refused in words), else None."""
    try:
        protocol = _decode(_hello, frame).protocol
    except ControlError:
        return None
    return protocol if protocol != PROTOCOL else None


def clip(text: str) -> str:
    """Shorten free text (an exception's, say) to what a message may carry."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def _decode(decoder: msgspec.msgpack.Decoder, frame: bytes):
    if len(frame) > MAX_MESSAGE_BYTES:
        raise ControlError(f"message of {len(frame)} bytes, at most {MAX_MESSAGE_BYTES} are taken")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ControlError(f"not a message: {error}") from None
