"""How a receiver shows its table of regions to senders of its user on its host: a memfd, found through /proc.

The session id, which SGLang's protocol carries to the sender, names process, descriptor and a token. Opening another
process's descriptor is left to the kernel's rules (same user, same PID namespace); the token shows that the descriptor
still is the one the session id was written for.

    offset  size  what
    0       8     magic
    8       16    token
    24      8     generation: odd while the table is being written, another even number after each change
    32      8     length of the table, which follows at 40 (`regions.encode`)
"""

from __future__ import annotations

import os
import secrets
import struct
import time
from dataclasses import dataclass

from sglang_adrenaline.transfer import regions
from sglang_adrenaline.transfer.process_vm import Session

_MAGIC = b"ADRKV\x00\x00\x01"
_HEADER = struct.Struct("=8s16sQQ")
_MAX_TABLE_BYTES = 1 << 24
_READ_WAIT_S = 1.0  # a writer that is killed half-way leaves an odd generation for good


@dataclass(frozen=True)
class PublishedSession:
    """Names a receiver and its table. SGLang takes what stands behind the last colon for a number: the PID."""

    process: Session
    fd: int
    token: str

    def __str__(self) -> str:
        machine, ticks, pid = str(self.process).split(":")
        return f"{machine}:{ticks}:{self.fd}:{self.token}:{pid}"

    @staticmethod
    def parse(text: str) -> PublishedSession:
        """Raises ValueError on text that `str(session)` did not write."""
        machine, ticks, fd, token, pid = text.split(":")
        if int(fd) < 0 or len(bytes.fromhex(token)) != 16:
            raise ValueError(text)
        return PublishedSession(Session.parse(f"{machine}:{ticks}:{pid}"), int(fd), token)


class TableWriter:
    """The receiver's end; owns the memfd. Called from one thread at a time."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("sglang-adrenaline-kv", os.MFD_CLOEXEC)
        self._token = secrets.token_hex(16)
        self._generation = 0
        self.write(regions.Regions())

    @property
    def session(self) -> PublishedSession:
        return PublishedSession(Session.of_this_process(), self._fd, self._token)

    def write(self, table: regions.Regions) -> None:
        """Replace the table. Raises ValueError if it is too long."""
        data = regions.encode(table)
        if len(data) > _MAX_TABLE_BYTES:
            raise ValueError(f"{len(table.regions)} regions are too many to publish")
        self._put_header(self._generation + 1, 0)
        os.pwrite(self._fd, data, _HEADER.size)
        self._put_header(self._generation + 2, len(data))
        self._generation += 2

    def close(self) -> None:
        os.close(self._fd)

    def _put_header(self, generation: int, length: int) -> None:
        os.pwrite(self._fd, _HEADER.pack(_MAGIC, bytes.fromhex(self._token), generation, length), 0)


class TableReader:
    """The sender's end; owns a descriptor of the receiver's memfd, which outlives the receiver."""

    def __init__(self, session: PublishedSession) -> None:
        """Raises OSError if there is no such descriptor or it is another user's, ValueError if it is another file."""
        path = f"/proc/{session.process.pid}/fd/{session.fd}"
        self._token = bytes.fromhex(session.token)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.generation()
        except BaseException:
            os.close(self._fd)
            raise

    def generation(self) -> int:
        return self._header()[0]

    def read(self) -> tuple[int, regions.Regions]:
        """(generation, table). Raises ValueError on a table that is wrong or stays half-written."""
        deadline = time.monotonic() + _READ_WAIT_S
        while True:
            generation, length = self._header()
            if generation % 2 == 0 and length <= _MAX_TABLE_BYTES:
                data = os.pread(self._fd, length, _HEADER.size)
                if self._header() == (generation, length):
                    return generation, regions.decode(data)
            if time.monotonic() > deadline:
                raise ValueError("the receiver's table of memory regions stays half-written")
            time.sleep(0.001)

    def close(self) -> None:
        os.close(self._fd)

    def _header(self) -> tuple[int, int]:
        data = os.pread(self._fd, _HEADER.size, 0)
        if len(data) != _HEADER.size:
            raise ValueError("not a table of memory regions")
        magic, token, generation, length = _HEADER.unpack(data)
        if magic != _MAGIC or token != self._token:
            raise ValueError("the receiver's descriptor is another one by now, or of another version")
        return generation, length
