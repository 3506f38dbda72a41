"""Futexes on shared memory, and the memory fence that flags in shared memory need. Linux, x86-64 and aarch64.

A futex is an aligned 32-bit word: `wait` sleeps while the word has the expected value, `wake` wakes the sleepers. The
kernel compares and goes to sleep in one step with respect to `wake`, so "store the word, then wake" loses no wake-up.
`wait` releases the GIL, `wake` keeps it. `wake` is always called, since knowing that nobody sleeps would need a fence
that costs more than the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Callable

from sglang_adrenaline.errors import ChannelError

_FUTEX_WAIT = 0  # without FUTEX_PRIVATE_FLAG: the sleepers are in another process
_FUTEX_WAKE = 1
_FUTEX_NUMBER = {"x86_64": 202, "aarch64": 98}
_MEMBARRIER_NUMBER = {"x86_64": 324, "aarch64": 283}
_MEMBARRIER_PRIVATE_EXPEDITED = 1 << 3
_MEMBARRIER_REGISTER_PRIVATE_EXPEDITED = 1 << 4
_SEQ_CST = 5

_syscall = ctypes.CDLL(None, use_errno=True).syscall  # releases the GIL
_syscall.restype = ctypes.c_long
_quick_syscall = ctypes.PyDLL(None).syscall  # keeps it: where other threads compute, getting it back can take long
_NULL = ctypes.c_void_p(0)
_WAIT = ctypes.c_int(_FUTEX_WAIT)
_WAKE = ctypes.c_int(_FUTEX_WAKE)
_ALL = ctypes.c_int(2**31 - 1)


class _Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_long), ("nsec", ctypes.c_long)]


class Futex:
    """The futex at `address`, which must stay mapped, and aligned to 4 bytes, for the life of this object."""

    def __init__(self, address: int) -> None:
        self._number = ctypes.c_long(_number(_FUTEX_NUMBER))
        self._address = ctypes.c_void_p(address)
        self._timeout_s = 0.0
        self._timespec = _Timespec()
        self._timespec_ref = ctypes.byref(self._timespec)

    def wait(self, expected: int, timeout_s: float) -> bool:
        """Sleep while the word is `expected`; True if the time passed. May return early: look at the word again.

        One thread at a time. Raises ChannelError where the kernel refuses.
        """
        if timeout_s != self._timeout_s:
            self._timeout_s = timeout_s
            whole = int(timeout_s)
            self._timespec.sec = whole
            self._timespec.nsec = int((timeout_s - whole) * 1e9)
        word = ctypes.c_uint32(expected)
        if _syscall(self._number, self._address, _WAIT, word, self._timespec_ref, _NULL, _NULL) == 0:
            return False
        code = ctypes.get_errno()
        if code == errno.ETIMEDOUT:
            return True
        if code in (errno.EAGAIN, errno.EINTR):  # the word has changed already; a signal came
            return False
        raise ChannelError(f"futex wait failed: {os.strerror(code)}")

    def wake(self) -> None:
        """Wake all who sleep on the word, in any process."""
        _quick_syscall(self._number, self._address, _WAKE, _ALL, _NULL, _NULL, _NULL)


def _number(numbers: dict[str, int]) -> int:
    machine = platform.machine()
    if machine not in numbers:
        raise ChannelError(f"the shm channel needs one of {sorted(numbers)}, this machine is {machine}")
    return numbers[machine]


def make_fence() -> Callable[[], None] | None:
    """A full memory fence, or None where plain loads and stores keep "write the data, then raise the flag" in order.

    x86-64 keeps the order of stores among themselves and of loads among themselves (TSO), which is all that a flag
    needs. aarch64 keeps neither. Raises ChannelError if this machine needs a fence and has none to call.
    """
    if platform.machine() == "x86_64":
        return None
    fence = libatomic_fence() or membarrier_fence()
    if fence is None:
        raise ChannelError("the shm channel needs libatomic or the membarrier system call on this machine")
    return fence


def libatomic_fence() -> Callable[[], None] | None:
    """C11's atomic_thread_fence out of GCC's libatomic, if that is installed."""
    try:
        function = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    order = ctypes.c_int(_SEQ_CST)
    return lambda: function(order)


def membarrier_fence() -> Callable[[], None] | None:
    """The membarrier system call, a full barrier for the caller (and its other threads), if the kernel has it."""
    number = _number(_MEMBARRIER_NUMBER)
    if _syscall(number, _MEMBARRIER_REGISTER_PRIVATE_EXPEDITED, 0, 0) != 0:
        return None

    def fence() -> None:
        if _syscall(number, _MEMBARRIER_PRIVATE_EXPEDITED, 0, 0) != 0:
            raise ChannelError(f"membarrier failed: {os.strerror(ctypes.get_errno())}")

    return fence
