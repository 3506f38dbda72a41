"""ZMQ over TCP: what the control plane and the channel between hosts share about addresses."""

from __future__ import annotations

import socket

import zmq

from sglang_adrenaline.errors import ConfigError


def endpoint(host: str, port: int) -> str:
    """Where to connect to; `host` is a name, an IPv4 or an IPv6 address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def own_endpoint(host: str, port: int) -> str:
    """Where to listen, port 0 for any. Raises ConfigError if `host` cannot be resolved: ZMQ binds to numbers only."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"control host {host!r} cannot be resolved: {error.strerror}") from None
    ip = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
    return f"tcp://{ip}:{port or '*'}"


def bound_port(sock: zmq.Socket) -> int:
    return int(sock.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2].rstrip("\0"))
