"""Attention of one query per row over ragged parts of a KV pool, on a CPU, with its lse.

`RaggedPlan` holds all that does not depend on the layer: which slots each row attends to, how rows are grouped, masks.
The decode side builds one per step, the attention executor one per change of its set of requests. `attend` runs one
layer. PyTorch's flash kernel does the arithmetic (float32 accumulation for every dtype): the queries of one KV head
stand in for its query length, so grouped heads cost no copies of KV. Long ascending runs of slots, as prompts leave
them, are read in place, each once for all rows that share it; what remains is gathered, rows of similar length sharing
one padded call, and a row's parts are merged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sglang_adrenaline.attention.merge import merge_rows_

LOG2_E = math.log2(math.e)

VIEW_MIN_TOKENS = 192
"""Shorter runs are cheaper gathered into a common call than attended to in one of their own,"""
SHARED_MIN_TOKENS = 64
"""but for these, where as many rows share them as have twice VIEW_MIN_TOKENS together."""
MAX_PAD_TOKENS = 64
"""Most padding a row accepts to share a call: about what a call costs."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(slots=True)
class Scratch:
    """Buffers for gathered keys and values, kept by their owner across plans. One thread at a time."""

    _buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def get(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised 1-D tensor of `numel`, valid until the next `get` of that name and dtype."""
        held = self._buffers.get((name, dtype))
        if held is None or held.numel() < numel:
            held = self._buffers[(name, dtype)] = torch.empty(numel + numel // 4, dtype=dtype)
        return held[:numel]


@dataclass(frozen=True, slots=True)
class _View:
    """These rows attend to slots [start, stop) of the pool."""

    rows: tuple[int, ...]
    start: int
    stop: int

    @property
    def index(self) -> slice | list[int]:
        """Of its rows: for one, a slice, which costs no copy."""
        return slice(self.rows[0], self.rows[0] + 1) if len(self.rows) == 1 else list(self.rows)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that share one call over `width` gathered slots each."""

    rows: Tensor | None  # int64 [n]; None = every row, in order
    count: int
    width: int
    slots: Tensor  # int64 [n * width]; padding repeats the last slot
    mask: Tensor | None  # float32 [n, 1, 1, width], -inf on padding; None = no padding


@dataclass(frozen=True, slots=True)
class _Merge:
    """Runs of rows that attend to more than these; each row is in one of them."""

    views: tuple[_View, ...]
    rows: Tensor  # int64, of the views, one view after the other


@dataclass(frozen=True, slots=True)
class RaggedPlan:
    """Which KV slots each row attends to. Immutable but for its scratch; build with `from_rows` or `from_slots`."""

    num_rows: int
    views: tuple[_View, ...]  # of rows that are in no group, for each the first
    groups: tuple[_Group, ...]
    merges: tuple[_Merge, ...]
    has_empty: bool
    scratch: Scratch

    @staticmethod
    def from_rows(
        req_to_token: Tensor, req_pool_indices: Tensor, starts: Tensor, ends: Tensor, *, scratch: Scratch | None = None
    ) -> RaggedPlan:
        """Row i attends to positions [starts[i], ends[i]) of request `req_pool_indices[i]`.

        req_to_token      [max_requests, max_context]  int32, CPU
        req_pool_indices  [rows]                       integer, CPU
        starts, ends      [rows]                       integer, CPU; starts >= ends = empty
        """
        first = starts.numpy().astype(np.int64)
        lens = np.maximum(ends.numpy().astype(np.int64) - first, 0)
        offsets = np.cumsum(lens) - lens
        positions = np.arange(lens.sum()) + np.repeat(first - offsets, lens)
        flat = req_to_token.numpy()[np.repeat(req_pool_indices.numpy(), lens), positions].astype(np.int64)
        return _build(flat, lens, scratch or Scratch())

    @staticmethod
    def from_slots(slots: Sequence[Tensor], *, scratch: Scratch | None = None) -> RaggedPlan:
        """Row i attends to pool slots `slots[i]` (int64 [n], CPU; may be empty)."""
        lens = np.array([len(row) for row in slots], dtype=np.int64)
        flat = np.concatenate([row.numpy().astype(np.int64) for row in slots]) if slots else np.empty(0, np.int64)
        return _build(flat, lens, scratch or Scratch())


def _build(flat: np.ndarray, lens: np.ndarray, scratch: Scratch) -> RaggedPlan:
    """flat: the slots of all rows, one row after the other; lens: slots per row."""
    views, taken = _take_runs(flat, lens)
    left = np.concatenate(([0], np.cumsum(~taken)))
    ends = np.cumsum(lens)
    rest = _Rest(flat[~taken], left[ends - lens], left[ends] - left[ends - lens])
    gathered = sorted(np.flatnonzero(rest.lens).tolist(), key=lambda row: rest.lens[row], reverse=True)
    groups, begin = [], 0
    for end in range(1, len(gathered) + 1):
        if end == len(gathered) or rest.lens[gathered[begin]] - rest.lens[gathered[end]] > MAX_PAD_TOKENS:
            groups.append(rest.group(np.array(sorted(gathered[begin:end]))))
            begin = end
    first, merges = _in_turn(views, set(gathered))
    return RaggedPlan(
        num_rows=len(lens),
        views=first,
        groups=tuple(groups),
        merges=merges,
        has_empty=bool((lens == 0).any()),
        scratch=scratch,
    )


def _take_runs(flat: np.ndarray, lens: np.ndarray) -> tuple[list[_View], np.ndarray]:
    """The ascending runs that are worth a call of their own; which of `flat` they cover (bool)."""
    taken = np.zeros(len(flat), dtype=bool)
    if not (lens >= SHARED_MIN_TOKENS).any():
        return [], taken
    offsets = np.cumsum(lens) - lens
    jumps = np.flatnonzero(np.diff(flat) != 1) + 1
    starts = np.unique(np.concatenate((offsets[lens > 0], jumps)))
    run_lens = np.diff(starts, append=len(flat))
    long = np.flatnonzero(run_lens >= SHARED_MIN_TOKENS)
    rows = np.searchsorted(offsets, starts[long], side="right") - 1  # of equal offsets, the last is not empty
    by_slot: dict[int, dict[int, tuple[int, int]]] = {}  # first slot -> row -> (where in flat, length) of the run
    for start, length, row in zip(starts[long].tolist(), run_lens[long].tolist(), rows.tolist(), strict=True):
        by_slot.setdefault(int(flat[start]), {})[row] = (start, length)
    views = []
    for slot, runs in by_slot.items():
        shared = _shared_length([length for _, length in runs.values()])
        together = [row for row, (_, length) in runs.items() if length >= shared]
        found = [(together, shared)] + [([row], length) for row, (_, length) in runs.items() if length < shared]
        for rows_of, length in found:
            if length >= VIEW_MIN_TOKENS or length * len(rows_of) >= 2 * VIEW_MIN_TOKENS:
                views.append(_View(tuple(rows_of), slot, slot + length))
                for row in rows_of:
                    start, _ = runs[row]
                    taken[start : start + length] = True
    return views, taken


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is left to be gathered: row r is flat[offsets[r] : +lens[r]]."""

    flat: np.ndarray
    offsets: np.ndarray
    lens: np.ndarray

    def group(self, rows: np.ndarray) -> _Group:
        last = self.lens[rows, None] - 1
        width = int(last.max()) + 1
        columns = np.arange(width)
        mask = None
        if last.min() + 1 < width:
            mask = torch.from_numpy(np.where(columns > last, np.float32(-np.inf), np.float32(0)))[:, None, None, :]
        slots = self.flat[self.offsets[rows, None] + np.minimum(columns, last)]
        return _Group(
            rows=None if len(rows) == len(self.lens) else torch.from_numpy(rows),
            count=len(rows),
            width=width,
            slots=torch.from_numpy(slots.reshape(-1)),
            mask=mask,
        )


def _in_turn(views: Sequence[_View], begun: Collection[int]) -> tuple[tuple[_View, ...], tuple[_Merge, ...]]:
    """Views by turn, so that a row is in one view of a turn; the first turn's are of rows that nothing has `begun`."""
    turns: list[list[_View]] = [[]]
    next_turn = dict.fromkeys(begun, 1)
    for view in views:
        by_turn: dict[int, list[int]] = {}
        for row in view.rows:
            by_turn.setdefault(min(next_turn.get(row, 0), 1), []).append(row)
        for begins, rows in by_turn.items():
            turn = 0 if begins == 0 else max(next_turn[row] for row in rows)
            turns += [[] for _ in range(turn + 1 - len(turns))]
            turns[turn].append(_View(tuple(rows), view.start, view.stop))
            next_turn.update(dict.fromkeys(rows, turn + 1))
    merges = [
        _Merge(tuple(turn), torch.tensor([row for view in turn for row in view.rows], dtype=torch.int64))
        for turn in turns[1:]
        if turn
    ]
    return tuple(turns[0]), tuple(merges)


def _shared_length(lengths: Collection[int]) -> int:
    """Of runs that begin alike: how far to read together, so that the fewest slots are read again."""
    falling = sorted(lengths, reverse=True)
    saved = [count * length for count, length in enumerate(falling)]
    return falling[max(range(len(falling)), key=lambda i: saved[i])]


def attend(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, plan: RaggedPlan, *, sm_scale: float, logit_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One layer: row i of q attends to its slots of the plan.

    q                   [rows, num_qo_heads, head_dim]   fp32/bf16/fp16, CPU
    k_buffer, v_buffer  [slots, num_kv_heads, head_dim]  CPU, contiguous; cast to q's dtype where it differs
    logit_cap           c > 0 replaces each score s by c * tanh(s / c)

    Returns (o, lse): o as q, lse [rows, num_qo_heads] float32, base 2. An empty row gives o = 0, lse = -inf.
    Raises ValueError if q's rows are not the plan's.
    """
    num_rows, num_qo_heads, head_dim = q.shape
    if num_rows != plan.num_rows:
        raise ValueError(f"q has {num_rows} rows, its plan {plan.num_rows}")
    num_kv_heads = k_buffer.shape[1]
    grouped = (num_rows, num_kv_heads, num_qo_heads // num_kv_heads)
    # Sized by v: some models' values are narrower than their keys.
    o = q.new_empty((*grouped, v_buffer.shape[2]))
    lse = torch.empty(grouped, dtype=torch.float32)
    if plan.has_empty:
        o.zero_()
        lse.fill_(-torch.inf)
    q = q.reshape(*grouped, head_dim)
    for view in plan.views:
        rows = view.index
        o[rows], lse[rows] = _read_in_place(q[rows], k_buffer, v_buffer, view, sm_scale, logit_cap)
    for group in plan.groups:
        k = _gather(k_buffer, group, plan.scratch, "k")
        v = _gather(v_buffer, group, plan.scratch, "v")
        if group.rows is None:
            o_part, lse_part = _call(q, k, v, group.mask, sm_scale, logit_cap)
            o.copy_(o_part)
            lse.copy_(lse_part)
        else:
            o[group.rows], lse[group.rows] = _call(q[group.rows], k, v, group.mask, sm_scale, logit_cap)
    o, lse = o.view(num_rows, num_qo_heads, o.shape[-1]), lse.view(num_rows, num_qo_heads)
    lse.mul_(LOG2_E)
    for merge in plan.merges:
        parts = [_read_in_place(q[view.index], k_buffer, v_buffer, view, sm_scale, logit_cap) for view in merge.views]
        o_part = torch.cat([part[0] for part in parts]).reshape(len(merge.rows), num_qo_heads, -1)
        lse_part = torch.cat([part[1] for part in parts]).reshape(len(merge.rows), num_qo_heads)
        merge_rows_(o, lse, o_part, lse_part.mul_(LOG2_E), merge.rows)
    return o, lse


def _read_in_place(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, view: _View, sm_scale: float, logit_cap: float
) -> tuple[Tensor, Tensor]:
    """All rows' queries q [n, kv_heads, group, D] in one call, as if they were one row of a larger group."""
    k, v = k_buffer[view.start : view.stop].unsqueeze(0), v_buffer[view.start : view.stop].unsqueeze(0)
    if len(q) == 1:
        return _call(q, k, v, None, sm_scale, logit_cap)
    num, kv_heads, group, head_dim = q.shape
    together = q.transpose(0, 1).reshape(1, kv_heads, num * group, head_dim)
    o, lse = _call(together, k, v, None, sm_scale, logit_cap)
    o = o.view(kv_heads, num, group, -1).transpose(0, 1)
    return o, lse.view(kv_heads, num, group).transpose(0, 1)


def _gather(buffer: Tensor, group: _Group, scratch: Scratch, name: str) -> Tensor:
    """[count, width, num_kv_heads, head_dim] of the group's slots, in scratch memory."""
    # index_select on rows copies whole rows; indexing with a tensor copies element by element, four times slower.
    flat = buffer.view(buffer.shape[0], -1)
    out = scratch.get(name, group.slots.numel() * flat.shape[1], buffer.dtype).view(-1, flat.shape[1])
    torch.index_select(flat, 0, group.slots, out=out)
    return out.view(group.count, group.width, *buffer.shape[1:])


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, logit_cap: float
) -> tuple[Tensor, Tensor]:
    """q [n, kv_heads, group, D] over k, v [n, width, kv_heads, D]; mask adds to scores. lse in natural logarithms."""
    k, v = k.transpose(1, 2).to(q.dtype), v.transpose(1, 2).to(q.dtype)
    if logit_cap > 0.0 or k.shape[-1] != v.shape[-1]:
        return _plain(q, k, v, mask, sm_scale, logit_cap)
    return _flash(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype), scale=sm_scale)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sm_scale: float, logit_cap: float
) -> tuple[Tensor, Tensor]:
    """The same in separate operators, for what the flash kernel lacks."""
    scores = q.float() @ k.float().transpose(-1, -2) * sm_scale
    if logit_cap > 0.0:
        scores = logit_cap * torch.tanh(scores / logit_cap)
    if mask is not None:
        scores = scores + mask
    lse_ln = torch.logsumexp(scores, dim=-1)
    return (torch.exp(scores - lse_ln.unsqueeze(-1)) @ v.float()).to(q.dtype), lse_ln
