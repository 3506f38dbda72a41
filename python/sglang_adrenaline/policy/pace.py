"""How fast work really goes: the rate of one kind of work as measured, against what was predicted of it."""

from __future__ import annotations

import msgspec

KEEP = 0.5
"""What older measurements still count when a new one comes."""
SLOWEST, FASTEST = 0.125, 8.0


class Pace(msgspec.Struct, frozen=True):
    """Fading sums of predicted and measured seconds. Their quotient lies between those of the single measurements, and
    short ones, in which what every call costs outweighs its reading, hardly move it."""

    predicted_s: float = 0.0
    took_s: float = 0.0

    def add(self, predicted_s: float, took_s: float, keep: float = KEEP) -> Pace:
        """With a measurement of work that was predicted to take `predicted_s`; without either, nothing was learnt."""
        if predicted_s <= 0.0 or took_s <= 0.0:
            return self
        return Pace(keep * self.predicted_s + predicted_s, keep * self.took_s + took_s)

    def faded(self, keep: float) -> Pace:
        """Without a measurement for long: `keep`, 0..1, is what is left of it, the rest is as predicted."""
        predicted_s = keep * self.predicted_s
        return Pace(predicted_s, predicted_s / self.rate**keep)

    @property
    def rate(self) -> float:
        """As share of the predicted one, SLOWEST..FASTEST; 1 before anything was measured."""
        if self.took_s <= 0.0:
            return 1.0
        return min(max(self.predicted_s / self.took_s, SLOWEST), FASTEST)
