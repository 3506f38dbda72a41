"""Registered memory of one process, and the test that a copy stays inside it. No CUDA, no SGLang, no sockets.

A region is what SGLang registered. Regions of one allocation that touch or overlap count as one, so that a range is
accepted exactly if each of its bytes is registered and all lie in one allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

HOST = -1
"""Allocation of ordinary memory, which has no base and no handle."""

_MAX_ADDRESS = 1 << 62  # far above any address; sums of two stay inside int64


class Allocation(msgspec.Struct, frozen=True):
    """One cudaMalloc that holds regions. `handle`: its CUDA IPC handle, empty on the sending side."""

    base: int
    num_bytes: int
    handle: bytes = b""


class Region(msgspec.Struct, frozen=True):
    """`num_bytes` registered bytes from `address` on. `allocation`: index in its table, or HOST."""

    address: int
    num_bytes: int
    allocation: int


class Regions(msgspec.Struct, frozen=True):
    """All that a process registered; what the receiver publishes and the sender reads."""

    allocations: tuple[Allocation, ...] = ()
    regions: tuple[Region, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Regions)


def encode(regions: Regions) -> bytes:
    return _encoder.encode(regions)


def decode(data: bytes) -> Regions:
    """Raises ValueError on anything that is not a table whose regions lie in their allocations."""
    try:
        result = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a table of regions: {error}") from None
    check(result)
    return result


def check(table: Regions) -> None:
    """Raises ValueError unless every region is an ordinary range inside its allocation."""
    for region in table.regions:
        if region.address < 0 or region.num_bytes <= 0 or region.address + region.num_bytes > _MAX_ADDRESS:
            raise ValueError(f"not a memory region: {region.address:#x}, {region.num_bytes} bytes")
        if region.allocation == HOST:
            continue
        if not 0 <= region.allocation < len(table.allocations):
            raise ValueError(f"region {region.address:#x} names allocation {region.allocation}, which is not there")
        held = table.allocations[region.allocation]
        if region.address < held.base or region.address + region.num_bytes > held.base + held.num_bytes:
            raise ValueError(f"region {region.address:#x} is not inside its allocation {held.base:#x}")


@dataclass(frozen=True)
class RegionIndex:
    """Sorted, disjoint intervals of registered memory. starts, ends: int64 [n]; allocation: int64 [n]."""

    starts: np.ndarray
    ends: np.ndarray
    allocation: np.ndarray

    @staticmethod
    def of(table: Regions) -> RegionIndex:
        """Raises ValueError if `check` does, or if regions of two allocations overlap."""
        check(table)
        merged: list[list[int]] = []
        for region in sorted(table.regions, key=lambda r: (r.address, r.allocation)):
            start, end = region.address, region.address + region.num_bytes
            if merged and region.allocation == merged[-1][2] and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            elif merged and start < merged[-1][1]:
                raise ValueError(f"region {start:#x} lies in two allocations")
            else:
                merged.append([start, end, region.allocation])
        columns = np.array(merged, dtype=np.int64).reshape(-1, 3).T
        return RegionIndex(*(np.ascontiguousarray(column) for column in columns))

    def locate(self, addresses: np.ndarray, lengths: np.ndarray, what: str) -> np.ndarray:
        """The allocation of each range [address, address + length); int64 [n] in, int64 [n] out.

        Raises ValueError that names the first range which is not wholly inside; a length of 0 or less is not.
        """
        where = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = where >= 0
        where = np.maximum(where, 0)
        if len(self.starts):
            # No sum of an address and a length, which could overflow: the address is below the end first.
            left = self.ends[where] - np.minimum(addresses, self.ends[where])
            inside &= (lengths > 0) & (lengths <= left)
        if not inside.all():
            bad = int(np.flatnonzero(~inside)[0])
            raise ValueError(
                f"{what} range of {int(lengths[bad])} bytes at {int(addresses[bad]):#x} is not in registered memory"
            )
        return self.allocation[where] if len(self.starts) else np.empty(0, dtype=np.int64)


def int64(values: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    """int64 [n]. Raises ValueError where a value does not fit or is none."""
    try:
        result = np.asarray(values, dtype=np.int64)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"bad {what}: {error}") from None
    if result.ndim != 1:
        raise ValueError(f"bad {what}: {result.ndim} dimensions")
    return result
