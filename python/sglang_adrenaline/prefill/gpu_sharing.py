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
from typing import Any

import torch

from sglang_adrenaline import compat
from sglang_adrenaline.cuda_wait import await_event
from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.prefill.sm_partition import SmPartition

logger = logging.getLogger(__name__)

AUTO_SHARES = (0.12, 0.24, 0.36, 0.48, 0.6)
"""Of the SMs, among which `auto` chooses for the executor. PyTorch keeps memory for each stream that was used, so there
are few."""
WHOLE = 0.0
WAIT_S = 60.0
"""Longest polite wait; then SGLang's own waits follow."""
_NAP_S = 100e-6


class GpuSharing:
    """One a prefill scheduler on a GPU. Scheduler thread; streams are the current device's."""

    def __init__(self, scheduler: Any, device: int, executor_sms: int | None) -> None:
        """executor_sms: of these SMs prefill may stay off, 0 = prefill always uses all; None = AUTO_SHARES.

        Raises ConfigError.
        """
        self._scheduler = scheduler
        self._streams = {WHOLE: compat.forward_stream(scheduler)}
        """By the executor's share of the SMs."""
        total = torch.cuda.get_device_properties(device).multi_processor_count
        counts = [executor_sms] if executor_sms is not None else [int(share * total) for share in AUTO_SHARES]
        if not compat.overlaps(scheduler):
            if executor_sms:
                raise ConfigError("--adrenaline-executor-sms needs the overlap schedule")
            return
        for count in filter(None, counts):
            try:
                partition = SmPartition(device, count)
            except ConfigError as error:  # as where NVIDIA MPS has set SMs apart for each process
                if executor_sms is not None:
                    raise
                logger.warning("prefill and the attention executor share all SMs: %s", error)
                break
            self._streams[partition.executor_sms / total] = partition.prefill_stream()
        if self.shares:
            sms = ", ".join(str(round(share * total)) for share in self.shares)
            logger.info(
                "while prefixes are offloaded prefill leaves %s of %d SMs to the attention executor", sms, total
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """What `place_batch` can leave to the executor, WHOLE excepted."""
        return tuple(share for share in self._streams if share != WHOLE)

    def place_batch(self, executor_share: float) -> None:
        """Before a batch is launched: keep it off so much of the SMs, one of `shares`, or let it use all (WHOLE)."""
        compat.use_forward_stream(self._scheduler, self._streams[executor_share])

    def await_stream(self) -> None:
        """Before a batch's results are processed: wait until the scheduler's stream has caught up."""
        caught_up = torch.cuda.Event()
        caught_up.record()
        await_event(caught_up, WAIT_S, _NAP_S)
