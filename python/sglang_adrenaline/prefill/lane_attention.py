"""FlashInfer attention of the GPU executor: one query per lane over that lane's slots of the KV pool, with its lse.

Work comes in buckets: the attention of bucket b answers lanes 0..b-1, and its kernels' launches depend on b alone, so
that they can be captured in a CUDA graph; which slots a lane attends to is read from buffers that `plan` fills, in the
order of the current stream and without waiting for the device. One thread, one stream. No channel, no graphs here.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_adrenaline.errors import ChannelError
from sglang_adrenaline.prefill.executor import LayerKV

PADDING_SLOT = 0
"""SGLang keeps it for padding. A lane without a prefix attends to it, and nobody reads the answer."""

_PLAN_WAIT_S = 30.0  # ends earlier if the stream does, and the waits of its kernels have limits of their own
_BLOCKS_PER_SM = 16  # of 128 threads or more, so not more than this are resident


def lane_buckets(lanes: int) -> tuple[int, ...]:
    """8, 16, 32, then multiples of 64; the last one is `lanes`."""
    sizes = [size for size in (8, 16, 32, *range(64, lanes, 64)) if size < lanes]
    return (*sizes, lanes)


def bucket_of(buckets: Sequence[int], highest_lane: int) -> int:
    """The smallest bucket with that lane; -1 = no lane."""
    return next(bucket for bucket in buckets if bucket > highest_lane)


class LaneAttention:
    """See the module. Made, planned and run on one stream; freed with its last reference, once that stream is done."""

    def __init__(self, layers: Sequence[LayerKV], *, lanes: int, num_qo_heads: int, dtype: torch.dtype, capacity: int):
        """`capacity`: most slots that all lanes together attend to. Raises ChannelError on pools it cannot read.

        Blocks while FlashInfer's kernels are compiled, which is done once a machine.
        """
        self.layers = layers
        self.num_qo_heads = num_qo_heads
        self.dtype = dtype
        self.buckets = lane_buckets(lanes)
        self.capacity = capacity
        check_pool(layers, num_qo_heads, dtype)
        self.device = layers[0].k.device
        self._num_kv_heads, self._head_dim = layers[0].k.shape[1:]
        self._tensor_cores = _uses_tensor_cores(layers[0].k.dtype, num_qo_heads, self._num_kv_heads)
        # Pages of one token, whatever SGLang's page size is: slots are tokens.
        self._paged = [(layer.k.unsqueeze(1), layer.v.unsqueeze(1)) for layer in layers]
        int32 = {"dtype": torch.int32, "device": self.device}
        self._indptr = torch.zeros(lanes + 1, **int32)
        self._indices = torch.full((capacity,), PADDING_SLOT, **int32)
        self._last_page_len = torch.ones(lanes, **int32)
        self._padding = torch.full((1,), PADDING_SLOT, **int32)
        self._indptr_pinned = torch.zeros(lanes + 1, dtype=torch.int32, pin_memory=True)
        self._workspace = torch.zeros(self._workspace_bytes(lanes), dtype=torch.uint8, device=self.device)
        self._copied = torch.cuda.Event()
        """After the last plan's copies: until then its host buffers and the slots it read must stay."""
        self._held: list[Tensor] = []
        self._wrappers = {bucket: self._wrapper(bucket) for bucket in self.buckets}

    def bucket(self, lanes: Collection[int]) -> int:
        """That of a step with these lanes."""
        return bucket_of(self.buckets, max(lanes, default=-1))

    def plan(self, slots: Mapping[int, Tensor], bucket: int) -> None:
        """Let lane i attend to slots[i] (int32 [n], n >= 1, on the device) from here on when this bucket is run.

        Waits for the copies of the plan before this one, which lie behind what the stream did then. Raises
        ChannelError if they are not over in time, ValueError beyond the capacity.
        """
        from flashinfer.decode import fast_decode_plan

        parts = [slots.get(lane, self._padding) for lane in range(bucket)]
        indptr = np.zeros(bucket + 1, dtype=np.int32)
        np.cumsum([part.numel() for part in parts], out=indptr[1:])
        total = int(indptr[-1])
        if total > self.capacity:
            raise ValueError(f"{total} slots for an attention that was made for {self.capacity}")
        self._wait_for_copies()
        host = torch.from_numpy(indptr)
        self._indptr_pinned[: bucket + 1] = host
        self._indptr[: bucket + 1].copy_(self._indptr_pinned[: bucket + 1], non_blocking=True)
        torch.cat(parts, out=self._indices[:total])
        fast_decode_plan(
            self._wrappers[bucket],
            host,
            self._indices[:total],
            self._last_page_len[:bucket],
            self.num_qo_heads,
            self._num_kv_heads,
            self._head_dim,
            1,
            q_data_type=self.dtype,
            kv_data_type=self.layers[0].k.dtype,
            sm_scale=1.0,
            global_override_indptr_cpu=host,
        )
        self._copied.record()
        self._held = parts

    def run(self, bucket: int, layer: int, q: Tensor, o: Tensor, lse: Tensor) -> None:
        """Attention of one layer with the plan that the stream has got to. Allocates nothing; graph-safe.

        q, o  [bucket, num_qo_heads, head_dim]  `dtype`, contiguous
        lse   [bucket, num_qo_heads]            float32, base 2 (FlashInfer's)
        """
        self._wrappers[bucket].run(
            q,
            self._paged[layer],
            q_scale=self.layers[layer].sm_scale,  # times the plan's scale of 1
            out=o,
            lse=lse,
            return_lse=True,
            enable_pdl=False,  # the kernels before and after are not FlashInfer's and do not take part
        )

    def _wrapper(self, bucket: int) -> Any:
        """A wrapper with a plan in which all lanes are empty; the first plan also loads the kernels."""
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        kv_dtype = self.layers[0].k.dtype
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._tensor_cores,
            paged_kv_indptr_buffer=self._indptr[: bucket + 1],
            paged_kv_indices_buffer=self._indices,
            paged_kv_last_page_len_buffer=self._last_page_len[:bucket],
        )
        wrapper.plan(
            torch.arange(bucket + 1, dtype=torch.int32),
            torch.full((bucket,), PADDING_SLOT, dtype=torch.int32, device=self.device),
            torch.ones(bucket, dtype=torch.int32),
            self.num_qo_heads,
            self._num_kv_heads,
            self._head_dim,
            1,
            q_data_type=self.dtype,
            kv_data_type=kv_dtype,
            sm_scale=1.0,
        )
        return wrapper

    def _workspace_bytes(self, lanes: int) -> int:
        """Room for the float32 partial results of split prefixes in either of FlashInfer's two decode kernels.

        Source: the allocations of PrefillPlan (tensor cores) and DecodePlan in flashinfer/attention/scheduler.cuh.
        """
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        group = self.num_qo_heads // self._num_kv_heads
        if self._tensor_cores:
            tile_rows = 16 if group <= 16 else 64 if group <= 64 else 128
            tiles = max(-(-lanes * group // tile_rows) + lanes, 2 * sms // self._num_kv_heads + 1)
            rows = tiles * tile_rows * self.num_qo_heads
        else:
            rows = _BLOCKS_PER_SM * sms * group
        return rows * (self._head_dim + 1) * 4 + (1 << 20)

    def _wait_for_copies(self) -> None:
        deadline = time.monotonic() + _PLAN_WAIT_S
        while not self._copied.query():
            if time.monotonic() > deadline:
                raise ChannelError(f"the GPU has not got to the executor's last plan within {_PLAN_WAIT_S:g} s")
            time.sleep(20e-6)


def _uses_tensor_cores(kv_dtype: torch.dtype, num_qo_heads: int, num_kv_heads: int) -> bool:
    """As decode's attention decides."""
    from sglang.srt.layers.attention.flashinfer_backend import should_use_tensor_core

    return bool(should_use_tensor_core(kv_dtype, num_qo_heads, num_kv_heads))


def check_pool(layers: Sequence[LayerKV], num_qo_heads: int, dtype: torch.dtype) -> None:
    """Raises ChannelError on a pool that the GPU executor cannot attend over."""
    k, v = layers[0].k, layers[0].v
    if any(layer.logit_cap for layer in layers):
        raise ChannelError("the GPU executor does not cap attention scores (logit soft cap)")
    if k.dtype != dtype:
        raise ChannelError(f"the GPU executor needs KV in the model's dtype {dtype}, not {k.dtype}")
    if k.shape != v.shape or k.dim() != 3:
        raise ChannelError(f"the GPU executor needs keys and values of one shape, not {k.shape} and {v.shape}")
    if num_qo_heads % k.shape[1]:
        raise ChannelError(f"{num_qo_heads} query heads do not fit {k.shape[1]} KV heads")
