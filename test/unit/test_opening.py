"""Kinds of channel: which one serves which device, and what does not fit."""

import msgspec
import pytest
import torch

from sglang_adrenaline.channel import opening
from sglang_adrenaline.channel.base import ChannelShape
from sglang_adrenaline.errors import ChannelError, ConfigError

SHAPE = ChannelShape(lanes=4, num_layers=2, num_qo_heads=2, head_dim=64, v_head_dim=64, dtype="float32")


@pytest.mark.parametrize(
    ("kind", "device", "same_host", "expected"),
    [
        ("auto", "cpu", True, "shm"),
        ("auto", "cpu", False, "zmq"),
        ("shm", "cpu", True, "shm"),
        ("zmq", "cpu", True, "zmq"),
        ("zmq", "cpu", False, "zmq"),
        ("auto", "cuda", True, "ipc"),
        ("ipc", "cuda", True, "ipc"),
    ],
)
def test_choose_kind_goes_by_device_and_host(kind, device, same_host, expected):
    opening.check_kind(kind, device)
    assert opening.choose_kind(kind, device, same_host=same_host) == expected


@pytest.mark.parametrize(("kind", "device"), [("shm", "cpu"), ("auto", "cuda"), ("ipc", "cuda")])
def test_choose_kind_tells_a_peer_out_of_reach(kind, device):
    with pytest.raises(ChannelError, match="on one host"):
        opening.choose_kind(kind, device, same_host=False)


@pytest.mark.parametrize(("kind", "device"), [("ipc", "cpu"), ("shm", "cuda"), ("zmq", "cuda"), ("auto", "xpu")])
def test_check_kind_that_does_not_fit_is_refused(kind, device):
    with pytest.raises(ConfigError, match=f"{kind} does not work on device {device}"):
        opening.check_kind(kind, device)


@pytest.mark.parametrize("kind", ["shm", "zmq"])
def test_ends_meet(kind):
    executor = opening.create_executor_end(kind, SHAPE, device=None, wait_timeout=1.0, peer="decode")
    decode = opening.open_decode_end(
        executor.spec, device=None, endpoints=None, wait_timeout=1.0, expected=SHAPE, peer="prefill"
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
                endpoints=None,
                wait_timeout=1.0,
                expected=SHAPE,
                peer="prefill",
            )
    finally:
        executor.close()
