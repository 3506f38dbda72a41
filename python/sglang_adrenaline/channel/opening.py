"""The one place that knows the kinds of channel: chooses one and opens either end of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from sglang_adrenaline.channel import shm
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec, DecodeEnd
from sglang_adrenaline.config import ChannelKind
from sglang_adrenaline.errors import ChannelError, ConfigError

if TYPE_CHECKING:  # needs CUDA's libraries
    from sglang_adrenaline.channel.ipc import IpcExecutorEnd
    from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint

REACH = {
    "shm": "channel shm needs decode and prefill on one host, in one PID namespace",
    "ipc": "channel ipc needs decode's and prefill's GPUs on one host, and the servers in one PID namespace",
}
"""By kind, what to tell a decode instance that is elsewhere."""


def resolve_kind(kind: ChannelKind, device_type: str) -> Literal["shm", "ipc"]:
    """The kind of channel that serves a rank on this type of device. Raises ConfigError if `kind` cannot."""
    fitting: Literal["shm", "ipc"] = "ipc" if device_type == "cuda" else "shm"
    if kind not in ("auto", fitting):
        raise ConfigError(f"--adrenaline-channel {kind} does not work on device {device_type}, use auto or {fitting}")
    return fitting


def create_executor_end(
    kind: Literal["shm", "ipc"], shape: ChannelShape, *, device: int | None, wait_timeout: float, peer: str
) -> shm.ShmExecutorEnd | IpcExecutorEnd:
    """Prefill's end of a new channel; its `spec` goes to decode. Raises ChannelError.

    device        the rank's GPU, None on a CPU
    wait_timeout  longest wait for a layer of a step that has begun, in seconds (ipc)
    """
    if kind == "shm":
        return shm.create_executor_end(shape, peer=peer)
    if device is None:
        raise ChannelError("channel ipc needs a GPU")
    from sglang_adrenaline.channel import ipc

    with torch.cuda.device(device):  # the control thread's own device is GPU 0 whatever the rank
        return ipc.create_executor_end(shape, device=device, wait_timeout=wait_timeout, peer=peer)


def open_decode_end(
    spec: ChannelSpec,
    *,
    device: int | None,
    endpoint: IpcEndpoint | None,
    wait_timeout: float,
    expected: ChannelShape,
    peer: str,
) -> DecodeEnd:
    """Decode's end of the channel that `spec` names. Raises ChannelError.

    device, endpoint  GPU and endpoint of the decode rank's kernels; None on a CPU
    """
    if spec.kind == "shm":
        return shm.open_decode_end(spec, wait_timeout=wait_timeout, expected=expected, peer=peer)
    if device is None:
        raise ChannelError(f"{peer} offers a channel of kind {spec.kind!r}, which needs a GPU")
    from sglang_adrenaline.channel import ipc

    with torch.cuda.device(device):
        return ipc.open_decode_end(
            spec, device=device, wait_timeout=wait_timeout, endpoint=endpoint, expected=expected, peer=peer
        )
