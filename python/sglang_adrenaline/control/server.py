"""The prefill rank's end of the control plane: a ROUTER socket for all decode ranks.

One thread owns the sockets and calls the handler. A peer is a decode instance (by its random id), not a connection: a
HELLO on a new connection replaces the old one, which then counts as lost. Only holders of the deployment's client key
get past the handshake (CURVE; the ZAP requests are answered here, in this server's own ZMQ context).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import Protocol

import zmq
from zmq.utils import z85

from sglang_adrenaline import tcp
from sglang_adrenaline.control.common import (
    JOIN_S,
    LINGER_MS,
    MAX_BURST,
    MAX_QUEUE,
    MAX_WIRE_BYTES,
    LimitedLog,
    Outbox,
    milliseconds_until,
)
from sglang_adrenaline.errors import ConfigError, ControlError
from sglang_adrenaline.keys import ControlKeys
from sglang_adrenaline.messages import (
    PROTOCOL,
    Bye,
    End,
    FromPrefill,
    Heartbeat,
    Hello,
    Offer,
    Refuse,
    Welcome,
    clip,
    decode_from_decode,
    encode,
    foreign_protocol,
)

logger = logging.getLogger(__name__)

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_HEARTBEAT = encode(Heartbeat())


class ServerHandler(Protocol):
    """Called in the server's thread; `peer` is the decode instance's id."""

    def on_hello(self, peer: str, hello: Hello) -> Welcome | Refuse:
        """Admit or refuse. Messages to the peer can be sent once this has returned Welcome."""

    def on_message(self, peer: str, message: Offer | End) -> None:
        """A message of an admitted peer."""

    def on_peer_lost(self, peer: str, reason: str) -> None:
        """An admitted peer left, died, went silent or connected anew. Not called by `close`."""


@dataclass(eq=False)
class _Peer:
    instance: str
    routing_id: bytes
    last_seen: float


class ControlServer:
    """Listens from construction to `close`. Times in seconds. Raises ConfigError if the address cannot be bound."""

    def __init__(
        self,
        host: str,
        port: int,
        keys: ControlKeys,
        handler: ServerHandler,
        *,
        heartbeat_interval: float,
        heartbeat_timeout: float,
    ) -> None:
        self._keys = keys
        self._handler = handler
        self._interval = heartbeat_interval
        self._timeout = heartbeat_timeout
        self._log = LimitedLog(logger)
        self._peers: dict[str, _Peer] = {}  # by instance; written by the I/O thread only
        self._routes: dict[bytes, _Peer] = {}
        self._closing = False
        self._context = zmq.Context(io_threads=1)
        try:
            self._zap = self._context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind(_ZAP_ENDPOINT)
            self._router = self._make_router()
            self.port = self._bind(host, port)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._run, name=f"control-server-{self.port}", daemon=True)
        self._thread.start()

    def send(self, peer: str, message: FromPrefill) -> bool:
        """Queue a message, from any thread, without blocking. False if the peer is not connected or the queue is full.

        Raises ControlError if the message is malformed.
        """
        frame = encode(message)
        session = self._peers.get(peer)
        return session is not None and self._outbox.put((session, frame))

    @property
    def peers(self) -> list[str]:
        """Instances that are admitted and alive."""
        return list(self._peers)

    def close(self) -> None:
        """Say goodbye to all peers and end the thread. From any thread, idempotent."""
        self._closing = True
        self._outbox.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)
            if self._thread.is_alive():
                logger.error("%s did not stop within %g s", self._thread.name, JOIN_S)

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def _make_router(self) -> zmq.Socket:
        router = self._context.socket(zmq.ROUTER)
        router.linger = LINGER_MS
        router.ipv6 = True
        router.curve_server = True
        router.curve_secretkey = self._keys.server.secret
        router.zap_domain = b"sglang-adrenaline"
        router.router_mandatory = True  # sending to a connection that is gone is an error, not silence
        router.maxmsgsize = MAX_WIRE_BYTES
        router.sndhwm = router.rcvhwm = MAX_QUEUE
        router.handshake_ivl = 5000
        return router

    def _bind(self, host: str, port: int) -> int:
        where = tcp.own_endpoint(host, port)
        try:
            self._router.bind(where)
        except zmq.ZMQError as error:
            raise ConfigError(f"control port {host}:{port} cannot be bound: {error.strerror}") from None
        return tcp.bound_port(self._router)

    # ---- I/O thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._zap, self._router, self._outbox.fd):
            poller.register(source, zmq.POLLIN)
        next_beat = time.monotonic() + self._interval
        while not self._closing:
            try:
                events = dict(poller.poll(milliseconds_until(next_beat)))
                if self._zap in events:
                    self._authorise()
                drained = self._router not in events or self._receive()
                if self._outbox.fd in events:
                    self._flush()
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + self._interval
                    for peer in list(self._peers.values()):
                        self._transmit(peer, _HEARTBEAT)
                if drained:  # else a peer may look silent because this thread is behind
                    self._expire(now)
            except Exception:
                self._log.warning("loop", "control server: unexpected error", exc_info=True)
                time.sleep(0.05)
        self._end()

    def _end(self) -> None:
        try:
            self._flush()
            goodbye = encode(Bye("server stops"))
            for peer in list(self._peers.values()):
                with contextlib.suppress(zmq.ZMQError):
                    self._router.send_multipart([peer.routing_id, goodbye], zmq.NOBLOCK)
        finally:
            self._outbox.close()
            self._zap.close()
            self._router.close()
            self._context.term()  # bounded by the router's linger

    def _authorise(self) -> None:
        """Answer a ZAP request: the client key is the only one that opens the door."""
        frames = self._zap.recv_multipart()
        if len(frames) < 6:
            self._zap.send_multipart([b"1.0", b"", b"500", b"malformed request", b"", b""])
            return
        version, request_id, address, mechanism = frames[0], frames[1], frames[3], frames[5]
        good = mechanism == b"CURVE" and len(frames) == 7 and z85.encode(frames[6]) == self._keys.client.public
        if not good:
            self._log.warning(
                "key", "control server: refused a connection from %s: wrong key", address.decode("latin-1")
            )
        status = (b"200", b"OK", b"decode", b"") if good else (b"400", b"wrong key", b"", b"")
        self._zap.send_multipart([version, request_id, *status])

    def _receive(self) -> bool:
        """Handle what is there, at most MAX_BURST messages; True if that was all."""
        for _ in range(MAX_BURST):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if len(frames) == 2:
                self._handle(frames[0], frames[1])
            else:
                self._log.warning("frames", "control server: dropped a message of %d parts", len(frames) - 1)
        return False

    def _handle(self, routing_id: bytes, frame: bytes) -> None:
        peer = self._routes.get(routing_id)
        try:
            message = decode_from_decode(frame)
        except ControlError as error:
            version = foreign_protocol(frame)
            if version is None:
                self._log.warning("malformed", "control server: dropped a message: %s", error)
            else:
                self._refuse(routing_id, f"control protocol {version}; this server speaks {PROTOCOL}")
            return
        if isinstance(message, Hello):
            self._hello(routing_id, message)
        elif peer is None:
            self._log.warning("early", "control server: dropped a message of a connection without HELLO")
        else:
            peer.last_seen = time.monotonic()
            if isinstance(message, Bye):
                self._lose(peer, f"it left: {message.reason}")
            elif not isinstance(message, Heartbeat):
                self._call("on_message", peer.instance, message)

    def _hello(self, routing_id: bytes, hello: Hello) -> None:
        for old in (self._routes.get(routing_id), self._peers.get(hello.instance)):
            if old is not None:
                self._lose(old, "it connected anew")
        if hello.protocol != PROTOCOL:
            self._refuse(routing_id, f"control protocol {hello.protocol}; this server speaks {PROTOCOL}")
            return
        try:
            answer = self._handler.on_hello(hello.instance, hello)
            frame = encode(answer)
        except Exception as error:
            logger.exception("control server: HELLO of %s failed", hello.instance)
            self._refuse(routing_id, f"internal error: {error!r}")
            return
        if isinstance(answer, Refuse):
            self._reply(routing_id, frame)
            return
        admitted = _Peer(hello.instance, routing_id, time.monotonic())
        self._peers[hello.instance] = self._routes[routing_id] = admitted
        self._transmit(admitted, frame)

    def _refuse(self, routing_id: bytes, reason: str) -> None:
        self._reply(routing_id, encode(Refuse(clip(reason))))

    def _reply(self, routing_id: bytes, frame: bytes) -> None:
        with contextlib.suppress(zmq.ZMQError):  # nobody is owed this answer
            self._router.send_multipart([routing_id, frame], zmq.NOBLOCK)

    def _flush(self) -> None:
        items: list[tuple[_Peer, bytes]] = self._outbox.take_all()
        for session, frame in items:
            if self._peers.get(session.instance) is session:
                self._transmit(session, frame)

    def _transmit(self, peer: _Peer, frame: bytes) -> None:
        try:
            self._router.send_multipart([peer.routing_id, frame], zmq.NOBLOCK)
        except zmq.Again:
            self._lose(peer, f"{MAX_QUEUE} messages wait for it")
        except zmq.ZMQError as error:
            gone = error.errno == zmq.EHOSTUNREACH
            self._lose(peer, "its connection was closed" if gone else f"sending failed: {error.strerror}")

    def _expire(self, now: float) -> None:
        for peer in list(self._peers.values()):
            if now - peer.last_seen > self._timeout:
                reason = f"silent for {now - peer.last_seen:.1f} s"
                self._lose(peer, reason)
                self._reply(peer.routing_id, encode(Bye(reason)))  # if it lives after all, it shall begin anew

    def _lose(self, peer: _Peer, reason: str) -> None:
        if self._peers.get(peer.instance) is peer:
            del self._peers[peer.instance]
            self._routes.pop(peer.routing_id, None)
            self._call("on_peer_lost", peer.instance, reason)

    def _call(self, method: str, *args: object) -> None:
        try:
            getattr(self._handler, method)(*args)
        except Exception:
            self._log.warning(method, "control server: %s failed", method, exc_info=True)
