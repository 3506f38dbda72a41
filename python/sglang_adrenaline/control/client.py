"""A decode rank's end of the control plane: one connection to one prefill rank, which comes back by itself.

    CONNECTING -- Welcome --> READY -- closed, silent or Bye --> LOST -- back-off --> CONNECTING ...
        |-- Refuse, or the keys differ --> REFUSED -- REFUSED_RETRY_S --> CONNECTING ...

One thread owns the socket and calls the handler. Every attempt has a socket, hence a server-side identity, of its own,
and begins with a fresh HELLO; what was queued for a session is dropped with it. The socket's monitor shows the end of
the TCP connection at once; heartbeats show the rest.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

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
from sglang_adrenaline.errors import ControlError
from sglang_adrenaline.keys import ControlKeys
from sglang_adrenaline.messages import (
    Accept,
    Bye,
    FromDecode,
    Heartbeat,
    Hello,
    Nack,
    Ready,
    Refuse,
    Stats,
    Welcome,
    decode_from_prefill,
    encode,
)

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S, REFUSED_RETRY_S = 0.2, 2.0, 10.0
_HANDSHAKE_FAILURES = 3  # in a row: then it is the key, not a server that was just going down
_HEARTBEAT = encode(Heartbeat())
_FAILED_HANDSHAKE = (
    zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
)
_GONE = zmq.Event.DISCONNECTED | zmq.Event.CLOSED | zmq.Event.CONNECT_RETRIED
_EVENTS = zmq.Event.CONNECTED | zmq.Event.HANDSHAKE_SUCCEEDED | _FAILED_HANDSHAKE | _GONE


class ClientState(enum.Enum):
    CONNECTING = "connecting"
    READY = "ready"
    LOST = "lost"
    REFUSED = "refused"
    CLOSED = "closed"


class _Link(enum.IntEnum):
    """How far the connection of an attempt has come."""

    NONE = 0
    TCP = 1
    SECURED = 2


class ClientHandler(Protocol):
    """Called in the client's thread."""

    def on_welcome(self, message: Welcome) -> str | None:
        """A session begins; `send` works. A reason not to go on ends it as a refusal of the server would."""

    def on_refused(self, reason: str) -> None:
        """The server will not have us; it is asked again every REFUSED_RETRY_S."""

    def on_message(self, message: Accept | Nack | Ready | Stats) -> None:
        """A message of the current session."""

    def on_lost(self, reason: str) -> None:
        """The session that `on_welcome` began is over. Not called by `close`."""


class _SessionOver(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a session; the text says why."""


class _Refused(_SessionOver):
    """The server answered HELLO with a refusal."""


class _HandshakeFailed(_SessionOver):
    """The TCP connection stood, the encrypted one did not."""


class ControlClient:
    """Connects from construction to `close`. Times in seconds."""

    def __init__(
        self,
        host: str,
        port: int,
        keys: ControlKeys,
        hello: Callable[[], Hello],
        handler: ClientHandler,
        *,
        heartbeat_interval: float,
        heartbeat_timeout: float,
    ) -> None:
        self.state = ClientState.CONNECTING
        self.last_error = ""
        self._endpoint = tcp.endpoint(host, port)
        self._keys = keys
        self._hello = hello
        self._handler = handler
        self._interval = heartbeat_interval
        self._timeout = heartbeat_timeout
        self._log = LimitedLog(logger)
        self._session = 0  # number of the current or last welcome
        self._give_up = (0, "")  # session to be ended, and why
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._outbox = Outbox()
        self._context = zmq.Context(io_threads=1)
        self._thread = threading.Thread(target=self._run, name=f"control-client-{host}-{port}", daemon=True)
        self._thread.start()

    def send(self, message: FromDecode) -> bool:
        """Queue a message, from any thread, without blocking. False without a session or when the queue is full.

        True is no promise: what a session could not deliver is dropped with it. Raises ControlError if the
        message is malformed.
        """
        frame = encode(message)
        session = self._session
        return self.state is ClientState.READY and self._outbox.put((session, frame))

    def wait_ready(self, timeout: float) -> bool:
        """Wait until a session is up and `on_welcome` has returned."""
        return self._ready.wait(timeout)

    def reconnect(self, reason: str) -> None:
        """End the session, as if it had been lost, and begin a new one. From any thread; without a session nothing."""
        self._give_up = (self._session, reason)
        self._outbox.wake()

    def close(self) -> None:
        """Say goodbye and end the thread. From any thread, idempotent."""
        self._closing.set()
        self._outbox.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_S)
            if self._thread.is_alive():
                logger.error("%s did not stop within %g s", self._thread.name, JOIN_S)

    # ---- I/O thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        retry, failures = FIRST_RETRY_S, 0
        while not self._closing.is_set():
            self.state = ClientState.CONNECTING
            sessions = self._session
            try:
                self._attempt()
            except _SessionOver as over:
                self.last_error = str(over)
                failures = failures + 1 if isinstance(over, _HandshakeFailed) else 0
                if isinstance(over, _Refused) or failures >= _HANDSHAKE_FAILURES:
                    self.state = ClientState.REFUSED
                    self._call("on_refused", str(over))
            except Exception as error:
                self.last_error = repr(error)
                self._log.warning("loop", "control client to %s: unexpected error", self._endpoint, exc_info=True)
            if self._session != sessions:
                retry = FIRST_RETRY_S
            self._closing.wait(REFUSED_RETRY_S if self.state is ClientState.REFUSED else retry)
            retry = min(2 * retry, LAST_RETRY_S)
        self.state = ClientState.CLOSED
        self._outbox.close()
        self._context.term()  # bounded by the socket's linger

    def _attempt(self) -> None:
        """One connection from connect to its end, which is told by raising _SessionOver (or by `close`)."""
        dealer = self._make_socket()
        monitor = dealer.get_monitor_socket(_EVENTS)
        try:
            dealer.connect(self._endpoint)
            self._talk(dealer, monitor)
        except Exception as error:
            self._leave_session(str(error) if isinstance(error, _SessionOver) else repr(error))
            raise
        finally:
            dealer.disable_monitor()
            monitor.close(linger=0)
            dealer.close()

    def _make_socket(self) -> zmq.Socket:
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = LINGER_MS
        dealer.ipv6 = True
        dealer.curve_serverkey = self._keys.server.public
        dealer.curve_publickey = self._keys.client.public
        dealer.curve_secretkey = self._keys.client.secret
        dealer.reconnect_ivl = -1  # coming back is this class's business
        dealer.maxmsgsize = MAX_WIRE_BYTES
        dealer.sndhwm = dealer.rcvhwm = MAX_QUEUE
        return dealer

    def _talk(self, dealer: zmq.Socket, monitor: zmq.Socket) -> None:
        poller = zmq.Poller()
        for source in (dealer, monitor, self._outbox.fd):
            poller.register(source, zmq.POLLIN)
        last_seen = next_beat = time.monotonic()
        link = _Link.NONE
        while not self._closing.is_set():
            deadline = next_beat if self.state is ClientState.READY else last_seen + self._timeout
            events = dict(poller.poll(milliseconds_until(deadline)))
            drained = True
            if dealer in events:
                last_seen = time.monotonic()
                drained = self._receive(dealer)
            if drained and monitor in events:  # after what the server said last
                link = self._watch(dealer, monitor, link)
            if self._outbox.fd in events:
                self._flush(dealer)
            if self.state is ClientState.READY and self._give_up[0] == self._session:
                raise _SessionOver(self._give_up[1])
            now = time.monotonic()
            if self.state is ClientState.READY and now >= next_beat:
                next_beat = now + self._interval
                self._transmit(dealer, _HEARTBEAT)
            if drained and now - last_seen > self._timeout:
                silent = f"silent for {now - last_seen:.1f} s"
                raise _SessionOver(silent if link else f"no connection within {self._timeout:g} s")
        if self.state is ClientState.READY:
            self._flush(dealer)
            self._transmit(dealer, encode(Bye("client stops")))

    def _receive(self, dealer: zmq.Socket) -> bool:
        """Handle what is there, at most MAX_BURST messages; True if that was all."""
        for _ in range(MAX_BURST):
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if len(frames) == 1:
                self._handle(frames[0])
            else:
                self._log.warning("frames", "%s: dropped a message of %d parts", self._endpoint, len(frames))
        return False

    def _handle(self, frame: bytes) -> None:
        try:
            message = decode_from_prefill(frame)
        except ControlError as error:
            self._log.warning("malformed", "%s: dropped a message: %s", self._endpoint, error)
            return
        if isinstance(message, Refuse):
            raise _Refused(message.reason)
        if isinstance(message, Bye):
            raise _SessionOver(f"it left: {message.reason}")
        if isinstance(message, Welcome):
            self._enter_session(message)
        elif self.state is not ClientState.READY:
            self._log.warning("early", "%s: dropped a message that came before Welcome", self._endpoint)
        elif not isinstance(message, Heartbeat):
            self._call("on_message", message)

    def _watch(self, dealer: zmq.Socket, monitor: zmq.Socket, link: _Link) -> _Link:
        """Handle the events of the connection; returns how far it has come."""
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.Event.CONNECTED:
                link = _Link.TCP
            elif event == zmq.Event.HANDSHAKE_SUCCEEDED:
                link = _Link.SECURED
                self._transmit(dealer, encode(self._hello()))
            elif link is _Link.SECURED:
                self._receive(dealer)  # a Bye or Refuse that came just before says more
                raise _SessionOver("the connection was closed")
            elif event & _FAILED_HANDSHAKE or link is _Link.TCP:
                raise _HandshakeFailed(
                    "the handshake failed: the two servers' key files differ, or it is no such server"
                )
            else:
                raise _SessionOver("nobody listens there")
        return link

    def _flush(self, dealer: zmq.Socket) -> None:
        for session, frame in self._outbox.take_all():
            if session == self._session and self.state is ClientState.READY:
                self._transmit(dealer, frame)

    def _transmit(self, dealer: zmq.Socket, frame: bytes) -> None:
        try:
            dealer.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            raise _SessionOver(f"{MAX_QUEUE} messages wait for it") from None

    def _enter_session(self, welcome: Welcome) -> None:
        if self.state is ClientState.READY:
            self._log.warning("welcome", "%s: dropped a second Welcome", self._endpoint)
            return
        self._session += 1
        self.state = ClientState.READY
        self.last_error = ""
        obstacle = self._call("on_welcome", welcome)
        if obstacle:
            raise _Refused(obstacle)
        self._ready.set()

    def _leave_session(self, reason: str) -> None:
        self._ready.clear()
        if self.state is ClientState.READY:
            self.state = ClientState.LOST
            self._call("on_lost", reason)

    def _call(self, method: str, *args: object) -> str | None:
        try:
            return getattr(self._handler, method)(*args)
        except Exception:
            self._log.warning(method, "control client to %s: %s failed", self._endpoint, method, exc_info=True)
            return None
