"""Workloads of the comparison, written as `KIND key=value ...` on the command line.

    saturated in=512 out=512 concurrency=400 seconds=60     so many requests open at any time, for so long
    burst     in=512 out=512 requests=400                   all at once
    rate      in=512 out=512 rate=8 requests=200            Poisson arrivals, open loop
    single    in=8192 out=128 requests=4                    one after the other, on an idle machine

Further keys: `rate` (of saturated: they open at so many a second, at random times; default all at once), `ratio` (ours
only: share of prompts offloaded, set by the client for each request instead of by the server), `stream` (tokens an
event; default 1), `spread` (prompts' lengths are lognormal with mean `in` and this sigma, at most 8 times the mean;
default 0: all alike), `name`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

Kind = Literal["saturated", "burst", "rate", "single"]

_KEYS = {"in": "input_len", "out": "output_len"}
_NEEDS = {
    "saturated": ("concurrency", "seconds"),
    "burst": ("requests",),
    "rate": ("rate", "requests"),
    "single": ("requests",),
}


class WorkloadError(ValueError):
    """The text is no workload; says which word is wrong."""


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, times in seconds, rate in requests a second."""

    kind: Kind
    input_len: int = 512
    output_len: int = 512
    requests: int = 0
    rate: float = 0.0
    concurrency: int = 0
    seconds: float = 0.0
    ratio: float | None = None
    stream: int = 1
    spread: float = 0.0
    name: str = ""

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        load = {
            "saturated": f"{self.concurrency} open" + (f" from {self.rate:g}/s" if self.rate else ""),
            "burst": f"{self.requests} at once",
            "rate": f"{self.rate:g}/s",
            "single": "one by one",
        }[self.kind]
        ratio = f", ratio {self.ratio:g}" if self.ratio is not None else ""
        spread = f"~{self.spread:g}" if self.spread else ""
        return f"{self.input_len}{spread}/{self.output_len} {load}{ratio}"

    @staticmethod
    def parse(text: str) -> Workload:
        """Raises WorkloadError."""
        kind, *words = text.split() or [""]
        if kind not in get_args(Kind):
            raise WorkloadError(f"{text!r}: a workload begins with one of {', '.join(get_args(Kind))}")
        types = {field.name: str(field.type) for field in fields(Workload) if field.name != "kind"}
        values: dict[str, int | float | str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            name = _KEYS.get(key, key)
            if not equals or name not in types:
                raise WorkloadError(f"{text!r}: {word!r} is not key=value with a known key")
            convert = {"int": int, "str": str}.get(types[name], float)
            try:
                values[name] = convert(value)
            except ValueError:
                raise WorkloadError(f"{text!r}: {word!r}: not a number") from None
        workload = Workload(kind, **values)  # type: ignore[arg-type]
        workload._check(text)
        return workload

    def _check(self, text: str) -> None:
        for name in (*_NEEDS[self.kind], "input_len", "output_len", "stream"):
            if not getattr(self, name) > 0:
                raise WorkloadError(f"{text!r}: {name} must be given and above 0")
        if self.spread < 0:
            raise WorkloadError(f"{text!r}: spread must not be below 0")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise WorkloadError(f"{text!r}: ratio must be in 0..1")
