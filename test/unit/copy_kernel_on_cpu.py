"""Run with TRITON_INTERPRET=1: the transfer engine's copy kernel on CPU memory, against plain NumPy."""

from __future__ import annotations

import numpy as np
import torch

from sglang_adrenaline.transfer import copy_kernel
from sglang_adrenaline.transfer.copy_kernel import BLOCK_BYTES

SIZE = 40 * BLOCK_BYTES


def run(bases: np.ndarray, pieces: np.ndarray) -> bool:
    """Copy as `Copier` does; whether the wide kernel was used."""
    wide, pieces = copy_kernel.is_wide(bases, pieces), copy_kernel.split(pieces)
    assert (pieces[:, 2] <= BLOCK_BYTES).all() and (pieces[:, 2] > 0).all()
    tables = torch.from_numpy(bases.ravel().copy()), torch.from_numpy(pieces.ravel().copy())
    grid = (min(7, len(bases) * len(pieces)),)
    copy_kernel.copy_pieces_kernel[grid](*tables, len(bases), len(pieces), **copy_kernel.launch_arguments(wide))
    return wide


def aligned_bytes(random: np.random.Generator | None) -> torch.Tensor:
    """SIZE bytes at a multiple of 16: random ones, or zeros."""
    store = torch.zeros(SIZE + 64, dtype=torch.uint8)
    view = store[-store.data_ptr() % 64 :][:SIZE]
    if random is not None:
        view.copy_(torch.from_numpy(random.integers(1, 256, SIZE, dtype=np.uint8)))
    return view


def check_ranges(random: np.random.Generator, unit: int) -> None:
    source, target, expected = aligned_bytes(random), aligned_bytes(None), np.zeros(SIZE, dtype=np.uint8)
    places = random.permutation(SIZE // (3 * BLOCK_BYTES))
    sizes = [unit, BLOCK_BYTES, BLOCK_BYTES + unit, 2 * BLOCK_BYTES, 3 * BLOCK_BYTES - unit, 0]
    pieces = []
    for place, size in zip(places, sizes, strict=False):
        src, dst = int(random.integers(0, (SIZE - size) // unit)) * unit, int(place) * 3 * BLOCK_BYTES
        dst += unit if size <= 3 * BLOCK_BYTES - unit else 0
        expected[dst : dst + size] = source.numpy()[src : src + size]
        pieces.append((source.data_ptr() + src, target.data_ptr() + dst, size))
    assert run(np.zeros((1, 2), dtype=np.int64), np.array(pieces, dtype=np.int64)) == (unit == 16)
    assert np.array_equal(target.numpy(), expected)


def check_slots(random: np.random.Generator, item: int, src_slots: np.ndarray, dst_slots: np.ndarray) -> int:
    """Copy slots of three layers; the number of pieces they became."""
    layers = 3
    buffers = [(aligned_bytes(random), aligned_bytes(None)) for _ in range(layers)]
    pieces = copy_kernel.runs(src_slots, dst_slots, item)
    run(np.array([[src.data_ptr(), dst.data_ptr()] for src, dst in buffers], dtype=np.int64), pieces)
    for src, dst in buffers:
        expected = np.zeros(SIZE, dtype=np.uint8)
        for a, b in zip(src_slots.tolist(), dst_slots.tolist(), strict=True):
            expected[b * item : (b + 1) * item] = src.numpy()[a * item : (a + 1) * item]
        assert np.array_equal(dst.numpy(), expected)
    return len(pieces)


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    for unit in (16, 1, 3):
        check_ranges(generator, unit)
    for item in (16, 240, 2048):
        slots = min(SIZE // item, 60)
        check_slots(generator, item, generator.permutation(slots)[:40], generator.permutation(slots)[:40])
        assert check_slots(generator, item, np.arange(5, 45), np.arange(40)) == 1
        assert check_slots(generator, item, np.array([3, 4, 5, 9, 10]), np.array([1, 2, 8, 9, 10])) == 3
    assert copy_kernel.runs(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 64).shape == (0, 3)
