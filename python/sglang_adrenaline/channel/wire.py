"""The connection under a channel between hosts: one ZMQ PAIR socket over TCP, encrypted, that several threads may use.

One end listens, the other connects, and each has an I/O thread of ZMQ's that sends, receives and notices ends by
itself. Both sides' CURVE keys follow from the channel's token, which the control plane hands over encrypted: whoever
does not know it cannot connect, and never reaches the code behind a `Wire`. What messages mean is `net.py`'s business.

Threads. ZMQ sockets serve one thread at a time, so each call on the socket holds a lock and returns at once; sleeping
is done without the lock, on file descriptors. A descriptor of ZMQ's tells of a change once, to whoever calls first, so
sleeps are cut into slices in case that was not the sleeper.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglang_adrenaline import keys, tcp
from sglang_adrenaline.errors import ChannelError, ConfigError, PeerLostError

CONNECT_TIMEOUT_S = 2.0
"""The control connection to the same host stands already."""
ASK_S = 0.5
SILENCE_S = 2.0
"""A host that says nothing for this long, asked every ASK_S, is taken for dead. A decode step stands still meanwhile.
ZMQ's I/O threads ask and answer, which no Python keeps waiting, so it is less than the control plane's patience."""
HANDSHAKE_S = 5.0
SLICE_S = 0.25
"""Longest sleep on descriptors at a time."""
LINGER_MS = 200
MAX_QUEUE = 16
"""Messages under way in each direction; a channel needs two or three."""

_ENCRYPTION_BYTES = 64
"""More than CURVE adds to a message."""
_GREETING = b"sglang-adrenaline channel 1"
_GONE = zmq.Event.DISCONNECTED | zmq.Event.CLOSED | zmq.Event.CONNECT_RETRIED
_EVENTS = zmq.Event.ACCEPTED | zmq.Event.HANDSHAKE_SUCCEEDED | _GONE


class Wire:
    """Messages of at most the size given at the start. `peer` names the other side in errors."""

    def __init__(self, context: zmq.Context, sock: zmq.Socket, peer: str) -> None:
        self.peer = peer
        self._context = context
        self._socket = sock
        self._monitor = sock.get_monitor_socket(_EVENTS)
        self._lock = threading.Lock()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        for source in (sock, self._monitor, self._wakeup):
            self._poll.register(source, select.POLLIN)
        self._peer_fd: int | None = None
        """Of the TCP connection, on the side that listens; -1 on the side that connects; None: not known yet."""
        self._ended_fds: set[int] = set()
        self._secured = False
        self._sleepers = 0
        self._closed = False
        self._released = False

    # ---- messages ---------------------------------------------------------------------------------------------------

    def send(self, message: bytes | bytearray | memoryview) -> None:
        """Copy a message out; it is on its way when this returns. Raises PeerLostError if it cannot be."""
        with self._lock:
            self._require_open()
            try:
                self._socket.send(message, zmq.NOBLOCK)
            except zmq.Again:
                raise PeerLostError(f"{self.peer} cannot be reached: {self._cause() or 'it takes no more'}") from None

    def receive(self, buffer: bytearray, timeout_s: float) -> int:
        """Put the next message into `buffer` and return its size, which is larger than the buffer if it was cut off.

        0: none came so far; `timeout_s` may not have passed. Raises PeerLostError once the connection has ended and
        all that came before was read, or this side was closed.
        """
        size = self._take(buffer)
        if size or timeout_s <= 0:
            return size
        with self._lock:
            self._require_open()
            self._sleepers += 1
        try:
            self._poll.poll(min(timeout_s, SLICE_S) * 1000)
        finally:
            with self._lock:
                self._sleepers -= 1
                if self._closed:
                    self._release()
        return self._take(buffer)

    def check(self) -> None:
        """Raises PeerLostError once the connection has ended. From any thread."""
        with self._lock:
            self._require_open()
            if cause := self._cause():
                raise PeerLostError(f"{self.peer} is gone: {cause}")

    def wake(self) -> None:
        """End the sleep of `receive`, now and from now on. From any thread."""
        with self._lock:
            if not self._released:
                os.eventfd_write(self._wakeup, 1)

    def close(self) -> None:
        """Try for LINGER_MS to get out what was sent, then end the connection. From any thread, idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wakeup, 1)
            if not self._sleepers:  # else the last of them does it: it looks at our descriptors
                self._release()

    # ---- with the lock held -----------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self._closed:
            raise PeerLostError(f"the connection to {self.peer} was closed on this side")

    def _release(self) -> None:
        if self._released or self._sleepers:
            return
        self._released = True
        linger = 0 if self._cause() else LINGER_MS
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger)
        self._context.term()  # bounded by the socket's linger
        os.close(self._wakeup)

    def _cause(self) -> str:
        """Why the connection has ended; empty if it has not."""
        while True:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                break
            kind, fd = event["event"], event["value"]
            if kind == zmq.Event.ACCEPTED:
                self._ended_fds.discard(fd)
            elif kind == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._secured = True
            elif kind & _GONE:
                self._ended_fds.add(-1 if self._peer_fd == -1 else fd)
        if self._peer_fd not in self._ended_fds:
            return ""
        return "its connection was closed"

    # ---- with the lock taken ----------------------------------------------------------------------------------------

    def _take(self, buffer: bytearray) -> int:
        """The size of the next message, 0 if there is none."""
        with self._lock:
            self._require_open()
            size = self._read(buffer)
            if size:
                return size
            cause = self._cause()
            if not cause:
                return 0
            size = self._read(buffer)  # what came between the two looks
            if size:
                return size
            raise PeerLostError(f"{self.peer} is gone: {cause}")

    def _read(self, buffer: bytearray) -> int:
        try:
            if self._peer_fd is None:
                self._meet()
            return self._socket.recv_into(buffer, flags=zmq.NOBLOCK)
        except zmq.Again:
            return 0

    def _meet(self) -> None:
        """Take the first message. It tells which connection is the peer's: strangers' attempts come and go beside."""
        frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        if frame.bytes != _GREETING:
            raise PeerLostError(f"{self.peer} does not speak this version of the channel")
        self._peer_fd = int(frame.get(zmq.SRCFD))

    def _greet(self, timeout_s: float) -> None:
        """On the side that connects: wait until the connection stands. Raises ChannelError."""
        self._peer_fd = -1
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                cause = self._cause()
            if cause:
                raise ChannelError("nobody listens there, or it is another channel")
            if self._secured:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise ChannelError(f"no connection within {timeout_s:g} s")
            self._monitor.poll(max(1, int(left * 1000)))
        self.send(_GREETING)


def listen(host: str, ports: range, token: str, max_bytes: int, peer: str) -> tuple[Wire, int]:
    """The listening end, on the first of `ports` that is free (port 0: any). Returns it and its port.

    Raises ChannelError.
    """
    context, sock = _make_socket(max_bytes)
    try:
        pairs = keys.derive_keys(bytes.fromhex(token))
        sock.curve_server = True
        sock.curve_secretkey = pairs.server.secret
        sock.handshake_ivl = int(HANDSHAKE_S * 1000)
        for port in ports:
            with contextlib.suppress(zmq.ZMQError):
                sock.bind(tcp.own_endpoint(host, port))
                return Wire(context, sock, peer), tcp.bound_port(sock)
        span = f"ports {ports[0]} to {ports[-1]}" if ports[-1] else "port"
        raise ChannelError(f"no free {span} on {host} for a channel")
    except (ChannelError, ConfigError) as error:
        context.destroy(linger=0)
        raise ChannelError(str(error)) from None


def connect(host: str, port: int, token: str, max_bytes: int, peer: str) -> Wire:
    """The connecting end, once the connection stands. Raises ChannelError."""
    context, sock = _make_socket(max_bytes)
    pairs = keys.derive_keys(bytes.fromhex(token))
    sock.curve_serverkey = pairs.server.public
    sock.curve_publickey, sock.curve_secretkey = pairs.client.public, pairs.client.secret
    sock.reconnect_ivl = -1  # the control plane comes back, with another channel
    sock.immediate = True
    wire = Wire(context, sock, peer)
    try:
        sock.connect(tcp.endpoint(host, port))
        wire._greet(CONNECT_TIMEOUT_S)
    except (ChannelError, zmq.ZMQError) as error:
        wire.close()
        raise ChannelError(f"the channel at {host}:{port} cannot be reached: {error}") from None
    return wire


def _make_socket(max_bytes: int) -> tuple[zmq.Context, zmq.Socket]:
    context = zmq.Context(io_threads=1)
    sock = context.socket(zmq.PAIR)
    sock.linger = LINGER_MS  # from the start: it goes for connections that end before the socket is closed, too
    sock.ipv6 = True
    sock.maxmsgsize = max_bytes + _ENCRYPTION_BYTES
    sock.sndhwm = sock.rcvhwm = MAX_QUEUE
    sock.heartbeat_ivl = int(ASK_S * 1000)
    sock.heartbeat_timeout = int(SILENCE_S * 1000)
    return context, sock
