"""Ports of a deployment on one host: checks before anything is started, and the choice of free ones."""

from __future__ import annotations

import argparse
import errno
import random
import socket
from collections.abc import Iterable
from pathlib import Path

from sglang_adrenaline.errors import ConfigError

_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20_000


def port_number(text: str) -> int:
    """argparse type of a port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port in 1..65535")
    return int(text)


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on (host, port) now. Raises ConfigError if `host` is no address of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            return True
    except socket.gaierror:
        raise ConfigError(f"--host {host}: no such address") from None
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise ConfigError(f"--host {host}: cannot listen there: {error.strerror}") from None


def check_free(host: str, ports: Iterable[tuple[str, int]]) -> None:
    """`ports` are (what it is for, port). Raises ConfigError if two are equal or one cannot be had."""
    owners: dict[int, str] = {}
    for what, port in ports:
        if port in owners:
            raise ConfigError(f"{what} and {owners[port]} cannot both have port {port}")
        owners[port] = what
    for port, what in owners.items():
        if port > 65535:
            raise ConfigError(f"{what}: {port} is not a port in 1..65535")
        if not is_free(host, port):
            raise ConfigError(f"{what}: port {port} on {host} is in use")


def control_port(bootstrap_port: int, offset: int, tp_rank: int = 0) -> int:
    """Raises ConfigError if the sum is no port."""
    port = bootstrap_port + offset + tp_rank
    if not 1 <= port <= 65535:
        raise ConfigError(f"control port {bootstrap_port} + {offset} + {tp_rank} = {port} is not in 1..65535")
    return port


def choose_bootstrap_port(host: str, first: int, offset: int, taken: set[int], ranks: int = 1) -> int:
    """The first port from `first` on that is free together with its control ports, one a rank, and not in `taken`."""
    for port in range(first, min(first + 500, 65536 - max(offset, 0) - ranks)):
        needed = {port, *(control_port(port, offset, rank) for rank in range(ranks))}
        if not needed & taken and all(is_free(host, p) for p in needed):
            return port
    raise ConfigError(f"no free bootstrap and control ports from {first} on; give one with --bootstrap-port")


def choose_inner_port(taken: set[int]) -> int:
    """A free port, at random and not in `taken`, that the kernel gives to no outgoing connection in the seconds until
    its server listens. Raises ConfigError if there is none."""
    candidates = range(_LOWEST, _first_outgoing())
    for port in random.SystemRandom().sample(candidates, k=min(500, len(candidates))):
        if port not in taken and is_free("0.0.0.0", port):
            return port
    raise ConfigError(f"no free port found in {candidates.start}..{candidates.stop - 1}; give one with --nccl-port")


def _first_outgoing() -> int:
    """Where the kernel's range for outgoing connections begins; its default where that cannot be read or is too low."""
    try:
        first = int(_OUTGOING.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 0
    return first if first >= _LOWEST + 1000 else 32_768
