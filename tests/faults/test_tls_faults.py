"""Faulty clients over TLS, and shutdown during TLS handshakes."""

from __future__ import annotations

import gc
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic

import pytest
from support import (
    MAX_DELAY,
    TIMEOUT,
    StartServer,
    connect,
    is_echoed,
    log_lines,
    receive_all,
    reset,
    set_constant,
    wait_for,
    wait_until,
)
from tls_client import TlsClient

import echo_async
from echo_async.engines.context import Slot
from echo_async.engines.threads import ThreadConnection
from echo_async.engines.tls_socket import TlsSocket
from echo_async.server.registry import Registry
from echo_async.wire.tls_layer import TlsLayer

pytestmark = pytest.mark.usefixtures("no_leaks")


def client_hello_and_reset(client: TlsClient, plain: socket.socket) -> None:
    plain.sendall(client.hello())
    reset(plain)


def half_a_client_hello(client: TlsClient, plain: socket.socket) -> None:
    plain.sendall(client.hello()[:50])
    plain.shutdown(socket.SHUT_WR)
    receive_all(plain)


def close_notify_before_reading(client: TlsClient, plain: socket.socket) -> None:
    client.handshake(plain)
    plain.sendall(client.record(b"a message\n") + client.close_notify())
    receive_all(plain)


def half_close_within_a_record(client: TlsClient, plain: socket.socket) -> None:
    client.handshake(plain)
    plain.sendall(client.record(b"a message\n")[:-5])
    plain.shutdown(socket.SHUT_WR)
    receive_all(plain)


def reset_within_a_record(client: TlsClient, plain: socket.socket) -> None:
    client.handshake(plain)
    plain.sendall(client.record(b"a message\n"))
    assert plain.recv(1)
    plain.sendall(client.record(b"a message\n")[:-5])
    reset(plain)


def send_a_corrupt_record(client: TlsClient, plain: socket.socket) -> None:
    client.handshake(plain)
    record = bytearray(client.record(b"a message\n"))
    record[-1] ^= 1
    plain.sendall(record)
    receive_all(plain)


def send_plain_text_after_the_handshake(client: TlsClient, plain: socket.socket) -> None:
    client.handshake(plain)
    plain.sendall(b"Hola Server!\n" * 100_000)
    receive_all(plain)


Fault = Callable[[TlsClient, socket.socket], None]
FAULTS_IN_TLS: list[Fault] = [
    client_hello_and_reset,
    half_a_client_hello,
    send_a_corrupt_record,
    send_plain_text_after_the_handshake,
]
OTHER_FAULTS: list[Fault] = [close_notify_before_reading, half_close_within_a_record, reset_within_a_record]
WITHOUT_RESET = (half_a_client_hello, close_notify_before_reading, send_a_corrupt_record)


def test_tls_incomplete_message_is_logged_with_peer(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with start_server(tls=True) as server, connect(server) as plain:
        name = f"127.0.0.1:{plain.getsockname()[1]}"
        with client_context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"begun")
            with suppress(ssl.SSLError):  # the server may close without close_notify
                client.unwrap()
        wait_for(server, lost=1)
    assert log_lines(caplog, logging.WARNING) == [
        f"{name} incomplete message: connection closed after 5 bytes without a newline"
    ]


def count_layers() -> int:
    return sum(isinstance(each, TlsLayer) for each in gc.get_objects())


def test_tls_faulty_client_in_any_state_affects_only_itself(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """It frees its place, and leaves no garbage: the garbage collector knows nothing of the buffers of OpenSSL."""
    caplog.set_level(logging.INFO, "echo_async")
    with (
        start_server(tls=True, no_access_log=True, limit_connections=2) as server,
        connect(server) as one,
        client_context.wrap_socket(one, server_hostname="localhost") as healthy,
    ):
        assert is_echoed(healthy)
        gc.collect()
        before = count_layers()
        gc.disable()
        try:
            for number, fault in enumerate(OTHER_FAULTS + FAULTS_IN_TLS, start=1):
                failures = max(0, number - len(OTHER_FAULTS))
                with connect(server) as plain, suppress(ConnectionError):
                    fault(TlsClient(client_context), plain)
                wait_for(server, tls_failures=failures)
                if fault in WITHOUT_RESET:
                    wait_until(lambda: server.stats.active == 1 and count_layers() <= before)
                else:  # a reset has rarely left one to the garbage collector
                    wait_until(lambda: server.stats.active == 1 and gc.collect() >= 0 and count_layers() <= before)
        finally:
            gc.enable()
        assert is_echoed(healthy)
        stats = {name: number for name, number in asdict(server.stats).items() if number}
        assert stats["accepted"] == 1 + sum(stats["ended"].values())
        for name in ("accepted", "active", "ended", "messages", "bytes_in", "bytes_out"):
            del stats[name]
        assert stats == {"tls_failures": len(FAULTS_IN_TLS)}
    assert log_lines(caplog, logging.ERROR) == []
    assert len(log_lines(caplog, logging.INFO)) <= len(FAULTS_IN_TLS)


def test_tls_shutdown_during_handshake_does_not_wait(start_server: StartServer, client_context: ssl.SSLContext) -> None:
    """Nothing, half of a ClientHello, or all of it has been received."""
    hello = TlsClient(client_context).hello()
    with start_server(tls=True, timeout_graceful_shutdown=600) as server, ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(3)]
        clients[1].sendall(hello[:50])
        clients[2].sendall(hello)
        assert clients[2].recv(1)  # the server has accepted all, and replied to the ClientHello
        start = monotonic()
        server.close()
        for client in clients:
            with suppress(ConnectionError):
                receive_all(client)
        assert monotonic() - start < MAX_DELAY
    assert server.stats.tls_failures == 3
    assert server.stats.accepted == 0


def test_tls_shutdown_does_not_wait_for_close_notify(
    start_server: StartServer, client_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_constant(monkeypatch, "LINGER_TIMEOUT_AT_STOP", 0.05)
    with start_server(tls=True, timeout_graceful_shutdown=1) as server, connect(server) as plain:
        client = TlsClient(client_context)
        client.handshake(plain)
        plain.sendall(client.record(b"a message\n"))
        wait_for(server, messages=1)
        start = monotonic()
        server.close()
        wait_for(server, active=0)
        assert monotonic() - start < MAX_DELAY


@contextmanager
def socket_pair(
    certificate: Path, client_context: ssl.SSLContext, kind: type[TlsSocket] = TlsSocket
) -> Iterator[tuple[TlsSocket, TlsClient, socket.socket]]:
    """Complete a handshake; yield the server's socket, the client, and the plain socket of the client."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        theirs.settimeout(TIMEOUT)
        secured, client = kind(ours, context, print), TlsClient(client_context)
        handshaking = threading.Thread(target=client.handshake, args=[theirs], daemon=True)
        handshaking.start()
        secured.handshake(TIMEOUT)
        handshaking.join(TIMEOUT)
        yield secured, client, theirs


def test_tls_finish_with_full_buffers_does_not_block(certificate: Path, client_context: ssl.SSLContext) -> None:
    """The sweep calls ``linger`` for every connection, so one with full buffers must not block it."""
    with socket_pair(certificate, client_context) as (secured, _, theirs):
        registry = Registry(echo_async.ServerConfig(mode="stream"))
        connection = ThreadConnection(registry, Slot("client"), secured)
        connection.establish()
        with suppress(BlockingIOError):
            while True:
                secured.plain.send(bytes(4096), socket.MSG_DONTWAIT)
        finishing = threading.Thread(target=connection.linger, daemon=True)
        finishing.start()
        finishing.join(MAX_DELAY)
        is_blocked = finishing.is_alive()
        theirs.close()
        finishing.join(TIMEOUT)
        assert not is_blocked


def test_tls_shutdown_and_read_never_overlap(certificate: Path, client_context: ssl.SSLContext) -> None:
    """OpenSSL does not allow two threads on one connection, and both calls release the GIL."""
    shutting_down, overlapped, waiting = threading.Event(), threading.Event(), threading.Event()

    class OverlapDetector(TlsSocket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            if flags == socket.MSG_PEEK and registry.stats.messages == 1:
                waiting.set()
            if shutting_down.is_set() and not flags & socket.MSG_PEEK:
                overlapped.set()
            return super().recv(size, flags)

        def shutdown(self, how: int) -> None:
            shutting_down.set()
            theirs.sendall(client.record(b"too late\n"))  # wakes the thread of the connection
            overlapped.wait(0.2)
            shutting_down.clear()
            super().shutdown(how)

    with socket_pair(certificate, client_context, OverlapDetector) as (secured, client, theirs):
        registry = Registry(echo_async.ServerConfig(mode="stream", no_access_log=True))
        connection = ThreadConnection(registry, Slot("client"), secured)
        connection.establish()
        serving = threading.Thread(target=connection.run, daemon=True)
        serving.start()
        theirs.sendall(client.record(b"in time\n"))
        assert waiting.wait(TIMEOUT)  # the thread waits for input
        connection.drain()
        theirs.shutdown(socket.SHUT_WR)
        serving.join(TIMEOUT)
        assert not serving.is_alive()
        assert not overlapped.is_set()
