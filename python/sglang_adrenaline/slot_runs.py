"""Which free slots of a KV pool a prompt gets: neighbours, since attention on a CPU reads runs of slots in place.

Slots that have to be gathered first cost attention twice the time. SGLang hands out the lowest free slots, so in a pool
that has been full once prompts lie in pieces between the single slots of running answers. Here a prompt gets the
smallest run of free slots that holds it, and answers, which take a slot at a time, use up the shortest runs first.
"""

from __future__ import annotations

import numpy as np

RUN_TOKENS = 192
"""From here on a request for slots is a prompt's. Shorter ones are gathered anyway: `attention/ragged.py`."""


def shortest_first(free: np.ndarray) -> np.ndarray:
    """Free slots, int64 and in any order: whole runs, the shorter before the longer."""
    free, starts, lens = _runs(free)
    return _joined(free, starts, lens, np.argsort(lens, kind="stable"))


def take(free: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(`count` of these slots, ascending; the others, in the order of `shortest_first`).

    From the smallest run that holds them all, else the longest run whole and what is missing from short ones. Raises
    ValueError if there are fewer.
    """
    if not 0 < count <= len(free):
        raise ValueError(f"{count} of {len(free)} free slots")
    free, starts, lens = _runs(free)
    order = np.argsort(lens, kind="stable")
    fit = int(np.searchsorted(lens[order], count))
    if fit == len(order):  # none holds them all
        joined = _joined(free, starts, lens, np.concatenate((order[-1:], order[:-1])))
        return np.sort(joined[:count]), shortest_first(joined[count:])
    run = order[fit]
    begin, end = starts[run], starts[run] + count
    return free[begin:end], shortest_first(np.concatenate((free[:begin], free[end:])))


def _runs(free: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slots ascending, where runs start in them, their lengths)."""
    free = np.sort(free, kind="stable")  # fast where much is sorted already
    starts = np.flatnonzero(np.diff(free, prepend=-2) != 1)
    return free, starts, np.diff(starts, append=len(free))


def _joined(free: np.ndarray, starts: np.ndarray, lens: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The runs one after the other in that order."""
    lens = lens[order]
    first = np.cumsum(lens) - lens
    return free[np.arange(len(free)) + np.repeat(starts[order] - first, lens)]
