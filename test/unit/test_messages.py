"""Messages: what is encoded decodes to the same; everything else is refused as ControlError and nothing else."""

from __future__ import annotations

import contextlib
import math

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_adrenaline import messages
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.errors import ControlError

SHAPE = ChannelShape(lanes=128, num_layers=3, num_qo_heads=9, head_dim=64, v_head_dim=64, dtype="bfloat16")
SPEC = ChannelSpec(kind="shm", address="12:34", token="0123456789abcdef" * 2, shape=SHAPE)


def model(**changes) -> messages.ModelShape:
    fields = {
        "fingerprint": "SmolLM2/135M",
        "num_layers": 3,
        "num_qo_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "v_head_dim": 64,
        "dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "sm_scales": [0.125] * 3,
        "logit_caps": [0.0] * 3,
    }
    return messages.ModelShape(**(fields | changes))


def hello(**changes) -> messages.Hello:
    fields = {
        "protocol": 2,
        "instance": "a" * 32,
        "sglang_version": "0.5.17",
        "model": model(),
        "host_id": "host",
        "pid": 1,
        "tp_rank": 0,
        "tp_size": 1,
        "page_size": 1,
        "lanes_wanted": 128,
    }
    return messages.Hello(**(fields | changes))


FROM_DECODE = [
    hello(),
    messages.Offer(room=2**63 - 1, remote_prefix_len=5, prompt_len=5),
    messages.End(room=0, last_step=0),
    messages.Heartbeat(),
    messages.Bye("leaves"),
]
FROM_PREFILL = [
    messages.Welcome(instance="b" * 32, channel=SPEC),
    messages.Refuse("why"),
    messages.Accept(3),
    messages.Nack(room=3, reason="no_lane", detail="all 128 lanes are in use"),
    messages.Ready(room=3, lane=127),
    messages.Stats(
        pool_tokens=100, free_tokens=50, pinned_tokens=25, pinned_requests=2, lanes=128, lanes_in_use=2, steps=7
    ),
    messages.Stats(
        pool_tokens=9,
        free_tokens=5,
        pinned_tokens=2,
        pinned_requests=2,
        lanes=8,
        lanes_in_use=2,
        busy_s=1.5,
        worked_s=0.5,
        read_tokens=7,
    ),
    messages.Heartbeat(),
    messages.Bye(),
]


@pytest.mark.parametrize("message", FROM_DECODE, ids=lambda m: type(m).__name__)
def test_decode_side_message_survives(message):
    assert messages.decode_from_decode(messages.encode(message)) == message


@pytest.mark.parametrize("message", FROM_PREFILL, ids=lambda m: type(m).__name__)
def test_prefill_side_message_survives(message):
    assert messages.decode_from_prefill(messages.encode(message)) == message


def test_wrong_direction_is_refused():
    both = (messages.Heartbeat, messages.Bye)
    for message in FROM_DECODE:
        if not isinstance(message, both):
            with pytest.raises(ControlError, match="type"):
                messages.decode_from_prefill(messages.encode(message))
    for message in FROM_PREFILL:
        if not isinstance(message, both):
            with pytest.raises(ControlError, match="type"):
                messages.decode_from_decode(messages.encode(message))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (messages.End(room=-1, last_step=0), "room"),
        (messages.End(room=2**63, last_step=0), "room"),
        (messages.End(room=1, last_step=-1), "last_step"),
        (messages.Offer(room=1, remote_prefix_len=0, prompt_len=5), "remote_prefix_len"),
        (messages.Ready(room=1, lane=4096), "lane"),
        (messages.Ready(room=1, lane=True), "lane"),
        (messages.Nack(room=1, reason="No Lane"), "reason"),
        (messages.Nack(room=1, reason="x", detail="y" * 2001), "detail"),
        (messages.Accept("1"), "room"),
        (hello(instance="A" * 32), "instance"),
        (hello(lanes_wanted=0), "lanes_wanted"),
        (hello(host_id=""), "host_id"),
        (hello(model=model(dtype="float8")), "dtype"),
        (hello(model=model(sm_scales=[math.nan] * 3)), "sm_scales"),
        (hello(model=model(logit_caps=[math.inf] * 3)), "logit_caps"),
        (messages.Welcome(instance="b" * 32, channel=msgspec.structs.replace(SPEC, token="zz")), "token"),
        (messages.Welcome(instance="b" * 32, channel=msgspec.structs.replace(SPEC, kind="tcp")), "kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_field_out_of_range_is_refused_at_the_sender(message, field):
    with pytest.raises(ControlError, match=field):
        messages.encode(message)


def test_inconsistent_fields_are_refused():
    with pytest.raises(ValueError, match="sm_scales"):
        model(sm_scales=[0.1])
    with pytest.raises(ValueError, match="prompt_len"):
        messages.Offer(room=1, remote_prefix_len=6, prompt_len=5)
    raw = msgspec.msgpack.encode({"type": "offer", "room": 1, "remote_prefix_len": 6, "prompt_len": 5})
    with pytest.raises(ControlError, match="prompt_len"):
        messages.decode_from_decode(raw)


def test_size_limit_counts_the_whole_frame():
    raw = msgspec.msgpack.encode({"type": "heartbeat", "padding": "x" * 65_400})
    assert len(raw) <= messages.MAX_MESSAGE_BYTES
    assert messages.decode_from_decode(raw) == messages.Heartbeat()
    raw = msgspec.msgpack.encode({"type": "heartbeat", "padding": "x" * 65_536})
    with pytest.raises(ControlError, match="bytes"):
        messages.decode_from_decode(raw)


def test_unknown_fields_of_a_newer_peer_are_ignored():
    raw = msgspec.msgpack.encode({"type": "accept", "room": 4, "colour": "green"})
    assert messages.decode_from_prefill(raw) == messages.Accept(4)


def test_foreign_protocol_tells_only_other_versions():
    assert messages.foreign_protocol(messages.encode(hello())) is None
    assert messages.foreign_protocol(msgspec.msgpack.encode({"type": "hello", "protocol": 9})) == 9
    assert messages.foreign_protocol(msgspec.msgpack.encode({"type": "end", "protocol": 9})) is None
    assert messages.foreign_protocol(b"\xc1") is None


def test_make_hello_fills_in_this_process():
    message = messages.make_hello(
        instance="c" * 32, model=model(), host_id="h", tp_rank=0, tp_size=1, page_size=1, lanes_wanted=5
    )
    assert messages.decode_from_decode(messages.encode(message)).protocol == messages.PROTOCOL


def test_differences_name_the_fields():
    assert model().difference(model()) is None
    assert model().difference(model(head_dim=128, v_head_dim=128)) == "head_dim 128, not 64; v_head_dim 128, not 64"
    assert model().difference(model(sm_scales=[0.1] * 3)) == "other sm_scales"
    other = msgspec.structs.replace(SHAPE, lanes=64)
    assert SHAPE.difference(other) == "lanes 64, not 128" and SHAPE.difference(SHAPE) is None


def test_clip_keeps_free_text_sendable():
    text = messages.clip("é" * 10_000)
    assert len(messages.encode(messages.Bye(text))) < messages.MAX_MESSAGE_BYTES
    assert messages.clip("short") == "short"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_control_error(frame):
    for decode in (messages.decode_from_decode, messages.decode_from_prefill):
        with contextlib.suppress(ControlError):
            decode(frame)


ascii_text = st.text("abcdefghijklmnopqrstuvwxyz_0\x00", max_size=12)
json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ascii_text, inner, max_size=4),
    max_leaves=12,
)
tags = [type(m).__struct_config__.tag for m in FROM_DECODE + FROM_PREFILL]
fields = sorted({name for m in FROM_DECODE + FROM_PREFILL for name in m.__struct_fields__})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(tags), st.dictionaries(st.sampled_from(fields), json_like, max_size=10))
def test_any_fields_give_a_valid_message_or_control_error(tag, values):
    frame = msgspec.msgpack.encode({"type": tag} | values)
    for decode in (messages.decode_from_decode, messages.decode_from_prefill):
        try:
            message = decode(frame)
        except ControlError:
            continue
        assert decode(messages.encode(message)) == message
