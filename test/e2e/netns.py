"""Two hosts on one machine: network namespaces joined by a cable that can be cut, processes without sight of others.

Needs root, iproute2 and util-linux. The addresses exist in the two namespaces only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class NoNamespacesError(Exception):
    """This machine or user may not make network namespaces; the text says what failed."""


@dataclass(frozen=True)
class Host:
    """One namespace. Its end of the cable is called `cable`."""

    name: str
    address: str
    cable: str = "cable"

    def command(self, command: list[str]) -> list[str]:
        """`command` on this host, where only its own processes exist; killed with the process that starts it."""
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self.name, *apart, *command]

    def plug(self, state: str) -> None:
        """`state`: up or down. One end down means that nothing passes, and nobody is told."""
        _ip("-netns", self.name, "link", "set", self.cable, state)

    def processes(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and threads and processes that it starts, are on this host's network meanwhile."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        inside = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_network(inside)
            yield
        finally:
            _set_network(before)
            os.close(before)
            os.close(inside)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts and the cable between them. Raises NoNamespacesError; leaves nothing."""
    first, second = (Host(f"adrenaline-{os.getpid()}-{n}", f"10.213.77.{n}") for n in (1, 2))
    with contextlib.ExitStack() as stack:
        for host in (first, second):
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "delete", host.name)
        _ip(
            "-netns", first.name, "link", "add", first.cable, "type", "veth", "peer", second.cable, "netns", second.name
        )
        for host in (first, second):
            _ip("-netns", host.name, "address", "add", f"{host.address}/24", "dev", host.cable)
            _ip("-netns", host.name, "link", "set", "lo", "up")
            host.plug("up")
        yield first, second
        assert not first.processes() and not second.processes(), "processes outlive their servers"


def _ip(*args: str) -> str:
    try:
        return subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=10).stdout
    except OSError as error:
        raise NoNamespacesError(f"ip (iproute2) cannot be run: {error}") from None
    except subprocess.CalledProcessError as error:
        raise NoNamespacesError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None


def _set_network(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns failed")
