"""KV transfer engine for CPU memory of one host: `process_vm_writev` into the address space of the decode scheduler.

Stands where SGLang's Mooncake manager expects its transfer engine: the four methods that the manager calls, nothing
more. Both sides own one. The receiving side only publishes its session id and allows the write; the sending side
writes, from several transfer threads at a time. No SGLang import.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_adrenaline.channel.memfd import has_ended
from sglang_adrenaline.errors import ConfigError

logger = logging.getLogger(__name__)

IOV_MAX = 1024
"""Most (address, length) pairs the kernel takes in one call."""

_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)
_YAMA_SCOPE = "/proc/sys/kernel/yama/ptrace_scope"

# A CDLL call releases the GIL, so that a long copy does not stop the scheduler.
_libc = ctypes.CDLL(None, use_errno=True)
_writev = getattr(_libc, "process_vm_writev", None)
if _writev is not None:
    _writev.restype = ctypes.c_ssize_t
    _writev.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]


@dataclass(frozen=True)
class Session:
    """Names one process for as long as this machine runs; its text is the `session_id` of SGLang's protocol.

    The PID alone may be given to another process, so its start time (clock ticks since boot) goes with it, and the
    machine's boot and PID namespace say whether the PID means anything to the reader. SGLang takes the part behind
    the last colon for a port number and shards its queues by it, hence the PID there.
    """

    machine: str
    start_ticks: int
    pid: int

    @staticmethod
    def of_this_process() -> Session:
        pid = os.getpid()
        ticks = _start_ticks(pid)
        assert ticks is not None, "this process has no /proc entry"
        return Session(_machine(), ticks, pid)

    @staticmethod
    def parse(text: str) -> Session:
        """Raises ValueError on text that `str(session)` did not write."""
        machine, ticks, pid = text.split(":")
        if not machine or int(ticks) < 0 or int(pid) <= 0:
            raise ValueError(text)
        return Session(machine, int(ticks), int(pid))

    def __str__(self) -> str:
        return f"{self.machine}:{self.start_ticks}:{self.pid}"


class ProcessVmEngine:
    """Writes into registered memory of other processes of this user on this host.

    The protocol gives the sender addresses but no bounds: the receiver is trusted to have sent its own, as with every
    transfer backend of SGLang.
    """

    def __init__(self, *, receives: bool) -> None:
        """`receives`: this process is written to (decode). Raises ConfigError where the kernel forbids the call."""
        _check_allowed()
        self._session = Session.of_this_process()
        self._lock = threading.Lock()
        self._pidfds: dict[str, int] = {}
        if receives:
            # With Yama's scope 1 only a parent may write into a process unless that process says otherwise. EINVAL
            # means that the kernel has no Yama, so there is nothing to allow.
            _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)

    def get_session_id(self) -> str:
        return str(self._session)

    def batch_register(self, ptrs: Sequence[int], lengths: Sequence[int]) -> int:
        """Ordinary memory needs no registration. Returns 0."""
        return 0

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        return 0

    def batch_transfer_sync(
        self, session_id: str, src_addrs: Sequence[int], dst_addrs: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """Copy `lengths[i]` bytes from `src_addrs[i]` here to `dst_addrs[i]` in the process of `session_id`.

        Returns 0, or -1 after one log line that names the cause; then an unknown part of the data was written.
        """
        try:
            pid, pidfd = self._target(session_id)
            _write_all(pid, pidfd, _iovecs(src_addrs, lengths), _iovecs(dst_addrs, lengths))
        except (OSError, ValueError) as error:
            logger.error("local KV transfer to %s failed: %s", session_id, error)
            return -1
        return 0

    def send_probe(self, session_id: str) -> int:
        """0 if the process of `session_id` lives, else -1."""
        try:
            pid, pidfd = self._target(session_id)
            check_alive(pid, pidfd)
        except (OSError, ValueError):
            return -1
        return 0

    def close(self) -> None:
        with self._lock:
            for pidfd in self._pidfds.values():
                os.close(pidfd)
            self._pidfds.clear()

    def _target(self, session_id: str) -> tuple[int, int]:
        """(pid, pidfd) of a session whose process was seen to be the one that wrote the session id."""
        try:
            session = Session.parse(session_id)
        except ValueError:
            raise ValueError(f"not a session of transfer backend 'local': {session_id!r}") from None
        with self._lock:
            known = self._pidfds.get(session_id)
        if known is not None:
            return session.pid, known
        pidfd = open_process(session)
        with self._lock:
            kept = self._pidfds.setdefault(session_id, pidfd)
            dead = [key for key, fd in self._pidfds.items() if fd != kept and has_ended(fd)]
            for key in dead:
                os.close(self._pidfds.pop(key))
        if kept != pidfd:
            os.close(pidfd)
        return session.pid, kept


def open_process(session: Session) -> int:
    """A pidfd of the process that wrote the session, for the caller to close. Raises OSError, ValueError."""
    if session.machine != _machine():
        raise ValueError(
            "the decode server runs on another host or in another container; "
            "use --disaggregation-transfer-backend mooncake or nixl"
        )
    pidfd = os.pidfd_open(session.pid)
    # If the descriptor's process lives after the start time was read, the start time was its own.
    same = _start_ticks(session.pid) == session.start_ticks
    if not same or has_ended(pidfd):
        os.close(pidfd)
        raise ProcessLookupError(errno.ESRCH, f"process {session.pid} has ended")
    return pidfd


def _write_all(pid: int, pidfd: int, local: np.ndarray, remote: np.ndarray) -> None:
    """Write every vector. local, remote: uint64 [n, 2] of (address, length), equal lengths; both are used up.

    Raises OSError. The liveness check stands before each call: between the check and the call the PID could pass to
    another process only if the whole PID space were used up in those microseconds.
    """
    first = 0
    while first < len(local):
        count = min(IOV_MAX, len(local) - first)
        check_alive(pid, pidfd)
        assert _writev is not None
        done = _writev(pid, local[first:].ctypes.data, count, remote[first:].ctypes.data, count, 0)
        if done < 0:
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code == errno.ESRCH:  # its memory is gone, though it may not be a zombie yet
                raise ProcessLookupError(code, f"process {pid} has ended")
            raise OSError(code, f"{os.strerror(code)} while writing to process {pid}{_hint(code)}")
        if done == 0:
            raise OSError(errno.EIO, f"no progress while writing to process {pid}")
        # Less than asked: over the kernel's 2 GiB a call, or a bad address further on, which the next call reports.
        ends = np.cumsum(local[first : first + count, 1])
        whole = int(np.searchsorted(ends, done, side="right"))
        rest = int(done) - (int(ends[whole - 1]) if whole else 0)
        first += whole
        if rest:
            for vectors in (local, remote):
                vectors[first, 0] += np.uint64(rest)
                vectors[first, 1] -= np.uint64(rest)


def _iovecs(addrs: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """uint64 [n, 2], the memory layout of `struct iovec`; vectors of length 0 left out. Raises ValueError."""
    if len(addrs) != len(lengths):
        raise ValueError(f"{len(addrs)} addresses but {len(lengths)} lengths")
    vectors = np.empty((len(addrs), 2), dtype=np.uint64)
    vectors[:, 0] = addrs
    vectors[:, 1] = lengths
    return np.ascontiguousarray(vectors[vectors[:, 1] > 0])


def check_alive(pid: int, pidfd: int) -> None:
    """Raises ProcessLookupError if the process has ended."""
    if has_ended(pidfd):
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")


def _hint(code: int) -> str:
    if code == errno.EPERM:
        return f": run both servers as one user, and see {_YAMA_SCOPE} (0 or 1 is needed)"
    if code == errno.EFAULT:
        return ": the address it registered is not mapped there"
    return ""


def _check_allowed() -> None:
    """Write to ourselves once, so that a missing system call is found at start. Raises ConfigError."""
    remedy = "use --disaggregation-transfer-backend mooncake or nixl"
    if _writev is None or not hasattr(os, "pidfd_open"):
        raise ConfigError(f"transfer backend 'local' needs Linux with process_vm_writev and pidfd_open; {remedy}")
    source, target = np.array([0x5A], dtype=np.uint8), np.zeros(1, dtype=np.uint8)
    vectors = [np.array([[array.ctypes.data, 1]], dtype=np.uint64) for array in (source, target)]
    done = _writev(os.getpid(), vectors[0].ctypes.data, 1, vectors[1].ctypes.data, 1, 0)
    if done != 1 or target[0] != source[0]:
        cause = os.strerror(ctypes.get_errno())
        raise ConfigError(f"transfer backend 'local' is not allowed here (process_vm_writev: {cause}); {remedy}")
    scope = _yama_scope()
    if scope >= 2 and os.geteuid() != 0:
        raise ConfigError(f"transfer backend 'local' needs {_YAMA_SCOPE} at 0 or 1, it is {scope}; {remedy}")


def _yama_scope() -> int:
    try:
        with open(_YAMA_SCOPE) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in brackets and may hold anything, blanks and brackets too.
            return int(file.read().rsplit(b")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _machine() -> str:
    """Names this boot of this machine and this PID namespace; holds no colon."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip().replace("-", "")
    return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
