"""How prefill's scheduler leaves the GPU to the attention executor, a thread of the same process.

Two things matter. Where batches run: while prefixes are kept for decode, prefill's kernels stay off the executor's SMs
(`sm_partition.py`); else they have all of them. And how the scheduler waits for the device: while one thread blocks in
a copy to ordinary memory, CUDA lets no other thread launch anything in the process (docs/gpu-results.md, "Launches that
waited"). SGLang makes such copies (`.cpu()`) for each prompt that is done, on a stream that it has ordered behind the
batch that runs next, so the executor would stand still for the length of a batch. Therefore the scheduler first waits
for that stream by polling, after which the copies do not block.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from sglang_adrenaline import compat
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.prefill.sm_partition import SmPartition

logger = logging.getLogger(__name__)

AUTO_SHARE = 0.36
"""Of the SMs, for the executor: on an H100 they read memory with 0.9 of the bandwidth of all (`profile_data.py`)."""
WAIT_S = 60.0
"""Longest polite wait; then SGLang's own waits follow."""
_NAP_S = 100e-6


class GpuSharing:
    """One a prefill scheduler on a GPU. Scheduler thread; streams are the current device's."""

    def __init__(self, scheduler: Any, device: int, executor_sms: int | None) -> None:
        """executor_sms: 0 = prefill always uses all; None = AUTO_SHARE of them. Raises ConfigError."""
        self._scheduler = scheduler
        self._everything = compat.forward_stream(scheduler)
        self._rest: torch.cuda.Stream | None = None
        self.executor_share = 0.0
        """Of the SMs, left alone by prefill while there are prefixes to attend to; 0 = none."""
        overlaps = compat.overlaps(scheduler)
        if executor_sms is None:
            sms = torch.cuda.get_device_properties(device).multi_processor_count
            executor_sms = int(AUTO_SHARE * sms) if overlaps else 0
        if not executor_sms:
            return
        if not overlaps:
            raise ConfigError("--adrenaline-executor-sms needs the overlap schedule (not --disable-overlap-schedule)")
        partition = SmPartition(device, executor_sms)
        self._rest = partition.prefill_stream()
        self.executor_share = partition.executor_sms / (partition.executor_sms + partition.prefill_sms)
        logger.info(
            "while prefixes are offloaded prefill runs on %d SMs and leaves %d to the attention executor",
            partition.prefill_sms,
            partition.executor_sms,
        )

    def place_batch(self, executor_works: bool) -> None:
        """Before a batch is launched: choose the SMs that it may use."""
        if self._rest is not None:
            compat.use_forward_stream(self._scheduler, self._rest if executor_works else self._everything)

    def await_stream(self) -> None:
        """Before a batch's results are processed: wait until the scheduler's stream has caught up."""
        caught_up = torch.cuda.Event()
        caught_up.record()
        deadline = time.monotonic() + WAIT_S
        while not caught_up.query() and time.monotonic() < deadline:
            time.sleep(_NAP_S)
