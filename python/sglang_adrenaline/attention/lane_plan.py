"""How the attention of a step is cut into pieces for `attend_kernel`: words that it reads. NumPy only.

A piece is a part of a run of slots and the lanes that attend to it, as many as fit into the kernel's columns; warps
draw (piece, KV head) tickets. Pieces are small enough for all warps to end together and large enough for their partial
results not to matter.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_adrenaline.attention.shared_runs import Run

WHOLE = -1
"""Row of a member that has the whole answer of its lane: kWhole."""
HEADER_WORDS = 8
TILE = 16
"""Tokens that a warp takes at a time."""

_LEAST_TILES = 8
"""Of a piece that is cut off."""
_PIECE_TILES = 3.0
_PARTIAL_TILES = 0.25
"""What a piece takes besides its tiles, and a query head's partial result, in tiles of a warp."""
_LAST_PIECES = 0.4
"""How much of a usual piece the warps wait for each other at the end.

These three choose best among the cuts that were timed on an H200 (docs/gpu-results.md, "How prompts are cut").
"""


@dataclass(frozen=True)
class KernelShape:
    """What the plan depends on: query heads of a KV head, KV heads, columns of a piece, warps at work at a time."""

    group: int
    kv_heads: int
    columns: int
    warps: int

    @property
    def lanes_of_a_piece(self) -> int:
        return self.columns // self.group

    @property
    def qo_heads(self) -> int:
        return self.group * self.kv_heads


def max_words(lanes: int, rows: int) -> int:
    """Words that a plan for so many lanes may have, with `rows` partial results at most."""
    return HEADER_WORDS + 6 * (rows + lanes) + 4 * lanes + 4


def most_rows(lanes: int) -> int:
    """Partial results that there is room for in an attention over so many lanes."""
    return 4 * lanes + 1024


def within_rows(runs: Sequence[Run], rows: int) -> Sequence[Run]:
    """The runs; or each lane's slots by themselves where they need more partial results than `rows` (a deep tree)."""
    parts = collections.Counter(lane for run in runs for lane in run.lanes)
    if sum(count for count in parts.values() if count > 1) <= rows:
        return runs
    ends: dict[int, int] = {}
    for run in runs:
        ends |= {lane: max(run.end, ends.get(lane, 0)) for lane in run.lanes}
    return [Run((lane,), 0, end) for lane, end in ends.items()]


def make_plan(
    runs: Sequence[Run], shape: KernelShape, max_rows: int, piece_tiles: int | None = None
) -> npt.NDArray[np.int32]:
    """The words of a plan (AttendPlan in attend.cuh) for runs whose slots lie one behind the other.

    `piece_tiles`: most tiles of a piece, for measurements; None: what is estimated to be fastest. No runs: a plan of no
    pieces. Raises ValueError unless `within_rows` has nothing against the runs.
    """
    if not runs:
        return np.array([0, HEADER_WORDS, HEADER_WORDS, 0, HEADER_WORDS, 0, 0, 0], dtype=np.int32)
    most = shape.lanes_of_a_piece
    bundles = [
        (index, run.lanes[at : at + most]) for index, run in enumerate(runs) for at in range(0, len(run.lanes), most)
    ]
    starts = np.zeros(len(runs) + 1, dtype=np.int64)
    np.cumsum([run.end - run.begin for run in runs], out=starts[1:])
    run_of = np.array([index for index, _ in bundles], dtype=np.int64)
    sizes = np.array([len(lanes) for _, lanes in bundles], dtype=np.int64)
    lanes_of = np.array([lane for _, lanes in bundles for lane in lanes], dtype=np.int64)
    tokens = (starts[1:] - starts[:-1])[run_of]
    tiles = -(-tokens // TILE)

    limit = piece_tiles or _piece_tiles(tiles, sizes, shape)
    while True:
        cuts = -(-tiles // limit)
        if _partial_rows(np.repeat(lanes_of, np.repeat(cuts, sizes))) <= max_rows:
            break
        if limit >= tiles.max():
            raise ValueError(f"{len(runs)} runs need more than {max_rows} partial results")
        limit *= 2

    bundle = np.repeat(np.arange(len(bundles)), cuts)
    part = np.arange(len(bundle)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    step = (-(-tiles // cuts) * TILE)[bundle]
    # Longest pieces first. Those of equal slots are neighbours, so that the second one finds them in the cache.
    order = np.lexsort((bundle, part, run_of[bundle], -step))
    bundle, part, step = bundle[order], part[order], step[order]
    counts = sizes[bundle]
    pieces = np.empty((len(bundle), 4), dtype=np.int32)
    pieces[:, 0] = starts[run_of[bundle]] + part * step
    pieces[:, 1] = np.minimum(step, tokens[bundle] - part * step)
    pieces[:, 2] = np.cumsum(counts) - counts
    pieces[:, 3] = counts

    first = (np.cumsum(sizes) - sizes)[bundle]
    within = np.arange(int(counts.sum())) - np.repeat(pieces[:, 2], counts)
    lanes = lanes_of[np.repeat(first, counts) + within]
    rows, merges = _rows(lanes)
    members = np.stack([lanes, rows], axis=1).astype(np.int32)
    members_at = HEADER_WORDS + pieces.size
    merges_at = -(-(members_at + members.size) // 4) * 4
    words = np.zeros(merges_at + merges.size, dtype=np.int32)
    words[:5] = len(pieces), HEADER_WORDS, members_at, len(merges), merges_at
    words[HEADER_WORDS:members_at] = pieces.ravel()
    words[members_at : members_at + members.size] = members.ravel()
    words[merges_at:] = merges.ravel()
    return words


def _piece_tiles(tiles: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], shape: KernelShape) -> int:
    """Most tiles of a piece: what is estimated to end first. `tiles` and `sizes` (its lanes) are of each bundle."""
    mean = int(tiles.sum()) * shape.kv_heads / shape.warps

    def estimate(limit: int) -> float:
        """When the last warp is done, in the time of a tile."""
        cuts = -(-tiles // limit)
        lengths = -(-tiles // cuts)
        of_a_warp = int(cuts.sum()) * shape.kv_heads / shape.warps
        longest, usual = int(lengths.max()), float(np.median(np.repeat(lengths, cuts)))
        products = min(math.ceil(of_a_warp) * longest, max(longest, mean + _LAST_PIECES * usual))
        partial = int((cuts * sizes)[cuts > 1].sum()) * shape.qo_heads / shape.warps
        return products + _PIECE_TILES * max(1.0, of_a_warp) + _PARTIAL_TILES * partial

    limits = [max(math.ceil(mean), _LEAST_TILES)]  # a piece for each warp
    limit = int(tiles.max())
    while limit >= _LEAST_TILES:
        limits.append(limit)
        limit = limit * 3 // 4
    return min(limits, key=estimate)


def _partial_rows(lanes: npt.NDArray[np.int64]) -> int:
    counts = np.bincount(lanes)
    return int(counts[counts > 1].sum())


def _rows(lanes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """By member its row of partial results, those of a lane in a row, or WHOLE; (lane, first row, rows, 0) to merge."""
    counts = np.bincount(lanes)
    partial = np.where(counts > 1, counts, 0)
    begins = np.cumsum(partial) - partial
    order = np.argsort(lanes, kind="stable")
    in_order = lanes[order]
    nth = np.arange(len(lanes)) - (np.cumsum(counts) - counts)[in_order]
    rows = np.empty(len(lanes), dtype=np.int64)
    rows[order] = np.where(counts[in_order] > 1, begins[in_order] + nth, WHOLE)
    merged = np.flatnonzero(partial)
    merges = np.stack([merged, begins[merged], partial[merged], np.zeros_like(merged)], axis=1)
    return rows, merges.astype(np.int32)
