"""Two passes of a model that take turns: each runs until it hands over, then the other one goes on.

For CUDA graphs in which the kernels of two halves of a batch alternate on one stream: what is captured is the order in
which the passes launch. Never both at a time; the second pass has a thread of its own for as long as it lasts.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

WAIT_S = 600.0
"""Longest turn. The first one of a process compiles kernels."""

T = TypeVar("T")
HandOver = Callable[[], None]


class OtherPassError(RuntimeError):
    """The other pass has failed; its error is the one to look at."""


class _Turns:
    def __init__(self) -> None:
        self._may_run = (threading.Semaphore(0), threading.Semaphore(0))
        self._over = [False, False]
        self.failed = False

    def hand_over(self, me: int) -> None:
        if not self._over[1 - me]:
            self._may_run[1 - me].release()
            self.await_turn(me)

    def await_turn(self, me: int) -> None:
        if not self._may_run[me].acquire(timeout=WAIT_S):
            self.failed = True
            raise TimeoutError(f"the other pass did not hand over within {WAIT_S:g} s")
        if self.failed:
            raise OtherPassError("the other pass has failed")

    def over(self, me: int) -> None:
        self._over[me] = True
        self._may_run[1 - me].release()


def take_turns(first: Callable[[HandOver], T], second: Callable[[HandOver], T]) -> tuple[T, T]:
    """Run both to their ends, `first` in this thread and ahead; each gets the function by which it hands over.

    `second` runs in a copy of this thread's context. Once a pass is over the other one goes on alone; once one raises,
    the other does at its next turn, and the first error is raised here.
    """
    turns = _Turns()
    context = contextvars.copy_context()
    results: list[T] = []
    errors: list[BaseException] = []

    def run_second() -> None:
        try:
            turns.await_turn(1)
            results.append(context.run(second, lambda: turns.hand_over(1)))
        except BaseException as error:
            turns.failed = True
            errors.append(error)
        finally:
            turns.over(1)

    thread = threading.Thread(target=run_second, name="second-half", daemon=True)
    thread.start()
    try:
        result = first(lambda: turns.hand_over(0))
    except BaseException as error:
        turns.failed = True
        errors.append(error)
    finally:
        turns.over(0)
        thread.join(WAIT_S)
    if errors:
        raise next((error for error in errors if not isinstance(error, OtherPassError)), errors[0])
    return result, results[0]
