"""The one place that knows the kinds of channel: chooses one and opens either end of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_adrenaline.channel import net, shm
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec, DecodeEnd, Kind
from sglang_adrenaline.config import ANY_PORT, ChannelKind
from sglang_adrenaline.errors import ChannelError, ConfigError

if TYPE_CHECKING:  # needs CUDA's libraries
    from sglang_adrenaline.channel.ipc import IpcExecutorEnd
    from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoints

_FITTING: dict[str, tuple[Kind, ...]] = {"cpu": ("shm", "zmq"), "cuda": ("ipc",)}
"""By device type, the kinds that work there; the first is for peers of one host. A step on a GPU is a CUDA graph, in
which nothing can go by way of the host."""
_REACH = {
    "shm": "channel shm needs decode and prefill on one host, in one PID namespace",
    "ipc": "channel ipc needs decode's and prefill's GPUs on one host, and the servers in one PID namespace",
}
"""By kind, what to tell a decode instance that is elsewhere."""


def check_kind(kind: ChannelKind, device_type: str) -> None:
    """Raises ConfigError if `kind` cannot serve a rank on this type of device."""
    fitting = _FITTING.get(device_type, ())
    if not fitting or kind not in ("auto", *fitting):
        use = f"use {' or '.join(('auto', *fitting))}" if fitting else "and no other does"
        raise ConfigError(f"--adrenaline-channel {kind} does not work on device {device_type}, {use}")


def choose_kind(kind: ChannelKind, device_type: str, *, same_host: bool) -> Kind:
    """The kind of channel to a decode instance; `kind` has passed `check_kind`. Raises ChannelError if none reaches."""
    fitting = _FITTING[device_type]
    chosen: Kind = kind if kind != "auto" else fitting[0] if same_host else fitting[-1]
    if not same_host and chosen in _REACH:
        raise ChannelError(_REACH[chosen])
    return chosen


def create_executor_end(
    kind: Kind,
    shape: ChannelShape,
    *,
    device: int | None,
    wait_timeout: float,
    peer: str,
    host: str = "127.0.0.1",
    ports: range = ANY_PORT,
) -> shm.ShmExecutorEnd | net.NetExecutorEnd | IpcExecutorEnd:
    """Prefill's end of a new channel; its `spec` goes to decode. Raises ChannelError.

    device        the rank's GPU, None on a CPU
    wait_timeout  decode's longest wait for an answer, in seconds (ipc)
    host, ports   address to listen on, and the ports to choose from (zmq)
    """
    if kind == "shm":
        return shm.create_executor_end(shape, peer=peer)
    if kind == "zmq":
        return net.create_executor_end(shape, host=host, ports=ports, peer=peer)
    if device is None:
        raise ChannelError("channel ipc needs a GPU")
    from sglang_adrenaline.channel import ipc

    # Decode may be held up in a step by another executor for as long as it waits at most, and then goes on.
    patience = 2 * wait_timeout
    with torch.cuda.device(device):  # the control thread's own device is GPU 0 whatever the rank
        return ipc.create_executor_end(shape, device=device, wait_timeout=patience, peer=peer)


def open_decode_end(
    spec: ChannelSpec,
    *,
    device: int | None,
    endpoints: IpcEndpoints | None,
    wait_timeout: float,
    expected: ChannelShape,
    peer: str,
    host: str = "127.0.0.1",
) -> DecodeEnd:
    """Decode's end of the channel that `spec` names. Raises ChannelError.

    device, endpoints  GPU and endpoints of the decode rank's kernels; None on a CPU
    host               where the prefill server is (zmq)
    """
    if (device is None) == (spec.kind == "ipc"):
        needs = "which needs a GPU" if device is None else "which works on CPUs only"
        raise ChannelError(f"{peer} offers a channel of kind {spec.kind!r}, {needs}")
    if spec.kind == "shm":
        return shm.open_decode_end(spec, wait_timeout=wait_timeout, expected=expected, peer=peer)
    if spec.kind == "zmq":
        return net.open_decode_end(spec, host=host, wait_timeout=wait_timeout, expected=expected, peer=peer)
    assert device is not None
    from sglang_adrenaline.channel import ipc
    from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint
    from sglang_adrenaline.channel.ipc_memory import freed_on_error

    with torch.cuda.device(device):
        endpoint = IpcEndpoint(device) if endpoints is None else endpoints.take()
        with freed_on_error(endpoint):
            return ipc.open_decode_end(
                spec, device=device, wait_timeout=wait_timeout, endpoint=endpoint, expected=expected, peer=peer
            )
