"""Channel between hosts, beyond what `test_channel.py` asks of every kind: strangers, garbage, silence, ports."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import struct
import time
from contextlib import closing

import msgspec
import pytest
import torch
from test_channel import SHAPE, answer, executor_process, random_q, receive, run_layer, spawn, take

from sglang_adrenaline.channel import net, wire
from sglang_adrenaline.errors import ChannelError, PeerLostError

__all__ = ["spawn"]  # a fixture

ANY = range(1)
HOST = "127.0.0.1"
CALL, ANSWER, CLOSED, ABORT = 1, 2, 3, 4


def header(kind: int, rows: int = 0, layer: int = 0, step: int = 1) -> bytes:
    return struct.pack("<HHIQ", kind, rows, layer, step)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def call_of(lanes: list[int], q_rows: int | None = None, **fields: int) -> bytes:
    q = torch.zeros(len(lanes) if q_rows is None else q_rows, SHAPE.num_qo_heads, SHAPE.head_dim)
    return header(CALL, **{"rows": len(lanes), **fields}) + struct.pack(f"<{len(lanes)}i", *lanes) + bytes_of(q)


def raw_decode_end(executor: net.NetExecutorEnd) -> wire.Wire:
    """The connection of a decode instance that may send anything."""
    return wire.connect(HOST, int(executor.spec.address), executor.spec.token, 1 << 20, "prefill")


def one_layer(decode, executor) -> None:
    decode.begin_step([3])
    q = random_q(1)
    decode.send_q(0, q)
    call = take(executor)
    assert torch.equal(call.q, q)
    answer(executor, call)
    decode.recv(0)


@pytest.fixture
def executor():
    with closing(net.create_executor_end(SHAPE, host=HOST, ports=ANY)) as end:
        yield end


def test_strangers_neither_enter_nor_disturb(executor):
    port = int(executor.spec.address)
    with socket.create_connection((HOST, port)) as idle, socket.create_connection((HOST, port)) as loud:
        loud.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(4096))
        with closing(net.open_decode_end(executor.spec, host=HOST, wait_timeout=5)) as decode:
            one_layer(decode, executor)
            loud.close()
            late = socket.create_connection((HOST, port))
            late.sendall(os.urandom(100))
            late.close()
            idle.close()
            time.sleep(0.1)
            for _ in range(3):
                one_layer(decode, executor)
            decode.check()


def test_token_is_the_only_key(executor):
    other = msgspec.structs.replace(executor.spec, token=secrets.token_hex(16))
    start = time.monotonic()
    with pytest.raises(ChannelError, match=f"{HOST}:{executor.spec.address} cannot be reached"):
        net.open_decode_end(other, host=HOST, wait_timeout=1)
    assert time.monotonic() - start < wire.CONNECT_TIMEOUT_S + 1
    assert executor.wait_call(0.1) is None


def test_second_decode_end_changes_nothing_for_the_first(executor):
    with closing(net.open_decode_end(executor.spec, host=HOST, wait_timeout=5)) as decode:
        one_layer(decode, executor)
        second = net.open_decode_end(executor.spec, host=HOST, wait_timeout=0.3)
        with pytest.raises(PeerLostError):
            second.begin_step([0])
            second.send_q(0, random_q(1))
            second.recv(0)
        one_layer(decode, executor)
        second.close()
        time.sleep(0.1)
        one_layer(decode, executor)


def test_nobody_listening_is_told_at_once(executor):
    executor.close()
    start = time.monotonic()
    with pytest.raises(ChannelError, match="cannot be reached"):
        net.open_decode_end(executor.spec, host=HOST, wait_timeout=1)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("address", ["", "x", "0", "65536", "-1", "1:2", "٣"])
def test_address_that_is_no_port_is_refused(executor, address):
    with pytest.raises(ChannelError, match="is a port"):
        net.open_decode_end(msgspec.structs.replace(executor.spec, address=address), host=HOST, wait_timeout=1)


def test_unexpected_shape_is_refused_before_connecting(executor):
    expected = msgspec.structs.replace(SHAPE, head_dim=128)
    with pytest.raises(ChannelError, match="head_dim 8, not 128"):
        net.open_decode_end(executor.spec, host=HOST, wait_timeout=1, expected=expected)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"x", "message of 1 bytes"),
        (header(0), "kind 0"),
        (header(ANSWER, rows=1), "kind 2"),
        (header(77), "kind 77"),
        (call_of([]), "0 rows"),
        (call_of(list(range(17))), "17 rows|connection was closed"),
        (call_of([0, 1], q_rows=1), "2 rows"),
        (call_of([0]) + b"\0", "1 rows"),
        (call_of([0], rows=65535), "65535 rows"),
        (call_of([0], layer=SHAPE.num_layers), "layer 5"),
        (call_of([1, 1]), "lane table"),
        (call_of([16]), "lane table"),
        (call_of([-1]), "lane table"),
        (header(ABORT) + b"\xff\xfe" + b"x" * 500, "closed the channel"),
        (bytes(1 << 16), "connection was closed"),
    ],
)
def test_garbage_from_decode_ends_the_channel(executor, message, complaint):
    with closing(raw_decode_end(executor)) as peer:
        peer.send(message)
        with pytest.raises(PeerLostError, match=complaint):
            executor.wait_call(5)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (b"x", "message of 1 bytes"),
        (header(CALL, rows=1), "kind 1"),
        (header(ANSWER, rows=1), "1 rows in 16 bytes"),
        (header(ANSWER, rows=2) + bytes(2 * 3 * 4 * 5), "2 rows"),
        (header(ANSWER, rows=1) + bytes(3 * 4 * 5 + 1), "in 77 bytes"),
        (bytes(1 << 16), "connection was closed"),
    ],
)
def test_garbage_from_prefill_is_a_lost_peer(message, complaint):
    """Never another exception: those of the forward pass end the server."""
    token = secrets.token_hex(16)
    listening, port = wire.listen(HOST, ANY, token, 1 << 20, "decode")
    spec = net.ChannelSpec(kind="zmq", address=str(port), token=token, shape=SHAPE)
    with closing(listening), closing(net.open_decode_end(spec, host=HOST, wait_timeout=5)) as decode:
        decode.begin_step([0])
        decode.send_q(0, random_q(1))
        buffer = bytearray(1 << 10)
        while not listening.receive(buffer, 1.0):
            pass
        listening.send(message)
        with pytest.raises(PeerLostError, match=complaint):
            decode.recv(0)
        with pytest.raises(PeerLostError):
            decode.begin_step([0])


def test_silent_peer_is_noticed_before_the_deadline(spawn):
    """A host that is cut off says nothing: here a process that is stopped, I/O thread and all."""
    process, conn = spawn(executor_process, "zmq", SHAPE, "serve")
    with closing(net.open_decode_end(receive(conn), host=HOST, wait_timeout=30)) as decode:
        run_layer(decode, decode.begin_step([1]), 0, [1])
        os.kill(process.pid, signal.SIGSTOP)
        decode.begin_step([0])
        decode.send_q(0, random_q(1))
        start = time.monotonic()
        with pytest.raises(PeerLostError, match="connection was closed"):
            decode.recv(0)
        assert time.monotonic() - start < wire.ASK_S + wire.SILENCE_S + 1.0


def connected_process(conn, ports: list[int], token: str) -> None:
    """Connects to all, says one word to each and waits to be killed."""
    peers = [wire.connect(HOST, port, token, 1 << 10, "prefill") for port in ports]
    for peer in peers:
        peer.send(b"here")
    conn.send("connected")
    time.sleep(60)


@pytest.mark.timeout(60)
def test_word_sent_to_a_peer_that_goes_does_not_hold_close_up(spawn):
    """ZMQ ends a broken connection by the linger its socket had when it was bound: infinite, unless set before."""
    token = secrets.token_hex(16)
    for _ in range(12):  # it takes a word sent in the instant in which ZMQ's thread ends the connection
        wires = [wire.listen(HOST, ANY, token, 1 << 10, "decode") for _ in range(40)]
        process, conn = spawn(connected_process, [port for _, port in wires], token)
        assert receive(conn) == "connected"
        for ours, _ in wires:
            assert ours.receive(bytearray(16), 5) == len(b"here")
        os.kill(process.pid, signal.SIGKILL)
        for ours, _ in wires:
            with pytest.raises(PeerLostError, match="connection was closed"):
                while True:
                    ours.receive(bytearray(16), 1)
            with contextlib.suppress(PeerLostError):
                ours.send(b"bye")
            start = time.monotonic()
            ours.close()
            assert time.monotonic() - start < wire.LINGER_MS / 1000 + 1.0


def test_ports_are_taken_from_the_range(executor):
    taken = int(executor.spec.address)
    with pytest.raises(ChannelError, match=f"no free ports {taken} to {taken} on {HOST}"):
        net.create_executor_end(SHAPE, host=HOST, ports=range(taken, taken + 1))
    with closing(net.create_executor_end(SHAPE, host=HOST, ports=range(taken, taken + 50))) as other:
        assert taken < int(other.spec.address) < taken + 50


def test_address_that_is_not_ours_is_one_error():
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(ChannelError, match=host):
            net.create_executor_end(SHAPE, host=host, ports=ANY)


def test_close_releases_threads_and_descriptors():
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    before = held()
    for _ in range(5):
        executor = net.create_executor_end(SHAPE, host=HOST, ports=ANY)
        decode = net.open_decode_end(executor.spec, host=HOST, wait_timeout=1)
        one_layer(decode, executor)
        decode.close()
        executor.close()
    assert held() == before
