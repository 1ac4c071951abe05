"""TLS clients that fail in any state."""

from __future__ import annotations

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
    wait_until,
)

import echo_async
from echo_async.engines.registry import Registry
from echo_async.engines.threads import ThreadConnection
from echo_async.engines.tls_socket import TlsSocket

pytestmark = pytest.mark.usefixtures("no_leaks")


class TlsClient:
    """A client that does TLS in memory, so that it can break off, or send something else, between any two bytes."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self.plain = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def hello(self) -> bytes:
        """The first bytes of a handshake."""
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
        """``data`` as it goes over the wire."""
        self._tls.write(data)
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._outgoing.read()


def hello_and_reset(client: TlsClient) -> None:
    client.plain.sendall(client.hello())
    reset(client.plain)


def half_a_hello(client: TlsClient) -> None:
    client.plain.sendall(client.hello()[:50])
    client.plain.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        receive_all(client.plain)


def close_notify_before_reading(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n") + client.close_notify())
    with suppress(ConnectionError):
        receive_all(client.plain)


def end_in_the_middle_of_a_record(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n")[:-5])
    client.plain.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        receive_all(client.plain)


def reset_in_the_middle_of_a_record(client: TlsClient) -> None:
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


def send_a_record_that_was_changed(client: TlsClient) -> None:
    client.handshake()
    record = bytearray(client.record(b"a message\n"))
    record[-1] ^= 1
    client.plain.sendall(record)
    with suppress(ConnectionError):
        receive_all(client.plain)


def talk_plain_after_the_handshake(client: TlsClient) -> None:
    client.handshake()
    with suppress(ConnectionError):
        client.plain.sendall(b"Hola Server!\n" * 10)
        receive_all(client.plain)


TLS_FAULTS: list[tuple[Callable[[TlsClient], None], dict[str, int]]] = [
    (hello_and_reset, {"tls_failures": 1}),
    (half_a_hello, {"tls_failures": 1}),
    (close_notify_before_reading, {}),
    (end_in_the_middle_of_a_record, {}),
    (reset_in_the_middle_of_a_record, {}),
    (send_a_mebibyte_of_garbage, {}),
    (send_a_record_that_was_changed, {}),
    (talk_plain_after_the_handshake, {}),
]


def test_tls_incomplete_message_is_logged_with_peer(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with start_server(tls=True) as server, connect(server) as plain:
        name = f"127.0.0.1:{plain.getsockname()[1]}"
        with client_context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"begun")
            with suppress(ssl.SSLError):  # who ends a connection owes no answer to its end
                client.unwrap()
        wait_until(lambda: server.stats.lost == 1)
    assert log_lines(caplog, logging.WARNING) == [f"{name} lost in mid-message, after 5 bytes without a newline"]


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
        with client_context.wrap_socket(plain, server_hostname="localhost") as well:
            assert is_echoed(well)
            with connect(server) as client:
                fault(TlsClient(client, client_context))
            wait_until(lambda: server.stats.active == 1 and server.stats.tls_failures == counted.get("tls_failures", 0))
            assert is_echoed(well)
        stats = {name: number for name, number in asdict(server.stats).items() if number}
        for name in ("accepted", "active", "messages", "bytes_in", "bytes_out"):
            stats.pop(name, None)
        assert stats == counted
    assert log_lines(caplog, logging.ERROR) == []
    assert len(log_lines(caplog, logging.INFO)) <= 1


@pytest.mark.parametrize("said", [0, 50, None], ids=["nothing", "half a hello", "a hello"])
def test_tls_shutdown_during_handshake_does_not_wait(
    start_server: StartServer, said: int | None, client_context: ssl.SSLContext
) -> None:
    with start_server(tls=True, timeout_graceful_shutdown=600) as server, connect(server) as client:
        client.sendall(TlsClient(client, client_context).hello()[:said])
        wait_until(lambda: not select.select([server.sockets[0]], [], [], 0)[0])  # it is accepted
        if said is None:
            assert client.recv(1)  # the server has answered the hello
        began = monotonic()
        server.close()
        with suppress(ConnectionError):
            receive_all(client)
        assert monotonic() - began < MAX_DELAY
    assert server.stats.tls_failures == 1
    assert server.stats.accepted == 0


def test_tls_shutdown_does_not_wait_for_close_notify(
    start_server: StartServer, client_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_async.engines.registry.LINGER_TIMEOUT_AT_STOP", 0.05)
    with start_server(tls=True, timeout_graceful_shutdown=1) as server, connect(server) as plain:
        client = TlsClient(plain, client_context)
        client.handshake()
        plain.sendall(client.record(b"a message\n"))
        wait_until(lambda: server.stats.messages == 1)
        began = monotonic()
        server.close()
        wait_until(lambda: server.stats.active == 0 and not server.sockets)
        assert monotonic() - began < MAX_DELAY


def test_tls_failed_handshakes_free_their_slots(start_server: StartServer, client_context: ssl.SSLContext) -> None:
    with start_server(tls=True, limit_connections=2) as server:
        for number in range(20):
            with connect(server) as client:
                (half_a_hello, hello_and_reset)[number % 2](TlsClient(client, client_context))
            wait_until(lambda number=number: server.stats.tls_failures == number + 1)  # type: ignore[misc]
        assert server.stats.refused == 0
        with connect(server) as one, connect(server) as two:
            secured = [client_context.wrap_socket(each, server_hostname="localhost") for each in (one, two)]
            assert all(map(is_echoed, secured))
            for each in secured:
                each.close()


def test_tls_finish_with_full_buffers_does_not_block(certificate: Path, client_context: ssl.SSLContext) -> None:
    """Whoever sweeps does so for every client: one whose buffers are full must not hold it up."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        ours.settimeout(TIMEOUT)
        theirs.settimeout(TIMEOUT)
        secured = TlsSocket(ours, context)
        client = TlsClient(theirs, client_context)
        shaking = threading.Thread(target=client.handshake)
        shaking.start()
        secured.handshake(TIMEOUT)
        shaking.join()
        registry = Registry(echo_async.ServerConfig(mode="stream"))
        connection = ThreadConnection(registry, secured, "a client that does not read")
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(4096), socket.MSG_DONTWAIT)
        finishing = threading.Thread(target=connection.finish)
        finishing.start()
        finishing.join(MAX_DELAY)
        waits = finishing.is_alive()
        theirs.close()
        finishing.join(TIMEOUT)
        assert not waits


def test_tls_shutdown_and_read_never_overlap(certificate: Path, client_context: ssl.SSLContext) -> None:
    """OpenSSL allows no two threads at one connection, and lets go of Python's lock in both calls."""
    ending, overlapped = threading.Event(), threading.Event()

    class Watched(TlsSocket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            if ending.is_set() and not flags & socket.MSG_PEEK:
                overlapped.set()
            return super().recv(size, flags)

        def shutdown(self, how: int) -> None:
            ending.set()
            theirs.sendall(client.record(b"too late\n"))  # wakes the thread that waits for the client
            overlapped.wait(0.2)
            ending.clear()
            super().shutdown(how)

    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        theirs.settimeout(TIMEOUT)
        secured, client = Watched(ours, context), TlsClient(theirs, client_context)
        shaking = threading.Thread(target=client.handshake)
        shaking.start()
        secured.handshake(TIMEOUT)
        shaking.join()
        registry = Registry(echo_async.ServerConfig(mode="stream", no_access_log=True))
        connection = ThreadConnection(registry, secured, "a client that is late")
        registry.add(connection)
        serving = threading.Thread(target=connection.run)
        serving.start()
        theirs.sendall(client.record(b"in time\n"))
        wait_until(lambda: registry.stats.messages == 1 and not connection._io_lock.locked())
        connection.stop()
        theirs.shutdown(socket.SHUT_WR)
        serving.join(TIMEOUT)
        assert not serving.is_alive()
        assert not overlapped.is_set()
