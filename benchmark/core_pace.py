"""How fast cores are while something runs on them: a virtual machine's are slower while others use the host.

    with CorePace(cores) as pace:
        ...
        pace.slowness({0}, begin, end)

A thread on each core does the same small piece of work a few times a second and asks its own clock what it took: that
one stands while another thread has the core, so what is measured is the core, not who else uses it. Under 1 % of it.
`at_even_pace` takes what that explains out of rates that were measured meanwhile.
"""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

EVERY_S = 0.2
WORK = range(40_000)
"""To be added up: 1 ms or less."""
_END_S = 5.0


class CorePace:
    """`cores`: indices. Times are `time.monotonic()`."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._stop = threading.Event()
        self._at: dict[int, list[float]] = {core: [] for core in cores}
        self._took: dict[int, list[float]] = {core: [] for core in self._at}
        self._threads = [threading.Thread(target=self._sample, args=(core,), daemon=True) for core in self._at]

    def __enter__(self) -> CorePace:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_END_S)

    def slowness(self, cores: Iterable[int], begin: float, end: float) -> float:
        """Mean time of the work on these cores between the two times, over the shortest seen anywhere; 1 or more.

        Raises ValueError where none was sampled in between.
        """
        fastest = min(min(took) for took in self._took.values() if took)
        seen = []
        for core in cores:
            at = self._at[core]
            seen += self._took[core][bisect.bisect_left(at, begin) : bisect.bisect_right(at, end)]
        if not seen:
            raise ValueError(f"nothing was sampled on the cores within {end - begin:.1f} s")
        return fmean(seen) / fastest

    def _sample(self, core: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread
        while not self._stop.wait(EVERY_S):
            begun = time.thread_time()
            sum(WORK)
            took = time.thread_time() - begun
            self._took[core].append(took)
            self._at[core].append(time.monotonic())


def at_even_pace(names: Sequence[str], rates: Sequence[float], slowness: Sequence[Sequence[float]]) -> dict[str, float]:
    """The rate of each name, as if all measurements had met the mean slowness.

    One entry a measurement; `slowness`: of each kind of core. Least squares of log rate = name + sum of exponent * log
    slowness, with the same exponents for all names. Raises ValueError on fewer than two measurements to a parameter.
    """
    groups = list(dict.fromkeys(names))
    logs = np.log(np.asarray(slowness, dtype=float))
    logs -= logs.mean(axis=0)
    terms = np.hstack([np.array([[name == group for group in groups] for name in names], dtype=float), logs])
    if len(rates) < 2 * terms.shape[1]:
        raise ValueError(f"{len(rates)} measurements are too few for {terms.shape[1]} parameters")
    fit, *_ = np.linalg.lstsq(terms, np.log(rates), rcond=None)
    return dict(zip(groups, np.exp(fit[: len(groups)]).tolist(), strict=True))
