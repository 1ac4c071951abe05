"""Servers that require a PROXY header. The header itself: ``test_proxy_header.py``."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import pytest
from support import (
    StartServer,
    connect,
    count_events,
    is_echoed,
    proxy_header,
    receive_all,
    receive_line,
    reset,
    tlv,
    wait_for,
)

import echo_async
from echo_async.server.accept_loop import AcceptLoop
from echo_async.server.admission import Admission
from echo_async.server.proxy_reader import receive_header
from echo_async.server.registry import Registry
from echo_async.wire.proxy import ProxyHeader, build_header

V1_HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.9 4711 443\r\n"
V2_HEADER = proxy_header(tlv(0x04, b"pad"), tlv(0x02, b"example.org"))


@pytest.fixture
def start_server(start_server: StartServer) -> StartServer:
    """Start servers that expect a PROXY header of either version."""
    return partial(start_server, proxy_protocol="auto")


def assert_closed(client: socket.socket) -> None:
    with suppress(ConnectionError):
        assert receive_all(client) == b""


def test_log_shows_the_source_address_of_the_header(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    shown = {
        V1_HEADER: "192.0.2.1:4711",
        build_header("v2", ("2001:db8::1", 65535), ("2001:db8::2", 443)): "[2001:db8::1]:65535",
        proxy_header(family=0x31, addresses=b"/run/\x1bclient".ljust(216, b"\0")): "/run/\\x1bclient",
        b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n": "192.0.2.1:1",
        build_header("v2", None, ("2001:db8::2", 443)): None,
    }
    with start_server() as server:
        for header, peer in shown.items():
            with connect(server) as client:
                address = "{}:{}".format(*client.getsockname())
                client.sendall(header + b"Hola Server!\n")
                assert receive_all(client) == b"Hola Server!\n"
                assert f"{peer or address} 13 bytes: Hola Server!" in caplog.messages
        wait_for(server, active=0)
    stats = server.stats
    assert (stats.accepted, stats.messages, stats.bytes_in, stats.bytes_out) == (5, 5, 65, 65)
    assert stats.proxy_failures == stats.tls_failures == 0


def test_header_sent_byte_by_byte_precedes_the_messages(start_server: StartServer) -> None:
    with start_server(mode="stream") as server:
        for header in (V1_HEADER, V2_HEADER):
            with connect(server) as client:
                for index in range(len(header)):
                    client.sendall(header[index : index + 1])
                for message in (b"one\n", V1_HEADER, b"x" * 10_000 + b"\n"):  # a second header is a message
                    client.sendall(message)
                    assert receive_line(client, len(message)) == message


def test_invalid_or_missing_header_closes_and_is_counted(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    invalid = [b"Hola Server!\n", b"PROXY TCP4 nonsense\r\n", V2_HEADER[:12] + b"\x31", proxy_header(addresses=b"")]
    with start_server(mode="stream") as server:
        for header in invalid:
            with connect(server) as client:
                client.sendall(header + b"one\n")
                assert_closed(client)
        for is_reset in (False, True):
            with connect(server) as client:
                client.sendall(V1_HEADER[:10])
                if is_reset:
                    reset(client)
                else:
                    client.shutdown(socket.SHUT_WR)
                    assert_closed(client)
        wait_for(server, proxy_failures=6)
    assert server.stats.accepted == server.stats.bytes_in == server.stats.lost == 0
    lines = [message for message in caplog.messages if "PROXY" in message]  # rate limited
    assert lines[0].endswith(" invalid PROXY header: no PROXY signature, received Hola Server!\\none")
    assert lines[-1].partition(" (")[0].endswith(" invalid PROXY header: truncated after 10 bytes")
    assert sum(map(count_events, lines)) == 6


def test_missing_or_incomplete_header_times_out(start_server: StartServer) -> None:
    with start_server(timeout_message=0.8, limit_connections=2) as server:
        with connect(server) as silent, connect(server) as slow:
            slow.sendall(V2_HEADER[:20])
            connect(server).close()
            wait_for(server, refused=1)  # those without a header count for the limit
            assert_closed(silent)
            assert_closed(slow)
        wait_for(server, timeouts_message=2)
        with connect(server) as client:
            client.sendall(V1_HEADER + b"room again\n")
            assert receive_all(client) == b"room again\n"
    assert server.stats.proxy_failures == 0


def test_peer_outside_proxy_allow_from_is_closed(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    with start_server(proxy_allow_from="10.0.0.0/8,192.0.2.1") as server:
        with connect(server) as client:
            assert_closed(client)
        wait_for(server, proxy_failures=1)
    assert "connection refused: not in proxy_allow_from" in caplog.text


def test_stop_serves_connections_with_complete_headers(start_server: StartServer) -> None:
    with start_server(mode="stream") as server:
        clients = [connect(server) for _ in range(20)]
        for client in clients[10:]:
            client.sendall(V1_HEADER + b"one\n")
        clients[0].sendall(V1_HEADER[:-1])
        server.close()
        for client in clients[:10]:
            assert_closed(client)
        for client in clients[10:]:
            assert receive_all(client) == b"one\n"
        for client in clients:
            client.close()
    assert (server.stats.messages, server.stats.active) == (10, 0)
    assert server.stats.proxy_failures == 0  # a connection closed by the stop is not a failure


class SingleByteSocket(socket.socket):
    """A socket from which every read returns one byte of a header."""

    def settimeout(self, value: float | None) -> None:
        assert value is None or value > 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        return b"P" if flags else b""


def test_header_timeout_is_not_extended_by_single_bytes() -> None:
    header = ProxyHeader()
    header.feed(proxy_header(bytes(60_000))[:20])
    with SingleByteSocket() as client, pytest.raises(TimeoutError):
        receive_header(client, header, 1e-6)
    assert not header.finished


def test_header_timeout_over_the_socket_maximum_is_accepted() -> None:
    client, accepted = socket.socketpair()
    with client, accepted:
        client.sendall(b"PROXY UNKNOWN\r\n")
        receive_header(accepted, ProxyHeader(), 1e11)


class SingleAcceptLoop(asyncio.SelectorEventLoop):
    """An event loop that accepts one client, and calls ``on_next_accept`` before it does anything else."""

    clients: list[socket.socket]
    on_next_accept: Callable[[], object]

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
        if self.clients:
            return self.clients.pop(), ("127.0.0.1", 1)
        self.on_next_accept()
        raise asyncio.CancelledError


def test_close_at_the_moment_of_accept_closes_the_connection() -> None:
    async def main() -> None:
        admission = Admission(Registry(echo_async.ServerConfig(proxy_protocol="auto")))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SingleAcceptLoop)
        loop.clients = [accepted]
        loop.on_next_accept = AcceptLoop(admission, loop, accepted, None, lambda registry, slot: asyncio.Protocol).close
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert admission.is_idle

    client, accepted = socket.socketpair()
    with client, accepted, asyncio.Runner(loop_factory=SingleAcceptLoop) as runner:
        runner.run(main())
        assert client.recv(1) == b""


def test_large_header_is_not_kept_in_memory(start_server: StartServer) -> None:
    """Its fields are reported in mode ``identify`` only."""
    header = proxy_header(tlv(0xE9, bytes(60_000)))
    with start_server(mode="stream", proxy_protocol="v2") as server, ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            client = stack.enter_context(connect(server))
            client.sendall(header)
            assert is_echoed(client)
        after, _ = tracemalloc.get_traced_memory()
    assert after - before < 20 * 30_000


def test_header_precedes_the_tls_handshake(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start_server(tls=True) as server:
        for header in (V1_HEADER, V2_HEADER):
            plain = connect(server)
            plain.sendall(header)
            with client_context.wrap_socket(plain, server_hostname="localhost") as client:
                client.sendall(b"secret\n")
                assert receive_line(client) == b"secret\n"
        with connect(server) as client:
            client.sendall(V1_HEADER + b"no TLS\n")
            with suppress(ConnectionError):
                receive_all(client)
        wait_for(server, tls_failures=1)
        with connect(server) as plain, pytest.raises(OSError, match=r"(?i)reset|EOF|closed|broken"):
            client_context.wrap_socket(plain, server_hostname="localhost")
        wait_for(server, proxy_failures=1)
    assert caplog.text.count(" 192.0.2.1:4711 7 bytes: secret") == 2
    assert "192.0.2.1:4711 TLS handshake failed" in caplog.text
