"""Control plane: sessions, deaths, keys, and everything that may be thrown at an open port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import msgspec
import pytest
import zmq

from sglang_adrenaline.channel.base import ChannelShape, ChannelSpec
from sglang_adrenaline.control import ClientState, ControlClient, ControlServer
from sglang_adrenaline.control.common import LimitedLog, Outbox
from sglang_adrenaline.errors import ConfigError, ControlError
from sglang_adrenaline.keys import derive_keys
from sglang_adrenaline.messages import (
    PROTOCOL,
    Accept,
    Bye,
    End,
    Heartbeat,
    Hello,
    ModelShape,
    Offer,
    Ready,
    Refuse,
    Welcome,
    decode_from_prefill,
    encode,
)

SECRET = bytes(range(32))
KEYS = derive_keys(SECRET)
SHAPE = ChannelShape(lanes=4, num_layers=2, num_qo_heads=2, head_dim=8, v_head_dim=8, dtype="float32")
SPEC = ChannelSpec(kind="shm", address="1:3", token="0" * 32, shape=SHAPE)
MODEL = ModelShape(
    fingerprint="m",
    num_layers=2,
    num_qo_heads=2,
    num_kv_heads=1,
    head_dim=8,
    v_head_dim=8,
    dtype="float32",
    kv_dtype="float32",
    sm_scales=[0.5, 0.5],
    logit_caps=[0.0, 0.0],
)


def make_hello(instance: str | None = None) -> Hello:
    return Hello(
        protocol=PROTOCOL,
        instance=instance or uuid.uuid4().hex,
        sglang_version="0.5.17",
        model=MODEL,
        host_id="h",
        pid=os.getpid(),
        tp_rank=0,
        tp_size=1,
        page_size=1,
        lanes_wanted=4,
    )


class Recorder:
    """Handler of either end; keeps what it was told, as (kind, ...) tuples."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.changed = threading.Condition()
        self.answer: Welcome | Refuse = Welcome(instance="f" * 32, channel=SPEC)
        self.raises: str | None = None
        self.obstacle: str | None = None

    def note(self, *event) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()
        if self.raises == event[0]:
            raise RuntimeError("handler fails on purpose")

    def on_hello(self, peer, hello):
        self.note("hello", peer)
        return self.answer

    def on_message(self, *args):
        self.note("message", *args)

    def on_peer_lost(self, peer, reason):
        self.note("peer_lost", peer, reason)

    def on_welcome(self, message):
        self.note("welcome", message)
        return self.obstacle

    def on_refused(self, reason):
        self.note("refused", reason)

    def on_lost(self, reason):
        self.note("lost", reason)

    def of(self, kind: str) -> list[tuple]:
        with self.changed:
            return [event for event in self.events if event[0] == kind]

    def wait(self, kind: str, count: int = 1, timeout: float = 10.0) -> list[tuple]:
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                found = [event for event in self.events if event[0] == kind]
                if len(found) >= count:
                    return found
                assert self.changed.wait(max(0.0, deadline - time.monotonic())), (kind, count, self.events[-5:])


@pytest.fixture
def stack():
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        yield stack
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads, threading.enumerate()


def serve(stack, handler=None, port=0, keys=KEYS, timeout=3.0) -> ControlServer:
    server = ControlServer(
        "127.0.0.1", port, keys, handler or Recorder(), heartbeat_interval=0.1, heartbeat_timeout=timeout
    )
    stack.callback(server.close)
    return server


def connect(stack, port, handler=None, keys=KEYS, instance=None, timeout=3.0) -> ControlClient:
    client = ControlClient(
        "127.0.0.1",
        port,
        keys,
        lambda: make_hello(instance),
        handler or Recorder(),
        heartbeat_interval=0.1,
        heartbeat_timeout=timeout,
    )
    stack.callback(client.close)
    return client


def raw_dealer(stack, port, keys=KEYS) -> zmq.Socket:
    """A peer with the right key that can send anything."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.sndtimeo = dealer.rcvtimeo = 5000
    dealer.curve_serverkey = keys.server.public
    dealer.curve_publickey, dealer.curve_secretkey = keys.client.public, keys.client.secret
    dealer.connect(f"tcp://127.0.0.1:{port}")
    stack.callback(context.destroy, linger=0)
    return dealer


def until(condition, timeout=10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_session_messages_both_ways_in_order(stack):
    ours, theirs = Recorder(), Recorder()
    server = serve(stack, ours)
    client = connect(stack, server.port, theirs)
    assert client.wait_ready(10) and client.state is ClientState.READY
    assert theirs.wait("welcome")[0][1].channel == SPEC
    (_, peer), *_ = ours.wait("hello")
    assert server.peers == [peer]
    for room in range(100):
        assert client.send(Offer(room=room, remote_prefix_len=1, prompt_len=2))
        assert server.send(peer, Accept(room))
    assert [event[2].room for event in ours.wait("message", 100)] == list(range(100))
    assert [event[1].room for event in theirs.wait("message", 100)] == list(range(100))
    assert all(event[1] == peer for event in ours.of("message"))


def test_send_malformed_message_raises_at_the_sender(stack):
    server = serve(stack)
    client = connect(stack, server.port)
    assert client.wait_ready(10)
    with pytest.raises(ControlError, match="room"):
        client.send(End(room=-1, last_step=0))


def test_send_without_session_returns_false(stack):
    client = connect(stack, free_port())
    assert not client.wait_ready(0.3)
    assert not client.send(Heartbeat())
    assert not serve(stack).send("a" * 32, Accept(1))


def test_client_started_before_server_connects_later(stack):
    port = free_port()
    client = connect(stack, port)
    assert not client.wait_ready(0.5)
    serve(stack, port=port)
    assert client.wait_ready(10)


def test_server_close_says_bye_and_client_reconnects(stack):
    theirs = Recorder()
    server = serve(stack)
    port = server.port
    client = connect(stack, port, theirs)
    assert client.wait_ready(10)
    server.close()
    ((_, reason),) = theirs.wait("lost")
    assert "server stops" in reason
    serve(stack, port=port)
    theirs.wait("welcome", 2)
    until(lambda: client.state is ClientState.READY)


def test_client_close_says_bye(stack):
    ours = Recorder()
    server = serve(stack, ours, timeout=60.0)
    client = connect(stack, server.port)
    assert client.wait_ready(10)
    client.close()
    ((_, _, reason),) = ours.wait("peer_lost")
    assert "client stops" in reason
    assert client.state is ClientState.CLOSED and server.peers == []


def test_hello_refused_is_told_and_asked_again_rarely(stack):
    ours, theirs = Recorder(), Recorder()
    ours.answer = Refuse("head_dim 64, not 128")
    server = serve(stack, ours)
    client = connect(stack, server.port, theirs)
    assert theirs.wait("refused") == [("refused", "head_dim 64, not 128")]
    until(lambda: client.state is ClientState.REFUSED)
    time.sleep(1.0)
    assert len(ours.of("hello")) == 1 and server.peers == []
    assert not client.send(Heartbeat())


def test_welcome_that_cannot_be_used_is_a_refusal_and_asked_for_again_rarely(stack):
    ours, theirs = Recorder(), Recorder()
    theirs.obstacle = "its channel cannot be opened"
    server = serve(stack, ours)
    client = connect(stack, server.port, theirs)
    assert theirs.wait("refused") == [("refused", "its channel cannot be opened")]
    until(lambda: client.state is ClientState.REFUSED and server.peers == [])
    assert len(theirs.of("welcome")) == 1 and len(ours.of("peer_lost")) == 1
    assert not client.send(Heartbeat()) and not client.wait_ready(0)


def test_hello_of_known_instance_replaces_the_connection(stack):
    ours = Recorder()
    server = serve(stack, ours)
    instance = uuid.uuid4().hex
    first, second = raw_dealer(stack, server.port), raw_dealer(stack, server.port)
    first.send(encode(make_hello(instance)))
    assert isinstance(decode_from_prefill(first.recv()), Welcome)
    second.send(encode(make_hello(instance)))
    assert isinstance(decode_from_prefill(second.recv()), Welcome)
    assert [event[:2] for event in ours.events] == [("hello", instance), ("peer_lost", instance), ("hello", instance)]
    first.send(encode(End(room=1, last_step=0)))  # the replaced connection has no say any more
    second.send(encode(End(room=2, last_step=0)))
    assert [event[2].room for event in ours.wait("message")] == [2]
    assert server.peers == [instance]


def test_silent_peer_is_lost_on_the_server(stack):
    ours = Recorder()
    server = serve(stack, ours, timeout=0.6)
    dealer = raw_dealer(stack, server.port)
    dealer.send(encode(make_hello()))
    ((_, _, reason),) = ours.wait("peer_lost", timeout=5)
    assert "silent" in reason


def test_silent_server_is_lost_on_the_client(stack):
    """A ROUTER that welcomes and then says nothing, as a stopped process would."""
    context = zmq.Context()
    stack.callback(context.destroy, linger=0)
    router = context.socket(zmq.ROUTER)
    router.curve_server, router.curve_secretkey = True, KEYS.server.secret
    router.rcvtimeo = 5000
    port = router.bind_to_random_port("tcp://127.0.0.1")
    theirs = Recorder()
    connect(stack, port, theirs, timeout=0.6)
    routing_id, _ = router.recv_multipart()
    router.send_multipart([routing_id, encode(Welcome(instance="e" * 32, channel=SPEC))])
    ((_, reason),) = theirs.wait("lost", timeout=5)
    assert "silent" in reason


def test_handler_exceptions_do_not_stop_either_side(stack):
    ours, theirs = Recorder(), Recorder()
    ours.raises = theirs.raises = "message"
    server = serve(stack, ours)
    client = connect(stack, server.port, theirs)
    assert client.wait_ready(10)
    for room in range(3):
        client.send(End(room=room, last_step=0))
        server.send(server.peers[0], Accept(room))
    ours.wait("message", 3)
    theirs.wait("message", 3)
    assert client.state is ClientState.READY


def test_hello_handler_exception_refuses(stack):
    ours, theirs = Recorder(), Recorder()
    ours.raises = "hello"
    server = serve(stack, ours)
    connect(stack, server.port, theirs)
    ((_, reason),) = theirs.wait("refused")
    assert "internal error" in reason


def test_port_in_use_is_one_config_error(stack):
    server = serve(stack)
    with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}") as error:
        serve(stack, port=server.port)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_unusable_host_is_config_error(host):
    with pytest.raises(ConfigError, match="control"):
        ControlServer(host, 0, KEYS, Recorder(), heartbeat_interval=1, heartbeat_timeout=2)


# ---- hostile or broken peers ----------------------------------------------------------------------------------------


def test_wrong_key_is_refused_and_right_one_served(stack):
    ours, theirs = Recorder(), Recorder()
    server = serve(stack, ours)
    client = connect(stack, server.port, theirs, keys=derive_keys(bytes(32)))
    ((_, reason),) = theirs.wait("refused", timeout=15)
    assert "key" in reason and client.state is ClientState.REFUSED
    assert ours.events == []
    assert connect(stack, server.port).wait_ready(10)


def test_foreign_client_key_with_known_server_key_is_refused(stack):
    """Whoever learned the server's public key still needs the client's secret one."""
    ours = Recorder()
    server = serve(stack, ours)
    foreign = derive_keys(bytes(32))
    dealer = raw_dealer(stack, server.port, type(KEYS)(server=KEYS.server, client=foreign.client))
    monitor = dealer.get_monitor_socket(zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_SUCCEEDED)
    dealer.send(encode(make_hello()))
    assert monitor.poll(5000)
    assert zmq.utils.monitor.recv_monitor_message(monitor)["event"] == zmq.Event.HANDSHAKE_FAILED_AUTH
    assert ours.events == []
    dealer.disable_monitor()
    monitor.close(linger=0)


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff" * 10_000,
    os.urandom(100_000),
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48),
    b"",
]


def test_garbage_on_the_tcp_port_leaves_peers_alone(stack):
    ours, theirs = Recorder(), Recorder()
    server = serve(stack, ours)
    client = connect(stack, server.port, theirs)
    assert client.wait_ready(10)
    for _ in range(10):
        for garbage in GARBAGE:
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock, contextlib.suppress(OSError):
                sock.sendall(garbage)
    client.send(End(room=7, last_step=0))
    assert ours.wait("message")[0][2].room == 7
    assert theirs.of("lost") == [] and ours.of("peer_lost") == []


MALFORMED = {
    "empty": b"",
    "no msgpack": b"\xc1\xff",
    "truncated": encode(make_hello())[:-9],
    "nested": b"\x91" * 50_000,
    "unknown tag": msgspec.msgpack.encode({"type": "shutdown"}),
    "no tag": msgspec.msgpack.encode({"room": 1}),
    "wrong direction": encode(Ready(room=1, lane=1)),
    "bad field": msgspec.msgpack.encode({"type": "end", "room": -1, "last_step": 0}),
    "huge room": msgspec.msgpack.encode({"type": "end", "room": 2**63, "last_step": 0}),
    "split beyond prompt": msgspec.msgpack.encode(
        {"type": "offer", "room": 1, "remote_prefix_len": 9, "prompt_len": 8}
    ),
    "oversized": encode(Bye("x")) + b"\0" * 70_000,
    "no utf-8": b"\x82\xa4type\xa3bye\xa6reason\xa2\xff\xfe",
}


@pytest.mark.parametrize("introduced", [False, True])
def test_malformed_messages_are_dropped(stack, introduced):
    ours = Recorder()
    server = serve(stack, ours)
    dealer = raw_dealer(stack, server.port)
    if introduced:
        dealer.send(encode(make_hello()))
        assert isinstance(decode_from_prefill(dealer.recv()), Welcome)
    for frame in MALFORMED.values():
        dealer.send(frame)
        dealer.send_multipart([frame, frame])
    dealer.send(encode(make_hello() if not introduced else End(room=5, last_step=1)))
    if introduced:
        assert [event[2].room for event in ours.wait("message")] == [5]
    else:
        ours.wait("hello")
        assert ours.of("message") == []
    assert ours.of("peer_lost") == []


def test_message_beyond_the_wire_limit_cuts_the_connection_only(stack):
    ours = Recorder()
    server = serve(stack, ours)
    client = connect(stack, server.port)
    assert client.wait_ready(10)
    dealer = raw_dealer(stack, server.port)
    dealer.send(encode(make_hello()))
    ours.wait("hello", 2)
    dealer.send(bytes(10_000_000))
    ours.wait("peer_lost")
    assert client.state is ClientState.READY and len(server.peers) == 1


def test_message_before_hello_is_dropped(stack):
    ours = Recorder()
    dealer = raw_dealer(stack, serve(stack, ours).port)
    dealer.send(encode(End(room=1, last_step=0)))
    dealer.send(encode(make_hello()))
    ours.wait("hello")
    assert ours.of("message") == []


@pytest.mark.parametrize("extra", [{}, {"fields": "of the future"}])
def test_hello_of_another_protocol_is_refused_in_words(stack, extra):
    ours = Recorder()
    dealer = raw_dealer(stack, serve(stack, ours).port)
    hello = msgspec.to_builtins(make_hello()) | {"protocol": PROTOCOL + 1} | extra
    if extra:
        del hello["model"]
    dealer.send(msgspec.msgpack.encode(hello))
    answer = decode_from_prefill(dealer.recv())
    assert isinstance(answer, Refuse) and str(PROTOCOL + 1) in answer.reason
    assert ours.events == []


def test_flood_leaves_other_peers_served(stack):
    """10,000 good and 10,000 bad messages of one peer, another peer's messages in between."""
    ours, theirs = Recorder(), Recorder()
    server = serve(stack, ours)
    client = connect(stack, server.port, theirs)
    assert client.wait_ready(10)
    flooder = raw_dealer(stack, server.port)
    flooder.sndtimeo = 20_000
    flooder.send(encode(make_hello("a" * 32)))
    ours.wait("hello", 2)
    slowest = 0.0
    for round_ in range(10):
        for _ in range(1000):
            flooder.send(encode(Offer(room=1, remote_prefix_len=1, prompt_len=1)))
            flooder.send(b"\xc1 not a message")
        start = time.monotonic()
        assert client.send(End(room=round_, last_step=0))
        until(lambda n=round_: sum(event[1] != "a" * 32 for event in ours.of("message")) > n)
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 2.0
    until(lambda: sum(event[1] == "a" * 32 for event in ours.of("message")) == 10_000, timeout=30)
    assert theirs.of("lost") == [] and ours.of("peer_lost") == []


def test_client_drops_malformed_messages(stack):
    context = zmq.Context()
    stack.callback(context.destroy, linger=0)
    router = context.socket(zmq.ROUTER)
    router.curve_server, router.curve_secretkey = True, KEYS.server.secret
    router.rcvtimeo = 5000
    port = router.bind_to_random_port("tcp://127.0.0.1")
    theirs = Recorder()
    connect(stack, port, theirs, timeout=10)
    routing_id, _ = router.recv_multipart()
    for frame in [encode(Accept(1)), encode(Welcome(instance="e" * 32, channel=SPEC)), *MALFORMED.values()]:
        if frame != MALFORMED["wrong direction"]:  # Ready is fine in this direction
            router.send_multipart([routing_id, frame])
    router.send_multipart([routing_id, encode(make_hello())])
    router.send_multipart([routing_id, encode(Accept(2))])
    assert [event[1].room for event in theirs.wait("message")] == [2]
    assert theirs.of("lost") == []


# ---- deaths ---------------------------------------------------------------------------------------------------------

PEER = """
import sys, time
sys.path.insert(0, {folder!r})
from test_control import *
role, port = sys.argv[1], int(sys.argv[2])
handler = Recorder()
if role == "server":
    end = ControlServer("127.0.0.1", port, KEYS, handler, heartbeat_interval=0.1, heartbeat_timeout=60)
else:
    end = ControlClient("127.0.0.1", port, KEYS, make_hello, handler, heartbeat_interval=0.1, heartbeat_timeout=60)
time.sleep(120)
"""


def spawn(stack, role: str, port: int) -> subprocess.Popen:
    script = PEER.format(folder=os.path.dirname(__file__))
    process = subprocess.Popen([sys.executable, "-c", script, role, str(port)])
    stack.callback(process.wait, 10)
    stack.callback(process.kill)
    return process


def test_killed_server_is_noticed_at_once_and_met_again(stack):
    port, theirs = free_port(), Recorder()
    process = spawn(stack, "server", port)
    client = connect(stack, port, theirs, timeout=60.0)
    assert client.wait_ready(20)
    process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    theirs.wait("lost", timeout=2)
    assert time.monotonic() - start < 1.5
    spawn(stack, "server", port)
    theirs.wait("welcome", 2, timeout=20)


def test_killed_client_is_noticed_by_the_next_heartbeat(stack):
    ours = Recorder()
    server = serve(stack, ours, timeout=60.0)
    process = spawn(stack, "client", server.port)
    ours.wait("hello", timeout=20)
    process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    ours.wait("peer_lost", timeout=5)
    assert time.monotonic() - start < 2.0
    assert server.peers == []


def test_stopped_client_is_lost_and_comes_back(stack):
    """SIGSTOP: the connection stays open, only the heartbeats end."""
    ours = Recorder()
    server = serve(stack, ours, timeout=1.0)
    process = spawn(stack, "client", server.port)
    ours.wait("hello", timeout=20)
    process.send_signal(signal.SIGSTOP)
    ((_, _, reason),) = ours.wait("peer_lost", timeout=5)
    assert "silent" in reason
    process.send_signal(signal.SIGCONT)
    ours.wait("hello", 2, timeout=10)


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_close_releases_descriptors(stack):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        server = serve(stack)
        client = connect(stack, server.port)
        assert client.wait_ready(10)
        client.close()
        server.close()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_outbox_full_and_closed_refuse():
    outbox = Outbox(limit=2)
    assert [outbox.put(n) for n in range(3)] == [True, True, False]
    assert outbox.take_all() == [0, 1] and outbox.take_all() == []
    outbox.close()
    outbox.close()
    assert not outbox.put(1)
    outbox.wake()


def test_limited_log_writes_one_line_per_kind_and_counts(caplog):
    import logging

    log = LimitedLog(logging.getLogger("limited"), interval_s=0.05)
    for _ in range(5):
        log.warning("a", "first")
        log.warning("b", "second")
    time.sleep(0.06)
    log.warning("a", "first")
    texts = [record.getMessage() for record in caplog.records]
    assert texts == ["first", "second", "first (4 more like this)"]
