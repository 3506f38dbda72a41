"""Memory that two processes of one user on one host share without a name: a sealed memfd, by way of /proc/PID/fd/FD.

It goes with the processes, whatever ends them. Its size is sealed, so that no peer can shrink it under a mapping.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
from collections.abc import Iterator

from sglang_adrenaline.errors import ChannelError

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class OwnedFd:
    """A file descriptor that is closed with the last reference to this object."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class WatchedProcess:
    """Tells whether a process has ended, also if another one has its number by then."""

    def __init__(self, pid: int) -> None:
        """Raises ChannelError if there is no such process."""
        try:
            self._pidfd = OwnedFd(os.pidfd_open(pid))
        except (OSError, OverflowError) as error:
            raise ChannelError(f"process {pid} is not there: {error}") from None

    def has_ended(self) -> bool:
        return has_ended(self._pidfd.fd)


def has_ended(pidfd: int) -> bool:
    """Whether the process is gone, be it a zombie. From any thread."""
    poll = select.poll()  # one of its own: a poll object refuses to be used by two threads at a time
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def create(name: str, num_bytes: int) -> OwnedFd:
    """Zeroed shared memory of a size that stays. Raises ChannelError."""
    memfd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(memfd.fd, num_bytes)
        fcntl.fcntl(memfd.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise ChannelError(f"cannot make {num_bytes} bytes of shared memory: {error}") from None
    return memfd


def address(memfd: OwnedFd) -> str:
    """By which another process opens it: "PID:FD"."""
    return f"{os.getpid()}:{memfd.fd}"


@contextlib.contextmanager
def opened(address: str, num_bytes: int) -> Iterator[tuple[int, WatchedProcess]]:
    """(descriptor, its creator) of what is at `address`; a mapping made inside outlives the descriptor.

    Raises ChannelError if there is nothing, or no sealed memory of `num_bytes`, or if mapping it fails inside.
    """
    pid, fd = _parse(address)
    creator = WatchedProcess(pid)
    try:
        memfd = OwnedFd(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        raise ChannelError(
            f"cannot open the shared memory of process {pid}: {error.strerror}; both servers must run on one host, "
            "in one PID namespace and as one user"
        ) from None
    try:
        _check(memfd.fd, num_bytes)
        yield memfd.fd, creator
    except (OSError, ValueError) as error:
        raise ChannelError(f"cannot map the shared memory of process {pid}: {error}") from None


def _check(fd: int, num_bytes: int) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
        raise ValueError(f"it has {status.st_size} bytes, a channel of this shape has {num_bytes}")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS:
        raise ValueError("its size is not sealed")


def _parse(address: str) -> tuple[int, int]:
    pid, _, fd = address.partition(":")
    if not (pid.isascii() and pid.isdecimal() and fd.isascii() and fd.isdecimal() and len(address) < 32):
        raise ChannelError(f"the address of a channel is PID:FD, not {address!r}")
    return int(pid), int(fd)
