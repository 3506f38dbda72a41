"""The attention executor: answers decode's queries with attention over pinned prefixes of prefill's KV pool.

One executor serves one channel, that is one decode rank. `AttentionExecutor` is what the prefill side needs of any of
them; `ThreadExecutor` computes with PyTorch in a thread of the prefill scheduler's process and so reads the pool in
place. Prefixes never change, so work is planned only when the set of lanes in a step changes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_adrenaline.attention.ragged import RaggedPlan, attend
from sglang_adrenaline.attention.shared_runs import SharedRuns, Slots
from sglang_adrenaline.channel.base import Call, ExecutorEnd
from sglang_adrenaline.errors import ChannelError

logger = logging.getLogger(__name__)

POLL_S = 0.5


@dataclass(frozen=True)
class LayerKV:
    """One layer of the pool, in place: k, v [num_slots, num_kv_heads, head_dim]; scale and cap of its scores."""

    k: torch.Tensor
    v: torch.Tensor
    sm_scale: float
    logit_cap: float


class AttentionExecutor(Protocol):
    def attach(self, lane: int, slots: torch.Tensor, on_host: Slots) -> None:
        """From now on `lane` attends over `slots` (int64 [remote_prefix_len]); `on_host` is a copy that stays."""

    def detach(self, lane: int) -> None:
        """Forget the lane; when this returns its slots are not read any more."""

    @property
    def steps_done(self) -> int:
        """The last decode step whose final layer was answered."""

    @property
    def plans(self) -> int:
        """How often work was planned."""

    @property
    def launch_lag_s(self) -> float:
        """Mean time from decode's announcement of a step to the launch of its work; 0 where nothing is launched."""

    @property
    def late_launches(self) -> int:
        """Launches so long after the announcement that decode may have waited for them."""

    @property
    def waited_s(self) -> float:
        """Time spent waiting for the queries of a step that had begun."""

    @property
    def busy_s(self) -> float:
        """Time from the arrival of queries to their answers, over all layers so far; 0.0 where it is not measured."""

    @property
    def worked_s(self) -> float:
        """What it has taken of the device, on a clock that stands while others have it; 0.0 where there is none."""

    @property
    def read_tokens(self) -> int:
        """Prefix tokens that steps attended to in that time, not once a layer; what lanes of a step share, once."""

    def stop(self, reason: str) -> None:
        """End the executor; when this returns no KV is read any more."""


class ThreadExecutor:
    """PyTorch on the CPU. attach/detach/stop come from the scheduler thread or the control thread."""

    def __init__(
        self, end: ExecutorEnd, layers: Sequence[LayerKV], name: str, on_failure: Callable[[str], None]
    ) -> None:
        self._end = end
        self._layers = layers
        self._on_failure = on_failure
        self._lock = threading.Lock()  # held while a layer is computed: detach() must outlast a running read
        self._slots: dict[int, torch.Tensor] = {}
        self._shared = SharedRuns()
        self._plan_lanes: tuple[int, ...] | None = None
        self._plan: RaggedPlan | None = None
        self._plan_tokens = 0
        self._plans = 0
        self._waited_s = self._busy_s = self._worked_s = 0.0
        self._read_tokens = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"attention-executor-{name}", daemon=True)
        self._thread.start()

    def attach(self, lane: int, slots: torch.Tensor, on_host: Slots) -> None:
        with self._lock:
            self._slots[lane] = slots
            self._shared.add(lane, on_host)
            self._plan_lanes = None

    def detach(self, lane: int) -> None:
        with self._lock:
            self._slots.pop(lane, None)
            self._shared.discard(lane)
            self._plan_lanes = None

    @property
    def steps_done(self) -> int:
        return self._end.steps_done

    @property
    def plans(self) -> int:
        return self._plans

    @property
    def launch_lag_s(self) -> float:
        return 0.0

    @property
    def late_launches(self) -> int:
        return 0

    @property
    def waited_s(self) -> float:
        return self._waited_s

    @property
    def busy_s(self) -> float:
        return self._busy_s

    @property
    def worked_s(self) -> float:
        return self._worked_s

    @property
    def read_tokens(self) -> int:
        return self._read_tokens

    def stop(self, reason: str) -> None:
        self._stopping = True
        self._end.abort(reason)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)
            if self._thread.is_alive():
                logger.error("attention executor %s did not stop within 5 s", self._thread.name)
                return
        self._end.close()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while not self._stopping:
                    begun = time.monotonic()
                    call = self._end.wait_call(POLL_S)
                    if call is not None:
                        called = time.monotonic()
                        if call.layer > 0:
                            self._waited_s += called - begun
                        self._answer(call)
                        self._busy_s += time.monotonic() - called
                        self._worked_s = time.thread_time()
                        if call.layer == len(self._layers) - 1:
                            self._read_tokens += self._plan_tokens
        except ChannelError as error:
            if not self._stopping:
                self._on_failure(str(error))  # the decode instance may be there still: it gets another channel
        except Exception as error:
            logger.exception("attention executor failed")
            self._end.abort(f"attention executor failed: {error}")
            self._on_failure(f"attention executor failed: {error}")

    def _answer(self, call: Call) -> None:
        layer = self._layers[call.layer]
        with self._lock:
            if self._plan_lanes != call.lanes:
                # A lane that is not attached belongs to a request that ended: it has no prefix, so lse is -inf.
                empty = torch.empty(0, dtype=torch.int64)
                self._plan = RaggedPlan.from_slots([self._slots.get(lane, empty) for lane in call.lanes])
                self._plan_lanes = call.lanes
                self._plan_tokens = self._shared.distinct_tokens(call.lanes)
                self._plans += 1
            plan = self._plan
            assert plan is not None
            o, lse = attend(call.q, layer.k, layer.v, plan, sm_scale=layer.sm_scale, logit_cap=layer.logit_cap)
        self._end.answer(call, o, lse)
