"""Conformance of every engine with the wire protocol, over real sockets.

``support.BACKENDS`` lists the engines. The clients are blocking sockets in the thread of the test, and the server runs
in its own thread, so that no test depends on the implementation of an engine.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from support import StartServer, connect, is_closed, is_echoed, receive_all, receive_line, wait_for

from echo_async.config import Mode

pytestmark = pytest.mark.usefixtures("no_leaks")


EDGES = [b"x" * (size - 1) + b"\n" for size in (1, 2, 19, 20, 21, 40, 41, 10_000)]
TEXTS = ["ñandú " * 9 + "\n", "😀" * 30 + "\n", *(" " * pad + "ñ€😀 eñe\n" for pad in range(14, 22))]
BYTES = [b"\xff\xfe\xc0\x80\xed\xa0\x80\xf0\x9f\n", b"nul \0 and\rreturn\r\n", b"\x1b[2J\xe2\x80\xae\n"]
MESSAGES = [*EDGES, *(text.encode() for text in TEXTS), *BYTES]


def test_message_mode_echoes_once_and_closes(start_server: StartServer) -> None:
    with start_server() as server:
        for message in MESSAGES:
            with connect(server) as client:
                client.sendall(message)
                assert receive_all(client) == message
        assert server.stats.messages == len(MESSAGES)
        assert server.stats.bytes_out == sum(map(len, MESSAGES))


def test_stream_mode_echoes_messages_in_order(start_server: StartServer) -> None:
    with start_server(mode="stream") as server, connect(server) as client:
        for message in MESSAGES:
            assert is_echoed(client, message)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""
    assert server.stats.messages == len(MESSAGES)


def test_raw_mode_echoes_bytes_as_they_arrive(start_server: StartServer) -> None:
    with start_server(mode="raw") as server, connect(server) as client:
        client.sendall(b"no newline")
        assert client.recv(100) == b"no newline"
        for message in MESSAGES:
            client.sendall(message)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"".join(MESSAGES)


@pytest.mark.parametrize("mode", ["message", "stream", "raw"])
def test_message_sent_byte_by_byte_is_echoed(start_server: StartServer, mode: Mode) -> None:
    message = "¡Hola Server! ñ😀\n".encode()
    with start_server(mode=mode) as server, connect(server) as client:
        for index in range(len(message)):
            client.sendall(message[index : index + 1])
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == message


def test_lingering_close_with_more_input_sends_no_reset(start_server: StartServer) -> None:
    """What follows the message is more than is read ahead: to discard it, the server has to resume reading."""
    more = b"x" * 300_000
    for first, later in ((b"first\n", more), (more + b"\n", b"")):
        with start_server() as server, connect(server) as client:
            client.sendall(first + more)
            client.sendall(more)
            if not later:
                client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == first
            if later:
                client.sendall(later)
                client.shutdown(socket.SHUT_WR)
            received = len(first + more + more + later)
            wait_for(server, active=0, messages=1, bytes_in=received, ended={"closed": 1})


def test_message_over_the_limit_closes_the_connection(start_server: StartServer) -> None:
    with start_server(mode="stream", limit_message_size=64) as server:
        with connect(server) as client:
            client.sendall(b"x" * 63 + b"\n" + b"ok\n" + b"y" * 64 + b"\nnever\n")
            assert receive_all(client) == b"x" * 63 + b"\nok\n"
        with connect(server) as client:
            client.sendall(b"z" * 100_000)
            assert receive_all(client) == b""
        wait_for(server, active=0)
        assert server.stats.too_long == 2
        assert server.stats.lost == 0


def test_large_message_to_a_late_reader_is_unchanged(start_server: StartServer) -> None:
    message = os.urandom(4_000_000).replace(b"\n", b"") + b"\n"
    with start_server(limit_message_size=8_000_000, chunk_size=65536) as server, connect(server) as client:
        client.sendall(message)  # the server answers, and the client reads, only after the whole message
        assert receive_all(client) == message


def test_close_with_idle_clients_frees_the_port(start_server: StartServer, reserved_port: int) -> None:
    with start_server(mode="stream", port=reserved_port) as server:
        clients = [connect(server) for _ in range(50)]
        wait_for(server, active=50)
        address = server.address
        server.close()
        server.close()
        for client in clients:
            assert receive_all(client) == b""
            client.close()
    assert not server.is_serving()
    assert server.sockets == ()
    assert isinstance(address, tuple)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    with start_server(port=address[1]) as again:
        assert again.address == address


@pytest.mark.parametrize("fault", [None, "slice=3"])
def test_close_during_a_message_waits_for_its_end(start_server: StartServer, fault: str | None) -> None:
    with start_server(mode="stream", fault=fault) as server, connect(server) as idle, connect(server) as busy:
        busy.sendall(b"done\nfirst half, ")
        assert receive_line(busy) == b"done\n"
        server.close()
        assert receive_all(idle) == b""  # the connections are stopping
        busy.sendall(b"second half\n")
        assert receive_all(busy) == b"first half, second half\n"


def test_connection_over_the_limit_is_closed_and_counted(start_server: StartServer) -> None:
    with start_server(mode="stream", limit_connections=2) as server:
        with connect(server) as first, connect(server) as second:
            for client in (first, second):
                assert is_echoed(client, b"hello\n")
            with connect(server) as third:
                assert is_closed(third)
            assert server.stats.refused == 1
        wait_for(server, active=0)
        with connect(server) as client:
            assert is_echoed(client, b"room again\n")


def test_idle_timeout_closes_only_the_idle_client(start_server: StartServer) -> None:
    with start_server(mode="stream", timeout_idle=1) as server, connect(server) as idle, connect(server) as active:
        idle.settimeout(0.02)
        ended = False
        while not ended:
            assert is_echoed(active)
            with suppress(TimeoutError):
                ended = idle.recv(1) == b""
        assert server.stats.timeouts_idle == 1
        before = server.stats.bytes_in
        idle.sendall(b"late")  # is discarded: no reset follows
        wait_for(server, bytes_in=before + 4)


def test_message_timeout_applies_despite_new_bytes(start_server: StartServer) -> None:
    with start_server(timeout_message=0.3) as server, connect(server) as client:
        client.settimeout(0.02)
        ended = False
        while not ended:
            client.sendall(b".")
            with suppress(TimeoutError):
                ended = client.recv(1) == b""
        assert server.stats.timeouts_message == 1


def test_write_timeout_closes_a_client_that_never_reads(start_server: StartServer) -> None:
    with start_server(mode="raw", timeout_write=0.3, chunk_size=65536) as server, connect(server) as client:
        with suppress(ConnectionError):
            while True:
                client.sendall(bytes(65536))
        assert server.stats.timeouts_write == 1


def test_unix_socket_echoes_and_is_removed(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with start_server(uds=path, mode="stream") as server:
        assert server.addresses == [str(path)]
        with connect(server) as client:
            assert is_echoed(client, b"one\n")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
    assert not path.exists()
