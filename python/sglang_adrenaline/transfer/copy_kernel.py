"""The one kernel of the transfer engine: copies many pieces of memory, at the same places of many layers.

A copy is bases x pieces: for each (src base, dst base) and each (src offset, dst offset, bytes) one range. KV slots of
all layers are 2 * layers bases and one piece per run of slots, so that the table stays small; a list of plain ranges
is one base (0, 0). Addresses are those of the local device's view; the host checks them (`regions.py`), not the kernel.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

BLOCK_BYTES = 4096
"""Longest piece in the kernel's table (`split`)."""
WORD_BYTES = 16
"""Addresses and lengths of a wide copy are multiples of it."""
PROGRAMS = 512
"""Thread blocks of a launch: enough loads in flight for NVLink, while every SM keeps most of its room for others."""


@triton.jit(do_not_specialize=["num_bases", "num_pieces"])
def copy_pieces_kernel(bases, pieces, num_bases, num_pieces, wide: tl.constexpr, block: tl.constexpr):
    """bases: int64 [num_bases, 2]; pieces: int64 [num_pieces, 3]; a program takes every PROGRAMS-th pair of both.

    wide: elements of 8 bytes, a thread moves 16 at a time; else bytes. block: elements in BLOCK_BYTES.
    """
    lane = tl.arange(0, block)
    for item in range(tl.program_id(0), num_bases * num_pieces, tl.num_programs(0)):
        base = item // num_pieces
        piece = item % num_pieces
        src = tl.load(bases + 2 * base) + tl.load(pieces + 3 * piece)
        dst = tl.load(bases + 2 * base + 1) + tl.load(pieces + 3 * piece + 1)
        count = tl.load(pieces + 3 * piece + 2)
        if wide:
            count = tl.multiple_of(count // 8, 2)
            src_elements = tl.multiple_of(src.to(tl.pointer_type(tl.int64)), 16)
            dst_elements = tl.multiple_of(dst.to(tl.pointer_type(tl.int64)), 16)
        else:
            src_elements = src.to(tl.pointer_type(tl.int8))
            dst_elements = dst.to(tl.pointer_type(tl.int8))
        mask = lane < count
        tl.store(dst_elements + lane, tl.load(src_elements + lane, mask=mask), mask=mask)


def launch_arguments(wide: bool) -> dict[str, int | bool]:
    return {"wide": wide, "block": BLOCK_BYTES // 8 if wide else BLOCK_BYTES, "num_warps": 4}


def is_wide(bases: np.ndarray, pieces: np.ndarray) -> bool:
    """Whether every address and length is a multiple of WORD_BYTES; then the fast kernel may copy it."""
    return not ((bases % WORD_BYTES).any() or (pieces % WORD_BYTES).any())


def split(pieces: np.ndarray) -> np.ndarray:
    """int64 [n, 3] of (src, dst, bytes) as int64 [m, 3] of pieces up to BLOCK_BYTES; those of 0 bytes vanish."""
    blocks = -(-pieces[:, 2] // BLOCK_BYTES)
    owner = np.repeat(np.arange(len(pieces)), blocks)
    first = np.cumsum(blocks) - blocks
    at = (np.arange(len(owner)) - first[owner]) * BLOCK_BYTES
    result = np.empty((len(owner), 3), dtype=np.int64)
    result[:, 0] = pieces[owner, 0] + at
    result[:, 1] = pieces[owner, 1] + at
    result[:, 2] = np.minimum(pieces[owner, 2] - at, BLOCK_BYTES)
    return result


def runs(src_slots: np.ndarray, dst_slots: np.ndarray, item_bytes: int) -> np.ndarray:
    """Pieces [n, 3] of slots that are copied pairwise: one for each run in which both sides count up by one."""
    if not len(src_slots):
        return np.empty((0, 3), dtype=np.int64)
    breaks = np.flatnonzero((np.diff(src_slots) != 1) | (np.diff(dst_slots) != 1)) + 1
    first = np.concatenate(([0], breaks))
    lengths = np.diff(np.append(first, len(src_slots)))
    return np.stack([src_slots[first], dst_slots[first], lengths], axis=1) * item_bytes
