"""A running batch: advanced from change to change, not step by step."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from sglang_adrenaline.simulate.steps import run_time, steps_until
from sglang_adrenaline.simulate.trace import Req


@dataclass(slots=True)
class Batch:
    """Requests that decode together. `time` and `step` are those of the last boundary between steps."""

    token_s: float
    """Time of local attention per token."""
    time: float = 0.0
    step: int = 0
    rows: int = 0
    local: int = 0
    """Tokens attended to here in the next step."""
    planned: int = 0
    """Steps of the run under way; 0 = idle."""
    steps_total: int = 0
    exposed_s: float = 0.0
    busy_s: float = 0.0
    row_steps: int = 0
    _ends: list[tuple[int, int, Req]] = field(default_factory=list)
    _count: int = 0
    _remote: float = 0.0
    _fixed: float = 0.0

    def add(self, request: Req, local_tokens: int) -> None:
        """A request that still has output - produced tokens to go joins at the boundary."""
        self._count += 1
        request.stamp = self.step + request.output - request.produced
        heapq.heappush(self._ends, (request.stamp, self._count, request))
        self.rows += 1
        self.local += local_tokens

    def remove(self, request: Req, local_tokens: int) -> int:
        """Take a request out before its end; returns the tokens it still has to produce."""
        left = request.stamp - self.step
        request.stamp = -1
        self.rows -= 1
        self.local -= local_tokens
        return left

    def pop_finished(self) -> Req | None:
        """A request that is at its end, or None; the caller takes its tokens off `local`."""
        ends = self._ends
        while ends and (ends[0][2].stamp != ends[0][0] or ends[0][0] <= self.step):
            stamp, _, request = heapq.heappop(ends)
            if request.stamp == stamp:
                request.stamp = -1
                self.rows -= 1
                return request
        return None

    def plan(self, most_steps: int, fixed_s: float, remote_s: float) -> float:
        """Begin a run up to the next end, of at most `most_steps` >= 1; returns the time of its last boundary."""
        ends = self._ends
        while ends[0][2].stamp != ends[0][0]:
            heapq.heappop(ends)
        self._fixed, self._remote = fixed_s, remote_s
        self.planned = min(ends[0][0] - self.step, most_steps)
        return self.time + self._run(self.planned)[0]

    def cut(self, now: float) -> float | None:
        """End the run at the first boundary at or after `now`; that boundary's time, None if it ends no earlier."""
        steps = steps_until(now - self.time, self.rows, self.local, self.token_s, self._remote, self._fixed)
        if steps >= self.planned:
            return None
        self.planned = steps
        return self.time + self._run(steps)[0]

    def finish_run(self) -> int:
        """Carry out the planned steps; returns their number."""
        steps = self.planned
        if steps:
            seconds, exposed = self._run(steps)
            self.time += seconds
            self.step += steps
            self.local += steps * self.rows
            self.steps_total += steps
            self.row_steps += steps * self.rows
            self.exposed_s += exposed
            self.busy_s += seconds
            self.planned = 0
        return steps

    def step_s(self) -> float:
        """Time of the next step as it was last planned."""
        return self._fixed + max(self.local * self.token_s, self._remote)

    def _run(self, steps: int) -> tuple[float, float]:
        return run_time(steps, self.rows, self.local, self.token_s, self._remote, self._fixed)
