"""Pieces of the commands' argument parsing: errors of one line, checked numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from sglang_adrenaline.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad command line as ConfigError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def number(low: float, high: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    """A parser of numbers in low..high, for `type=`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not low <= value <= high or math.isnan(value):
            raise argparse.ArgumentTypeError(f"{text} is not in {low:g}..{high:g}")
        return value

    return parse


def count(high: int = 10_000_000) -> Callable[[str], float]:
    """A parser of whole numbers in 1..high."""
    return number(1, high, int)


def require_matplotlib() -> None:
    """Raises ConfigError where plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from None
