"""Errors in the code of the server."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from contextlib import closing, suppress
from time import monotonic, sleep

import pytest
from support import StartServer, connect, is_echoed, log_lines, receive_all, wait_for, wait_in_loop

import echo_async
from echo_async import Stats
from echo_async.config import EngineName
from echo_async.engines.context import LINGER_TIMEOUT
from echo_async.wire.conversation import StreamConversation

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.internal_errors
@pytest.mark.parametrize(("tls", "error"), [(False, ValueError("a bug")), (True, MemoryError())], ids=["plain", "tls"])
def test_internal_error_aborts_only_its_connection(
    start_server: StartServer,
    tls: bool,
    error: Exception,
    client_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receive = StreamConversation.receive

    def fail(self: StreamConversation, data: bytes) -> bytes:
        if data == b"trigger\n":
            raise error
        return receive(self, data)

    monkeypatch.setattr(StreamConversation, "receive", fail)
    with start_server(tls=tls) as server, connect(server) as one, connect(server) as two:
        healthy, failing = (
            client_context.wrap_socket(client, server_hostname="localhost") if tls else client for client in (one, two)
        )
        assert is_echoed(healthy)
        assert is_echoed(failing)
        failing.sendall(b"trigger\n")
        with suppress(ConnectionError, ssl.SSLError):
            assert failing.recv(100) == b""
        wait_for(server, active=1)
        assert server.stats.failed == 1
        assert is_echoed(healthy)
        healthy.close()
        failing.close()
    [line] = log_lines(caplog, logging.WARNING)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ internal error, connection aborted: .*(a bug|Memory).*", line)


@pytest.mark.internal_errors
@pytest.mark.parametrize("engine", ["streams", "protocol"])
def test_read_without_memory_is_counted_as_failed(engine: EngineName, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio ends the connection itself, which was logged at level debug only, as a connection that is lost."""

    async def main() -> Stats:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with echo_async.serve(engine=engine, mode="stream", port=0) as server:
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(b"one\n")
            assert await reader.readline() == b"one\n"
            monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.max_size", 2**62)
            with closing(socket.create_connection(server.address)) as other:
                other.sendall(b"two\n")
                await wait_in_loop(lambda: server.stats.failed == 1)
                monkeypatch.undo()
            writer.close()
        return server.stats

    stats = asyncio.run(main())
    assert (stats.accepted, stats.failed, stats.ended["failed"]) == (2, 1, 1)


@pytest.mark.internal_errors
def test_logging_error_aborts_only_its_connection(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a reply that is logged in several turns, the last line fails."""

    def fail(record: logging.LogRecord) -> bool:
        if record.getMessage().endswith(": last"):
            raise ValueError("a filter")
        return True

    monkeypatch.setattr("echo_async.engines.connection.LINES_PER_TURN", 1)
    monkeypatch.setattr(logging.getLogger("echo_async.access"), "filters", [fail])
    caplog.set_level(logging.INFO, "echo_async.access")
    with start_server(mode="stream") as server, connect(server) as healthy:
        with connect(server) as failing:
            failing.sendall(b"one\ntwo\nlast\n")
            with suppress(ConnectionError):
                while failing.recv(100):
                    pass
        wait_for(server, active=1)
        assert server.stats.failed == 1
        assert is_echoed(healthy)


def accept_slowly(record: logging.LogRecord) -> bool:
    sleep(0.02)
    return True


def test_log_in_turns_delays_no_end_after_a_sweep(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sweep, each 0.1 s, finds a connection whose conversation is finished, and whose messages are not all logged."""
    monkeypatch.setattr("echo_async.engines.connection.LINES_PER_TURN", 1)
    monkeypatch.setattr(logging.getLogger("echo_async.access"), "filters", [accept_slowly])
    caplog.set_level(logging.INFO, "echo_async.access")
    with start_server(mode="stream", timeout_idle=2, limit_message_size=100) as server, connect(server) as client:
        client.sendall(20 * b"a\n" + 200 * b"x")
        started = monotonic()
        assert receive_all(client) == 20 * b"a\n"
        assert monotonic() - started < LINGER_TIMEOUT / 2
