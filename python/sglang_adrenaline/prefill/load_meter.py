"""What prefill reports as its load: work of the prompts that arrived (`policy.prefill_load`), by what they cost here.

    meter = LoadMeter(expected_s)
    meter.ran(now, worked_s, busy=, alone=)      once a loop of the scheduler
    meter.computed(new_tokens, cached_tokens)    for each prompt that is done
    meter.report(now, begun=, waiting=)          now and then; `load` and `lasting_load` are as of the last time

A prompt's work is what the cost model expects times `slowness`, which is learned: time worked over time expected, while
nothing but prompts is computed. Knows neither SGLang nor clocks; scheduler thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from sglang_adrenaline.policy.pace import Pace
from sglang_adrenaline.policy.prefill_load import BRISK_S, LASTING_S, ArrivedWork

LEARN_S = 10.0
"""So much work forgets what was learned before."""
PRIOR_S = 1.0
"""So much work is taken to have gone as expected before the first."""
LEAP = 4.0
"""Between two reports `slowness` is believed to have become no more than so many times as much: kernels that are
compiled at first use are no prompts' work."""
FRESH_WEIGHT = 0.1
"""Of the newest prompt in the share of prompt tokens that are not cached."""


class LoadMeter:
    """`expected_s(new_tokens, cached_tokens)`: what computing a prompt should take on this device alone, seconds."""

    def __init__(self, expected_s: Callable[[int, int], float]) -> None:
        self.load = 0.0
        """Over BRISK_S."""
        self.lasting_load = 0.0
        """Over LASTING_S."""
        self._pace = Pace(PRIOR_S, PRIOR_S)
        self._expected_s = expected_s
        self._fresh = 1.0
        self._arrived = ArrivedWork(BRISK_S)
        self._arrived_lasting = ArrivedWork(LASTING_S)
        self._arrived_s = 0.0
        """Expected work of all that came until the last report; what is counted from there on is the difference."""
        self._computed_s = 0.0
        self._looped_at: float | None = None
        self._worked_at = 0.0
        self._begun_s = 0.0
        """Worked since a prompt was last done."""
        self._done_s = 0.0
        """Expected of prompts that were done in this loop."""
        self._lesson = (0.0, 0.0)
        """Worked and expected seconds up to the prompt that was last done, since the last report."""

    @property
    def slowness(self) -> float:
        """What prompts of late took over what they should have taken."""
        return 1.0 / self._pace.rate

    def ran(self, now: float, worked_s: float, *, busy: bool, alone: bool, ahead: bool = False) -> None:
        """One loop of the scheduler ended at `now` (seconds, monotonic).

        worked_s  time that prefill has worked since it began, on a clock that stands while the executor has its core
        busy      the time since the last call went into prompts
        alone     and nothing else used the device
        ahead     it went into a batch after the one whose prompts were done in it
        """
        spent_s = 0.0
        if self._looped_at is not None and busy:
            spent_s = min(max(worked_s - self._worked_at, 0.0), max(now - self._looped_at, 0.0))
        self._begun_s += 0.0 if ahead else spent_s
        if self._done_s > 0.0:
            self._lesson = (self._lesson[0] + self._begun_s, self._lesson[1] + self._done_s)
            self._begun_s = self._done_s = 0.0
        self._begun_s += spent_s if ahead else 0.0
        if not alone:
            self._begun_s, self._lesson = 0.0, (0.0, 0.0)
        self._looped_at, self._worked_at = now, worked_s

    def computed(self, new_tokens: int, cached_tokens: int) -> float:
        """A prompt was done in this loop, whose `ran` follows. Returns what it takes on the device alone, seconds."""
        expected_s = self._expected_s(new_tokens, cached_tokens)
        self._computed_s += expected_s
        self._fresh += FRESH_WEIGHT * (new_tokens / max(new_tokens + cached_tokens, 1) - self._fresh)
        self._done_s += expected_s
        return self.slowness * expected_s

    def report(self, now: float, *, begun: Iterable[tuple[int, int]], waiting: Iterable[int]) -> None:
        """begun: (new tokens, cached tokens) of prompts that are being computed; waiting: lengths of those that are to
        be; how much of them is cached is taken to be as with others of late."""
        self._learn()
        waiting_s = sum(self._expected_s(*self._parts(length)) for length in waiting)
        arrived_s = self._computed_s + waiting_s + sum(self._expected_s(*parts) for parts in begun)
        came_s, wait_s = self.slowness * (arrived_s - self._arrived_s), self.slowness * waiting_s
        self._arrived_s = arrived_s
        self._arrived.add(now, came_s)
        self._arrived_lasting.add(now, came_s)
        self.load, self.lasting_load = self._arrived.load(now, wait_s), self._arrived_lasting.load(now, wait_s)

    def _parts(self, length: int) -> tuple[int, int]:
        new = min(max(math.ceil(self._fresh * length), 1), length)
        return new, length - new

    def _learn(self) -> None:
        worked_s, expected_s = self._lesson
        worked_s = min(worked_s, LEAP * self.slowness * expected_s)
        self._pace = self._pace.add(expected_s, worked_s, math.exp(-worked_s / LEARN_S))
        self._lesson = (0.0, 0.0)
