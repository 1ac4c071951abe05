"""Faulty clients: each affects only its own connection, is counted, and leaves no resources behind.

A row of ``FAULTS`` is one fault. A healthy client is connected at the same time and must not notice it.
"""

from __future__ import annotations

import gc
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
from support import (
    TIMEOUT,
    Backend,
    ServerThread,
    StartServer,
    connect,
    fill,
    is_echoed,
    log_lines,
    receive_all,
    receive_exactly,
    receive_line,
    reset,
    wait_for,
    wait_until,
)
from tls_client import TlsClient

import echo_async
from echo_async.config import Mode
from echo_async.stats import COUNTERS, Stats
from echo_async.wire.tls_layer import TlsLayer

pytestmark = pytest.mark.usefixtures("no_leaks")


def half_close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b""


def reset_with_buffered_replies(client: socket.socket) -> None:
    fill(client)
    reset(client)


def close_with_buffered_replies(client: socket.socket) -> None:
    fill(client)
    client.close()


def pause_and_resume_reading(client: socket.socket) -> None:
    """Close the receive window for less than ``timeout_write``, then read all replies."""
    line = bytes(range(32, 127)) * 10 + b"\n"
    sent = fill(client, line)
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == line * (sent // len(line))


def flood_and_reset(client: socket.socket) -> None:
    client.sendall(b"x" * 399_999 + b"\n")
    reset(client)


def shut_down_reading(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_RD)
    with suppress(ConnectionError):
        client.sendall(b"a message\n" * 100)
    reset(client)


def send_urgent_data(client: socket.socket) -> None:
    client.send(b"!", socket.MSG_OOB)
    assert is_echoed(client)


class Fault(NamedTuple):
    """What a client sends and receives, and what it does then; how it is counted, or None if that is not certain."""

    end: Callable[[socket.socket], None]
    sent: bytes = b""
    received: bytes = b""
    is_lost: bool | None = False
    ended: str | None = "closed"


FAULTS: dict[Mode, list[Fault]] = {
    "stream": [
        Fault(socket.socket.close),
        Fault(socket.socket.close, b"begun", b"", True, "lost"),
        Fault(half_close),
        Fault(half_close, b"one\nbegun", b"one\n", True, "lost"),
        Fault(reset, b"one\n", b"one\n", False, "reset"),
        Fault(reset, b"one\nbegun", b"one\n", True, "reset"),
        *(Fault(each, is_lost=None, ended=None) for each in (reset_with_buffered_replies, close_with_buffered_replies)),
        *(Fault(each, is_lost=None, ended=None) for each in (flood_and_reset, shut_down_reading)),
        Fault(pause_and_resume_reading, is_lost=None, ended=None),
        Fault(send_urgent_data),
    ],
    "message": [
        Fault(reset, ended="reset"),
        Fault(reset, b"begun", b"", True, "reset"),
        Fault(reset, b"one\n", b"one\n", False, "reset"),
        Fault(reset, b"x" * 999_999 + b"\n", b"", False, "reset"),
    ],
}


@pytest.mark.parametrize("mode", FAULTS)
def test_faulty_client_in_any_state_affects_only_itself(
    mode: Mode, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with (
        start_server(mode=mode, limit_connections=2, chunk_size=4096, no_access_log=True) as server,
        connect(server) as healthy,
    ):
        for number, fault in enumerate(FAULTS[mode], start=2):
            wait_for(server, accepted=number - 1)
            before = server.stats
            with connect(server) as client:
                client.sendall(fault.sent)
                assert receive_exactly(client, len(fault.received)) == fault.received
                wait_for(server, accepted=number, bytes_in=before.bytes_in + len(fault.sent))
                fault.end(client)
            wait_for(server, active=1)
            assert mode == "message" or is_echoed(healthy)
            changed, ended = counted_since(before, server)
            assert changed.pop("lost", 0) == fault.is_lost or fault.is_lost is None, fault
            assert changed == {}, fault
            assert ended == {fault.ended: 1} or fault.ended is None, fault
            assert log_lines(caplog, logging.ERROR) == []
            assert len(log_lines(caplog, logging.INFO)) <= (2 if fault.sent or fault.is_lost is None else 0)
            caplog.clear()
        assert is_echoed(healthy)


def counted_since(before: Stats, server: echo_async.EchoServer) -> tuple[Counter[str], Counter[str]]:
    """Return how many more connections are in each counter except ``accepted``, and the reasons in ``ended``."""
    stats = server.stats
    assert stats.accepted == stats.active + sum(stats.ended.values())
    names = set(COUNTERS) - {"accepted", "messages", "bytes_in", "bytes_out"}
    changed = +Counter({name: getattr(stats, name) - getattr(before, name) for name in names})
    return changed, Counter(stats.ended) - Counter(before.ended)


def test_backlog_with_closed_connections_is_served(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """Of 300 clients in the backlog, some have closed or reset their connection. The others are served."""
    caplog.set_level(logging.DEBUG, "echo_async")
    engine, loop = backend
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    connected = []
    for number in range(300):
        client = socket.create_connection(listener.getsockname(), TIMEOUT)
        if number % 3 == 0:
            reset(client)
            continue
        client.sendall(b"%d\n" % number)
        if number % 3 == 1:
            client.close()
        else:
            connected.append((client, number))
    with ServerThread(loop, {"engine": engine, "fd": listener.detach()}) as server:
        for client, number in connected:
            assert receive_all(client) == b"%d\n" % number
            client.close()
        wait_for(server, accepted=300, active=0)
    assert log_lines(caplog, logging.WARNING) == []
    assert not [line for line in log_lines(caplog, logging.DEBUG) if "unix" in line or "None" in line]


def test_reset_with_unread_input_causes_no_asyncio_warning(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with start_server(no_access_log=True) as server:
        for _ in range(30):
            client = connect(server)
            client.sendall(b"hello\n")
            assert receive_line(client) == b"hello\n"
            client.sendall(b"a\n" * 8000)
            reset(client)
        wait_for(server, active=0)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


PORT_SCANS: dict[str, tuple[dict[str, Any], bytes, Callable[[socket.socket], None]]] = {
    # the log line; the options of the server, what the client sends, how it leaves
    "{} connection lost before the TLS handshake: connection reset by peer": ({"tls": True}, b"", reset),
    "{} connection lost before the PROXY header: closed by the peer": (
        {"proxy_protocol": "auto"},
        b"",
        socket.socket.close,
    ),
    "192.0.2.1:1 connection lost before the TLS handshake: closed by the peer": (
        {"tls": True, "proxy_protocol": "auto"},
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
        socket.socket.close,
    ),
}


def test_port_scan_before_a_handshake_is_no_failure(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "echo_async")
    for line, (options, header, leave) in PORT_SCANS.items():
        caplog.clear()
        names = []
        with start_server(**options) as server:
            for number in range(1, 4):
                client = connect(server)
                names.append("{}:{}".format(*client.getsockname()))
                client.sendall(header)
                leave(client)
                wait_for(server, ended={"closed": number})
            assert server.stats == Stats(accepted=3, ended={"closed": 3})
        assert log_lines(caplog, logging.DEBUG) == [line.format(name) for name in names]


def end_within_a_message(client: TlsClient, plain: socket.socket) -> None:
    client.handshake(plain)
    plain.sendall(client.record(b"begun") + client.close_notify())
    receive_all(plain)


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


FAULTS_IN_TLS: dict[Callable[[TlsClient, socket.socket], None], dict[str, int]] = {
    # what the client does; the counters that increase
    end_within_a_message: {"lost": 1},
    close_notify_before_reading: {},
    half_close_within_a_record: {},
    reset_within_a_record: {},
    client_hello_and_reset: {"tls_failures": 1},
    half_a_client_hello: {"tls_failures": 1},
    send_a_corrupt_record: {"tls_failures": 1},
    send_plain_text_after_the_handshake: {"tls_failures": 1},
}
WITHOUT_RESET = {end_within_a_message, half_a_client_hello, close_notify_before_reading, send_a_corrupt_record}


def count_layers() -> int:
    return sum(isinstance(each, TlsLayer) for each in gc.get_objects())


@pytest.mark.usefixtures("no_garbage_collection")
def test_tls_faulty_client_in_any_state_affects_only_itself(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """It frees its place, and leaves no garbage: the garbage collector knows nothing of the buffers of OpenSSL."""
    caplog.set_level(logging.INFO, "echo_async")
    with (
        start_server(tls=True, no_access_log=True, limit_connections=2) as server,
        connect(server, client_context) as healthy,
    ):
        assert is_echoed(healthy)
        layers, expected, names = count_layers(), Counter[str](), []
        for fault, counted in FAULTS_IN_TLS.items():
            expected.update(counted)
            with connect(server) as plain, suppress(ConnectionError):
                names.append("{}:{}".format(*plain.getsockname()))
                fault(TlsClient(client_context), plain)
            wait_for(server, active=1, **expected)
            # A reset has rarely left one to the garbage collector.
            wait_until(lambda: (fault in WITHOUT_RESET or gc.collect() >= 0) and count_layers() <= layers)  # noqa: B023
        assert is_echoed(healthy)
        assert counted_since(Stats(active=1), server)[0] == expected
    assert log_lines(caplog, logging.ERROR) == []
    lines = log_lines(caplog, logging.INFO)
    assert lines[0] == f"{names[0]} incomplete message: connection closed after 5 bytes without a newline"
    assert len(lines) <= expected.total()
