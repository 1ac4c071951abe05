"""Servers as test suites of clients write them by hand, written with the fixture."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from support import TIMEOUT, ChildProcess, connect, in_its_loop, is_echoed, receive_all, receive_exactly, receive_line

from echo_async import sync
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")

BANNER = b"500 go away\r\n"
ANSWERS = {b"PING\n": b"+PONG\r\n", b"GET x\n": b"$1\r\n1\r\n", b"SET x\n": b"+OK\r\n"}
BACKOFF = 0.005  # seconds of a client between two attempts to connect


@pytest.fixture
def make(faulty_server: MakeEchoServer) -> MakeEchoServer:
    return faulty_server


def test_server_that_pushes_bytes_and_closes(make: MakeEchoServer) -> None:
    """They are unread when it closes, and what the client has sent is as well."""
    server = make(greeting=BANNER, replies=[])
    with connect(server) as client:
        client.sendall(b"x" * 10_000)
        server.wait_for(bytes_in=10_000)
        assert receive_all(client) == BANNER
    server.wait_for(active=0)
    assert server.connections[0].end == "server"


def test_server_that_greets_with_a_malformed_line(make: MakeEchoServer) -> None:
    malformed = b"\xff\x00 no protocol at all"
    server = make(greeting=malformed)
    with connect(server) as client:
        assert receive_exactly(client, len(malformed)) == malformed


def test_server_that_answers_commands_differently(make: MakeEchoServer) -> None:
    server = make(reply=lambda command: ANSWERS.get(command, b"-ERR\r\n"))
    with connect(server) as client:
        client.sendall(b"PING\nSET x\nGET x\nDEL x\n")
        assert receive_exactly(client, 25) == b"+PONG\r\n+OK\r\n$1\r\n1\r\n-ERR\r\n"
    assert server.received == [b"PING\n", b"SET x\n", b"GET x\n", b"DEL x\n"]


def test_server_that_drops_the_first_connection(make: MakeEchoServer) -> None:
    server = make(fault_sequence=["close", None])
    with connect(server) as client:
        client.sendall(b"one\n")
        assert receive_all(client) == b""
    with connect(server) as client:
        assert is_echoed(client, b"one\n")
    assert [each.messages for each in server.connections] == 2 * [[b"one\n"]]


def test_server_that_stops_answering_after_three_messages(make: MakeEchoServer) -> None:
    server = make(fault="drop,after=3")
    with connect(server) as client:
        client.sendall(b"1\n2\n3\n4\n5\n")
        assert receive_line(client, 6) == b"1\n2\n3\n"
        server.wait_for(messages=5)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""


def test_server_that_returns_on_the_same_port(make: MakeEchoServer) -> None:
    """A client reconnects with back-off while it is gone."""
    server = make()
    attempts: list[str] = []
    waiting = threading.Event()

    def reconnect() -> bytes:
        while True:
            try:
                with connect(server) as client:
                    client.sendall(b"one\n")
                    return receive_line(client)
            except ConnectionRefusedError:
                attempts.append("refused")
                waiting.wait(BACKOFF)

    with connect(server) as client:
        server.wait_for(active=1)
        with server.refusing():
            server.disconnect()
            assert receive_all(client) == b""
            replies: list[bytes] = []
            thread = threading.Thread(target=lambda: replies.append(reconnect()), daemon=True)
            thread.start()
            for _ in range(3):
                with pytest.raises(ConnectionRefusedError):
                    connect(server)
        thread.join(TIMEOUT)
    assert replies == [b"one\n"]
    assert server.received == [b"one\n"]


def test_server_whose_reply_is_late(make: MakeEchoServer) -> None:
    """The client has timed out, and finds the late reply before that to its next message."""
    server = make()
    with connect(server) as client:
        with server.holding():
            client.sendall(b"one\n")
            server.wait_for(messages=1)
            client.settimeout(0.01)
            with pytest.raises(TimeoutError):
                client.recv(1)
        client.settimeout(TIMEOUT)
        client.sendall(b"two\n")
        assert receive_line(client, 8) == b"one\ntwo\n"


def test_server_that_expects_exactly_these_bytes() -> None:
    connect_packet = b"\x10\x09\x00\x04MQTT\x04\x02\x00"

    def serve(peer: Peer) -> None:
        assert peer.receive(11) == connect_packet
        peer.send(b"\x20\x02\x00\x00")

    with HostedServer(handler=serve) as server, connect(server) as client:
        client.sendall(connect_packet)
        assert receive_all(client) == b"\x20\x02\x00\x00"
    server = HostedServer(handler=serve)
    with connect(server) as client, suppress(ConnectionResetError):
        client.sendall(connect_packet[::-1])
        assert receive_all(client) == b""
    with pytest.raises(AssertionError):
        server.close()


def test_server_to_which_nobody_connects(make: MakeEchoServer) -> None:
    """``disconnect`` also accepts what waits, so there is nothing left that could have connected."""
    server, other = make(), make()
    assert sync.echo("one", *other.address) == "one"
    server.disconnect()
    assert server.connections == []
    assert server.stats.accepted == 0


def test_server_that_is_a_sink(make: MakeEchoServer) -> None:
    server = make(fault="drop", mode="raw")
    sent = bytes(range(256)) * 1000
    with connect(server) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
    server.wait_for(active=0)
    assert server.connections[0].received == sent


def test_server_whose_tls_breaks_in_the_handshake(make: MakeEchoServer, client_context: ssl.SSLContext) -> None:
    def serve(peer: Peer) -> None:
        assert peer.receive(1) == b"\x16"  # a handshake record (RFC 8446 section 5.1)
        peer.send(b"\x16\x03\x03\x00")

    server = make(handler=serve)
    with connect(server) as client, pytest.raises(ssl.SSLEOFError):
        client_context.wrap_socket(client, server_hostname="localhost")


def test_server_whose_tls_breaks_within_the_session(make: MakeEchoServer) -> None:
    """Bytes that are no record arrive beneath the session, as from a broken proxy."""

    def serve(peer: Peer) -> None:
        peer.send(peer.receive_line())
        peer.socket.sendall(b"not a record\n")

    server = make(tls=True, handler=serve)
    assert server.client_context is not None
    with server.client_context.wrap_socket(connect(server), server_hostname="localhost") as client:
        assert is_echoed(client, b"secret\n")
        with pytest.raises(ssl.SSLError):
            client.recv(1)


def test_server_whose_tls_breaks_within_a_reply(make: MakeEchoServer) -> None:
    server = make(tls=True, fault="reset=5")
    assert server.client_context is not None
    with server.client_context.wrap_socket(connect(server), server_hostname="localhost") as client:
        client.sendall(b"secret\n")
        assert receive_exactly(client, 5) == b"secre"
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""


@in_its_loop
async def test_server_that_vanishes_while_a_reply_is_outstanding(make: MakeEchoServer) -> None:
    server = make()
    reader, writer = await asyncio.open_connection(*server.address)
    with server.holding():
        writer.write(b"one\n")
        await asyncio.to_thread(server.wait_for, messages=1)
        server.disconnect(reset=True)
        with pytest.raises(ConnectionResetError):
            await reader.readline()
    writer.close()


# Refusing


TAKE_PORTS = """
import socket
held = []
print("ready", flush=True)
while True:
    held.append(socket.socket())
    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held[-1].bind(("127.0.0.1", 0))
    if len(held) > 500:
        for each in held:
            each.close()
        held.clear()
"""


def test_refusing_never_loses_its_port(make: MakeEchoServer) -> None:
    """A client reconnects all the time, and another process takes free ports."""
    server = make()
    stop = threading.Event()
    unexpected: list[BaseException] = []

    def reconnect() -> None:
        while not stop.is_set():
            try:
                with connect(server) as client:
                    is_echoed(client)
            except ConnectionError:
                pass
            except OSError as error:
                unexpected.append(error)

    with ChildProcess([sys.executable, "-c", TAKE_PORTS], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        thread = threading.Thread(target=reconnect, daemon=True)
        thread.start()
        for _ in range(100):
            with server.refusing(), pytest.raises(ConnectionRefusedError):
                connect(server)
            with connect(server) as client:
                assert is_echoed(client, b"one\n")
        stop.set()
        thread.join(TIMEOUT)
        process.kill()
    assert unexpected == []
