"""Where GPU time goes: lets running servers record their kernels, and sums up what a recording holds.

    python benchmark/kernel_trace.py TRACE.json.gz...

SGLang writes the traces (torch's profiler, a file a process). Kernels are summed by stream and name: time on the GPU,
share of the recorded span, and how much of it lay beside kernels of another stream.
"""

from __future__ import annotations

import gzip
import http.client
import json
import sys
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TIMEOUT_S = 30.0
MOST_NAMES = 12
NAME_LENGTH = 90


class Recording:
    """A context manager: `after_s` seconds after its entry every server records `steps` forward passes to `folder`.

    A prefill server, whose passes are long, records a quarter of them.
    """

    def __init__(self, urls: Mapping[str, str], folder: Path, after_s: float, steps: int) -> None:
        self._urls, self._folder, self._after_s, self._steps = dict(urls), folder.resolve(), after_s, steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)

    def __enter__(self) -> Recording:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT_S * len(self._urls) + 5)

    def _run(self) -> None:
        if self._stop.wait(self._after_s):
            return
        for name, url in self._urls.items():
            wish = {
                "output_dir": str(self._folder / name),
                "num_steps": self._steps if name != "prefill" else max(2, self._steps // 4),
                "activities": ["GPU"],
                "record_shapes": False,
                "with_stack": False,
            }
            request = urllib.request.Request(
                f"{url}/start_profile", json.dumps(wish).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                    pass
            except (OSError, http.client.HTTPException) as error:
                print(f"{name} records nothing: {error}", file=sys.stderr, flush=True)


Interval = tuple[float, float]


def report(path: Path) -> str:
    """Table of one trace. Raises OSError or ValueError if it cannot be read."""
    data = path.read_bytes()
    events = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return f"{path.name}: no kernels"
    begin = min(e["ts"] for e in kernels)
    span = max(e["ts"] + e["dur"] for e in kernels) - begin
    streams: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in kernels:
        streams[event["args"].get("stream", "?")].append(event)
    busy = {stream: _union((e["ts"], e["ts"] + e["dur"]) for e in found) for stream, found in streams.items()}
    lines = [f"== {path.name}: {span / 1e3:.1f} ms, {len(kernels)} kernels"]
    for stream, found in sorted(streams.items(), key=lambda item: -_length(busy[item[0]])):
        others = _union(i for name, intervals in busy.items() if name != stream for i in intervals)
        beside = _length(_common(busy[stream], others))
        total = _length(busy[stream])
        share = f"busy {total / 1e3:.2f} ms ({100 * total / span:.0f} %), {beside / 1e3:.2f} ms of it beside others"
        lines.append(f"stream {stream}: {share}")
        sums: dict[str, list[float]] = defaultdict(list)
        for event in found:
            sums[event["name"]].append(event["dur"])
        for name, times in sorted(sums.items(), key=lambda item: -sum(item[1]))[:MOST_NAMES]:
            each = f"{len(times):6d} x {sum(times) / len(times):8.1f} us (at most {max(times):.0f})"
            lines.append(f"  {sum(times) / 1e3:9.2f} ms {each}  {name[:NAME_LENGTH]}")
    return "\n".join(lines)


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted and disjoint."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _common(some: list[Interval], others: list[Interval]) -> list[Interval]:
    """What lies in both; each sorted and disjoint."""
    found, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        begin, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if begin < end:
            found.append((begin, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    worst = 0
    for path in paths:
        try:
            print(report(Path(path)))
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            worst = 1
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
