"""How the layers of a step are numbered on a channel: one call each, or two where a step may run as two halves.

A step in halves exchanges each layer twice, for the first half of its rows (even calls) and for the second one (odd
calls). A whole step on the same channel skips calls, but begins with the first and ends with the last one, by which
both ends know where a step begins and ends. Either way a half's buffers are those of its parity.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_adrenaline.errors import ChannelError


def calls_of(layers: int, device_type: str) -> int:
    """Calls of a step on the channels of servers on this type of device: graphs of halves are for GPUs."""
    return 2 * layers if device_type == "cuda" else layers


@dataclass(frozen=True)
class StepCalls:
    """layers: of the model; calls: of the channel (`ChannelShape.num_layers`)."""

    layers: int
    calls: int

    def __post_init__(self) -> None:
        if self.calls not in (self.layers, 2 * self.layers):
            raise ChannelError(f"a channel of {self.calls} calls a step does not fit {self.layers} layers")

    @property
    def halves(self) -> bool:
        """Whether steps may run as two halves. Of a model of one layer they may not: its only call is the last one."""
        return self.calls == 2 * self.layers and self.layers > 1

    def whole(self, layer: int) -> int:
        return layer if self.calls == self.layers else 2 * layer + (layer > 0 or self.layers == 1)

    def half(self, layer: int, half: int) -> int:
        """half: 0 or 1."""
        return 2 * layer + half
