"""Faulty clients: each affects only its own connection, is counted, and leaves no resources behind.

A row of ``FAULTS`` is one fault: what the client does, and which counters increase. A healthy client is connected at
the same time and must not notice the fault.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

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
    receive_line,
    reset,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


def connect_and_close(client: socket.socket) -> None:
    client.close()


def connect_and_reset(client: socket.socket) -> None:
    reset(client)


def close_within_a_message(client: socket.socket) -> None:
    client.sendall(b"begun")
    client.close()


def reset_after_a_reply(client: socket.socket) -> None:
    assert is_echoed(client)
    reset(client)


def reset_within_a_message(client: socket.socket) -> None:
    client.sendall(b"one\nbegun")
    assert receive_line(client) == b"one\n"
    reset(client)


def reset_with_buffered_replies(client: socket.socket) -> None:
    fill(client)
    reset(client)


def close_with_buffered_replies(client: socket.socket) -> None:
    fill(client)
    client.close()


def half_close_without_a_message(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b""


def half_close_within_a_message(client: socket.socket) -> None:
    client.sendall(b"one\nbegun")
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b"one\n"


def flood_and_reset(client: socket.socket) -> None:
    client.sendall(b"x" * 399_999 + b"\n")
    reset(client)


def pause_and_resume_reading(client: socket.socket) -> None:
    """Close the receive window for less than ``timeout_write``, then read all replies."""
    line = bytes(range(32, 127)) * 10 + b"\n"
    sent = fill(client, line)
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == line * (sent // len(line))


def shut_down_reading(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_RD)
    with suppress(ConnectionError):
        client.sendall(b"a message\n" * 100)
    reset(client)


def send_urgent_data(client: socket.socket) -> None:
    client.send(b"!", socket.MSG_OOB)
    assert is_echoed(client)


FAULTS: dict[Callable[[socket.socket], None], dict[str, int]] = {
    # what the client does; the counters that increase, other than accepted, messages and bytes
    connect_and_close: {},
    connect_and_reset: {},
    close_within_a_message: {"lost": 1},
    reset_after_a_reply: {},
    reset_within_a_message: {"lost": 1},
    reset_with_buffered_replies: {},
    close_with_buffered_replies: {},
    half_close_without_a_message: {},
    half_close_within_a_message: {"lost": 1},
    flood_and_reset: {},
    pause_and_resume_reading: {},
    shut_down_reading: {},
    send_urgent_data: {},
}

PORT_SCANS = {connect_and_close, connect_and_reset}

# These can end within a message.
MAY_COUNT_LOST = {reset_with_buffered_replies, close_with_buffered_replies, flood_and_reset}
MAY_COUNT_LOST |= {pause_and_resume_reading, shut_down_reading}


def test_faulty_client_in_any_state_affects_only_itself(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with (
        start_server(limit_connections=2, limit_message_size=500_000, chunk_size=4096, no_access_log=True) as server,
        connect(server) as healthy,
    ):
        assert is_echoed(healthy)
        for number, (fault, counted) in enumerate(FAULTS.items(), start=2):
            before = asdict(server.stats)
            with connect(server) as client:
                fault(client)
            wait_for(server, accepted=number, active=1)
            assert is_echoed(healthy)
            stats = server.stats
            assert stats.accepted == stats.active + sum(stats.ended.values())
            changed = {key: value - before[key] for key, value in asdict(stats).items() if isinstance(value, int)}
            ignored = {"accepted", "messages", "bytes_in", "bytes_out"} | (
                {"lost"} if fault in MAY_COUNT_LOST else set()
            )
            assert {key: value for key, value in changed.items() if value and key not in ignored} == counted
            assert log_lines(caplog, logging.ERROR) == []
            assert len(log_lines(caplog, logging.INFO)) <= (0 if fault in PORT_SCANS else 2)
            caplog.clear()


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
