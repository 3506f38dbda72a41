"""The one place that knows the kinds of channel: chooses one and opens either end of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_adrenaline.channel import shm
from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec, DecodeEnd

if TYPE_CHECKING:  # needs CUDA's libraries
    from sglang_adrenaline.channel.ipc_endpoint import IpcEndpoint


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
    from sglang_adrenaline.channel import ipc
    from sglang_adrenaline.errors import ChannelError

    if device is None:
        raise ChannelError(f"{peer} offers a channel of kind {spec.kind!r}, which needs a GPU")
    return ipc.open_decode_end(
        spec, device=device, wait_timeout=wait_timeout, endpoint=endpoint, expected=expected, peer=peer
    )
