"""Words that the host shares with the kernels of an `ipc` channel: the Python side of `adrenaline/endpoint.cuh`.

What each word means and who writes it stands there; `kernels.module` refuses a library whose layout differs.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

_U64 = ctypes.c_uint64


class EndpointError(IntEnum):
    """Why an end stopped working."""

    NONE = 0
    LATE = 1
    ABORTED = 2
    SHAPE = 3


class Endpoint(ctypes.Structure):
    """256 bytes of device memory at an address that never changes; bound to one channel after the other."""

    _fields_ = (
        *(
            (name, _U64)
            for name in (
                "connected",
                "num_layers",
                "lanes",
                "num_heads",
                "send_row_bytes",
                "recv_row_bytes",
                "peer_rows",
                "peer_lse",
                "peer_flag",
                "own_rows",
                "own_lse",
                "own_flag",
                "control",
                "status",
            )
        ),
        ("reserved", _U64 * 2),
        *(
            (name, _U64)
            for name in (
                "step",
                "open",
                "launches",
                "error",
                "arrivals",
                "wait_ns",
                "waits",
                "work_from_ns",
                "work_ns",
                "joins",
            )
        ),
        ("reserved_too", _U64 * 6),
    )


ENDPOINT_WORDS = ctypes.sizeof(Endpoint) // 8
LANE_BITS = 16
"""A place is the index of an endpoint, shifted by so many bits, plus a lane of its channel."""


class HostControl(ctypes.Structure):
    """Mapped host memory, written by the host."""

    _fields_ = tuple((name, _U64) for name in ("abort", "wait_limit_ns", "open_limit_ns", "cancelled_launches"))


class HostStatus(ctypes.Structure):
    """Mapped host memory, written by the kernels."""

    _fields_ = tuple(
        (name, _U64)
        for name in ("error", "error_call", "steps_opened", "steps_done", "launches", "wait_ns", "waits", "work_ns")
    )


def layout() -> str:
    """Byte offset of every word and how places are made, in the form in which the library reports its own."""
    offsets = "".join(
        f"{kind.__name__}.{name}:{getattr(kind, name).offset} "
        for kind in (Endpoint, HostControl, HostStatus)
        for name, *_ in kind._fields_
        if not name.startswith("reserved")
    )
    return f"{offsets}lane_bits:{LANE_BITS} "
