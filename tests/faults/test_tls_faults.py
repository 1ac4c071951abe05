"""Faulty clients over TLS, and shutdown during TLS handshakes."""

from __future__ import annotations

import gc
import logging
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
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

import echo_async
from echo_async.engines.context import Slot
from echo_async.engines.threads import ThreadConnection
from echo_async.engines.tls_socket import TlsSocket
from echo_async.server.registry import Registry
from echo_async.wire.tls_layer import TlsLayer

pytestmark = pytest.mark.usefixtures("no_leaks")


class TlsClient:
    """A client with TLS in memory, so that it can stop or send anything else at any byte."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self.plain = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def client_hello(self) -> bytes:
        """Return the ClientHello."""
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    def handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                return self.plain.sendall(self._outgoing.read())
            except ssl.SSLWantReadError:
                self.plain.sendall(self._outgoing.read())
                self._incoming.write(self.plain.recv(65536))

    def record(self, data: bytes) -> bytes:
        """Return ``data`` as a TLS record."""
        self._tls.write(data)
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._outgoing.read()


def client_hello_and_reset(client: TlsClient) -> None:
    client.plain.sendall(client.client_hello())
    reset(client.plain)


def half_a_client_hello(client: TlsClient) -> None:
    client.plain.sendall(client.client_hello()[:50])
    client.plain.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        receive_all(client.plain)


def close_notify_before_reading(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n") + client.close_notify())
    with suppress(ConnectionError):
        receive_all(client.plain)


def half_close_within_a_record(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n")[:-5])
    client.plain.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        receive_all(client.plain)


def reset_within_a_record(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n"))
    assert client.plain.recv(1)
    client.plain.sendall(client.record(b"a message\n")[:-5])
    reset(client.plain)


def send_a_mebibyte_of_garbage(client: TlsClient) -> None:
    client.handshake()
    with suppress(ConnectionError):
        client.plain.sendall(os.urandom(1024 * 1024))
        receive_all(client.plain)


def send_a_corrupt_record(client: TlsClient) -> None:
    client.handshake()
    record = bytearray(client.record(b"a message\n"))
    record[-1] ^= 1
    client.plain.sendall(record)
    with suppress(ConnectionError):
        receive_all(client.plain)


def send_plain_text_after_the_handshake(client: TlsClient) -> None:
    client.handshake()
    with suppress(ConnectionError):
        client.plain.sendall(b"Hola Server!\n" * 10)
        receive_all(client.plain)


TLS_FAULTS: list[tuple[Callable[[TlsClient], None], dict[str, int]]] = [
    (client_hello_and_reset, {"tls_failures": 1}),
    (half_a_client_hello, {"tls_failures": 1}),
    (close_notify_before_reading, {}),
    (half_close_within_a_record, {}),
    (reset_within_a_record, {}),
    (send_a_mebibyte_of_garbage, {"tls_failures": 1}),
    (send_a_corrupt_record, {"tls_failures": 1}),
    (send_plain_text_after_the_handshake, {"tls_failures": 1}),
]


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


@pytest.mark.parametrize(("fault", "counted"), TLS_FAULTS, ids=[fault.__name__ for fault, _ in TLS_FAULTS])
def test_tls_faulty_client_in_any_state_affects_only_itself(
    start_server: StartServer,
    fault: Callable[[TlsClient], None],
    counted: dict[str, int],
    client_context: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start_server(tls=True, no_access_log=True) as server, connect(server) as plain:
        with client_context.wrap_socket(plain, server_hostname="localhost") as healthy:
            assert is_echoed(healthy)
            with connect(server) as client:
                fault(TlsClient(client, client_context))
            wait_for(server, active=1, tls_failures=counted.get("tls_failures", 0))
            assert is_echoed(healthy)
        stats = {name: number for name, number in asdict(server.stats).items() if number}
        assert stats["accepted"] == stats.get("active", 0) + sum(stats.get("ended", {}).values())
        for name in ("accepted", "active", "ended", "messages", "bytes_in", "bytes_out"):
            stats.pop(name, None)
        assert stats == counted
    assert log_lines(caplog, logging.ERROR) == []
    assert len(log_lines(caplog, logging.INFO)) <= 1


@pytest.mark.parametrize("sent", [0, 50, None], ids=["nothing", "half of the ClientHello", "ClientHello"])
def test_tls_shutdown_during_handshake_does_not_wait(
    start_server: StartServer, sent: int | None, client_context: ssl.SSLContext
) -> None:
    with start_server(tls=True, timeout_graceful_shutdown=600) as server, connect(server) as client:
        client.sendall(TlsClient(client, client_context).client_hello()[:sent])
        wait_until(lambda: not select.select([server.sockets[0]], [], [], 0)[0])  # the connection is accepted
        if sent is None:
            assert client.recv(1)  # the server has replied to the ClientHello
        start = monotonic()
        server.close()
        with suppress(ConnectionError):
            receive_all(client)
        assert monotonic() - start < MAX_DELAY
    assert server.stats.tls_failures == 1
    assert server.stats.accepted == 0


def test_tls_shutdown_does_not_wait_for_close_notify(
    start_server: StartServer, client_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_constant(monkeypatch, "LINGER_TIMEOUT_AT_STOP", 0.05)
    with start_server(tls=True, timeout_graceful_shutdown=1) as server, connect(server) as plain:
        client = TlsClient(plain, client_context)
        client.handshake()
        plain.sendall(client.record(b"a message\n"))
        wait_for(server, messages=1)
        start = monotonic()
        server.close()
        wait_for(server, active=0)
        assert monotonic() - start < MAX_DELAY


def test_tls_failed_handshakes_free_their_slots(start_server: StartServer, client_context: ssl.SSLContext) -> None:
    with start_server(tls=True, limit_connections=2) as server:
        for number in range(20):
            with connect(server) as client:
                (half_a_client_hello, client_hello_and_reset)[number % 2](TlsClient(client, client_context))
            wait_for(server, tls_failures=number + 1)
        assert server.stats.refused == 0
        with connect(server) as one, connect(server) as two:
            secured = [client_context.wrap_socket(each, server_hostname="localhost") for each in (one, two)]
            assert all(map(is_echoed, secured))
            for each in secured:
                each.close()


def count_layers() -> int:
    return sum(isinstance(each, TlsLayer) for each in gc.get_objects())


@pytest.mark.parametrize("fault", [half_a_client_hello, close_notify_before_reading, send_a_corrupt_record])
def test_tls_faulty_client_leaves_no_garbage(
    start_server: StartServer, fault: Callable[[TlsClient], None], client_context: ssl.SSLContext
) -> None:
    """OpenSSL has large buffers, of which the garbage collector knows nothing."""
    with start_server(tls=True, mode="stream") as server:
        gc.collect()
        before = count_layers()  # that other tests have left
        gc.disable()
        try:
            with connect(server) as client:
                fault(TlsClient(client, client_context))
            wait_until(lambda: server.stats.tls_failures + server.stats.accepted > 0 and count_layers() <= before)
        finally:
            gc.enable()


def test_tls_finish_with_full_buffers_does_not_block(certificate: Path, client_context: ssl.SSLContext) -> None:
    """The sweep calls ``finish`` for every connection, so one with full buffers must not block it."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        ours.settimeout(TIMEOUT)
        theirs.settimeout(TIMEOUT)
        secured = TlsSocket(ours, context, print)
        client = TlsClient(theirs, client_context)
        handshaking = threading.Thread(target=client.handshake, daemon=True)
        handshaking.start()
        secured.handshake(TIMEOUT)
        handshaking.join(TIMEOUT)
        registry = Registry(echo_async.ServerConfig(mode="stream"))
        connection = ThreadConnection(registry, Slot("client"), secured)
        connection.establish()
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(4096), socket.MSG_DONTWAIT)
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

    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        theirs.settimeout(TIMEOUT)
        secured, client = OverlapDetector(ours, context, print), TlsClient(theirs, client_context)
        handshaking = threading.Thread(target=client.handshake, daemon=True)
        handshaking.start()
        secured.handshake(TIMEOUT)
        handshaking.join(TIMEOUT)
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
