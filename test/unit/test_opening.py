"""Kinds of channel: which one serves which device, and what does not fit."""

import msgspec
import pytest
import torch

from sglang_adrenaline.channel import opening
from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.errors import ChannelError, ConfigError

SHAPE = ChannelShape(lanes=4, num_layers=2, num_qo_heads=2, head_dim=64, v_head_dim=64, dtype="float32")


@pytest.mark.parametrize(("kind", "device", "expected"), [("auto", "cpu", "shm"), ("auto", "cuda", "ipc")])
def test_resolve_auto_goes_by_the_device(kind, device, expected):
    assert opening.resolve_kind(kind, device) == expected
    assert opening.resolve_kind(expected, device) == expected


@pytest.mark.parametrize(("kind", "device"), [("ipc", "cpu"), ("shm", "cuda")])
def test_resolve_kind_that_does_not_fit_is_refused(kind, device):
    with pytest.raises(ConfigError, match=f"{kind} does not work on device {device}"):
        opening.resolve_kind(kind, device)


def test_shm_ends_meet():
    executor = opening.create_executor_end("shm", SHAPE, device=None, wait_timeout=1.0, peer="decode")
    decode = opening.open_decode_end(
        executor.spec, device=None, endpoint=None, wait_timeout=1.0, expected=SHAPE, peer="prefill"
    )
    try:
        assert decode.begin_step([1, 3]) == 1
        q = torch.randn(2, 2, 64)
        decode.send_q(0, q)
        call = executor.wait_call(1.0)
        assert call is not None and call.lanes == (1, 3) and torch.equal(call.q, q)
    finally:
        decode.close()
        executor.close()


def test_ipc_without_a_gpu_is_refused():
    with pytest.raises(ChannelError, match="needs a GPU"):
        opening.create_executor_end("ipc", SHAPE, device=None, wait_timeout=1.0, peer="decode")
    executor = opening.create_executor_end("shm", SHAPE, device=None, wait_timeout=1.0, peer="decode")
    try:
        with pytest.raises(ChannelError, match="needs a GPU"):
            opening.open_decode_end(
                msgspec.structs.replace(executor.spec, kind="ipc"),
                device=None,
                endpoint=None,
                wait_timeout=1.0,
                expected=SHAPE,
                peer="prefill",
            )
    finally:
        executor.close()
