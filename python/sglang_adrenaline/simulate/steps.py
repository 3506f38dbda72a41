"""Closed forms for a run of decode steps during which the batch does not change.

Step j = 0, 1, ... of a run takes fixed + max((local + j * rows) * a, remote): each of the `rows` requests adds a token
to the `local` ones at every step, `a` is the time of a token, `remote` the slowest prefill instance's time.
"""

from __future__ import annotations

import math


def run_time(steps: int, rows: int, local: float, a: float, remote: float, fixed: float) -> tuple[float, float]:
    """(seconds of the first `steps` steps, seconds of them in which local attention had to wait for remote)."""
    hidden_from = _crossing(rows, local, a, remote)
    waiting = min(steps, hidden_from)
    total_local = a * (steps * local + rows * steps * (steps - 1) / 2)
    exposed = waiting * remote - a * (waiting * local + rows * waiting * (waiting - 1) / 2) if waiting else 0.0
    return steps * fixed + total_local + exposed, exposed


def steps_until(seconds: float, rows: int, local: float, a: float, remote: float, fixed: float) -> int:
    """The smallest number of steps >= 1 that take at least `seconds`."""
    if seconds <= 0.0:
        return 1
    hidden_from = _crossing(rows, local, a, remote)
    constant = fixed + remote
    if hidden_from and constant * hidden_from >= seconds:
        return max(math.ceil(seconds / constant), 1)
    left, begin = seconds - constant * hidden_from, local + rows * hidden_from
    # left = n * (fixed + a * begin) + a * rows * n * (n - 1) / 2
    square, linear = a * rows / 2, fixed + a * begin - a * rows / 2
    if square > 0.0:
        steps = 2 * left / (linear + math.sqrt(linear * linear + 4 * square * left))
    else:
        steps = left / linear
    return max(hidden_from + math.ceil(steps - 1e-9), 1)


def _crossing(rows: int, local: float, a: float, remote: float) -> int:
    """The first step whose local attention takes as long as the remote one."""
    if remote <= local * a:
        return 0
    return math.ceil((remote / a - local) / rows)
