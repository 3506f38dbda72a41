"""Runs `copy_kernel` for the sending side: a stream, a table in pinned and device memory, a bounded wait.

Everything that could make CUDA wait for the whole device (allocation, loading the kernels) happens in the constructor:
later, kernels of the attention executor may be waiting for decode on the same GPU.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from sglang_adrenaline.errors import ConfigError
from sglang_adrenaline.transfer.copy_kernel import PROGRAMS, copy_pieces_kernel, is_wide, launch_arguments, split

MAX_BASES = 1024
MAX_PIECES = 1 << 17
"""Of one launch; more take several. Their product stays below 2**31, in which the kernel counts."""

_TABLE_WORDS = 2 * MAX_BASES + 3 * MAX_PIECES
_WARM_UP_S = 600.0  # the first start on a machine compiles
_FIRST_NAP_S, _LONGEST_NAP_S = 20e-6, 200e-6


class Copier:
    """Copies between addresses of `device`'s view. One caller at a time."""

    def __init__(self, device: int) -> None:
        """Compiles and tries the kernels. Raises ConfigError if they do not copy."""
        self.device = device
        with torch.cuda.device(device):
            # Ahead of a prompt's kernels: a transfer is short, and decode waits for it.
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._host = torch.empty(_TABLE_WORDS, dtype=torch.int64, pin_memory=True)
            self._table = torch.empty(_TABLE_WORDS, dtype=torch.int64, device=device)
            self._uploaded, self._done = torch.cuda.Event(), torch.cuda.Event()
            self._words = self._host.numpy()
            torch.cuda.current_stream(device).synchronize()  # the table's memory may have had users before
            self._try_out()

    def copy(self, bases: np.ndarray, pieces: np.ndarray, timeout_s: float) -> None:
        """For each base (src, dst) and piece (src offset, dst offset, bytes) copy one range; wait until all are there.

        bases, pieces: int64 [n, 2] and [m, 3], addresses checked by the caller. Raises TimeoutError, RuntimeError
        (CUDA); after a TimeoutError the copy may still be going on, see `idle`.
        """
        deadline = time.monotonic() + timeout_s
        pieces = split(pieces)
        wide = is_wide(bases, pieces)
        self._wait(self._done, deadline)  # of a copy that was given up
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            try:
                for base in range(0, len(bases), MAX_BASES):
                    for piece in range(0, len(pieces), MAX_PIECES):
                        self._wait(self._uploaded, deadline)
                        self._launch(bases[base : base + MAX_BASES], pieces[piece : piece + MAX_PIECES], wide)
            finally:
                self._done.record(self._stream)
                self._wait(self._done, deadline)

    def idle(self) -> bool:
        """Whether no copy is going on. True, too, on a GPU that has failed: nothing runs there any more."""
        try:
            return self._done.query()
        except RuntimeError:
            return True

    def _launch(self, bases: np.ndarray, pieces: np.ndarray, wide: bool) -> None:
        words = bases.size + pieces.size
        self._words[: bases.size] = bases.ravel()
        self._words[bases.size : words] = pieces.ravel()
        self._table[:words].copy_(self._host[:words], non_blocking=True)
        self._uploaded.record(self._stream)
        grid = (min(PROGRAMS, len(bases) * len(pieces)),)
        copy_pieces_kernel[grid](
            self._table, self._table[bases.size :], len(bases), len(pieces), **launch_arguments(wide)
        )

    @staticmethod
    def _wait(event: torch.cuda.Event, deadline: float) -> None:
        nap = _FIRST_NAP_S
        while not event.query():
            if time.monotonic() > deadline:
                raise TimeoutError("the GPU did not finish the copy in time")
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)

    def _try_out(self) -> None:
        """Copy with both kernels, through pieces of several blocks, and look at what came."""
        source = torch.arange(3 * 8192, device=self.device).to(torch.uint8)
        for odd in (0, 1):
            target = torch.zeros_like(source)
            torch.cuda.current_stream(self.device).synchronize()
            bases = np.array([[source.data_ptr(), target.data_ptr()]], dtype=np.int64)
            pieces = np.array([[odd, odd, 8192], [8192 + odd, 8192 + odd, 2 * 8192 - 16 - odd]], dtype=np.int64)
            self.copy(bases, pieces, _WARM_UP_S)
            end = source.numel() - 16
            if not torch.equal(target[odd:end], source[odd:end]) or target[end:].any():
                raise ConfigError(f"transfer backend 'local' cannot copy on GPU {self.device}: wrong bytes came")
