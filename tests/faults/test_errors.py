"""Errors of ``accept``, a lack of memory and errors in the code of the server: what they end, and what counts them."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from time import monotonic, sleep
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    BACKENDS,
    MAX_DELAY,
    TIMEOUT,
    StartServer,
    connect,
    count_events,
    is_echoed,
    log_lines,
    receive_all,
    reset,
    set_constant,
    wait_for,
    wait_in_loop,
    wait_until,
)

import echo_async
from echo_async import sync
from echo_async.config import EngineName
from echo_async.engines.connection import Connection
from echo_async.engines.context import LINGER_TIMEOUT
from echo_async.engines.runner import Runner
from echo_async.server.admission import Admission, PendingSlot
from echo_async.stats import ENDS, TIMEOUT_ENDS, Stats
from echo_async.wire.conversation import StreamConversation
from echo_async.wire.tls_layer import TlsLayer

pytestmark = pytest.mark.usefixtures("no_leaks")


class FailingAccept:
    """Replaces ``socket.accept``, which fails from ``begin`` until ``end``, or until it has failed often enough."""

    RETRY_DELAY = 0.02  # seconds

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.failures = 0
        self._lock = threading.Lock()  # an ``accept`` from before ``begin`` does not get what connects after it
        self._has_failed = threading.Condition(self._lock)
        set_constant(monkeypatch, "ACCEPT_RETRY_DELAY", self.RETRY_DELAY)
        self._accept = socket.socket.accept
        monkeypatch.setattr(socket.socket, "accept", lambda listener: self(listener))

    def __call__(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        with self._lock:
            if self.error is not None and self.failures < self._max_failures:
                self.failures += 1
                self._has_failed.notify_all()
                raise self.error
            return self._accept(listener)

    def begin(self, error: int | Exception, max_failures: int = 1000) -> None:
        """Fail with an exception, or with the OSError of an error number."""
        with self._lock:
            self.failures, self._max_failures = 0, max_failures
            self.error = OSError(error, os.strerror(error)) if isinstance(error, int) else error

    def wait(self, failures: int) -> None:
        with self._lock:
            assert self._has_failed.wait_for(lambda: self.failures >= failures, TIMEOUT)

    def end(self) -> None:
        self.error = None


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch) -> FailingAccept:
    return FailingAccept(monkeypatch)


ACCEPTORS = [(backend, tls) for backend in BACKENDS for tls in (False, True) if tls or backend.loop == "asyncio"]
IDS = ["-".join(backend) + ("-tls" if tls else "") for backend, tls in ACCEPTORS]
each_acceptor = pytest.mark.parametrize(("backend", "context"), ACCEPTORS, ids=IDS, indirect=["context"])

PERSISTENT_ERRORS: list[int | Exception] = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM]
PERSISTENT_ERRORS += [errno.EINVAL, MemoryError(), ValueError("a bug")]
TRANSIENT_ERRORS = [errno.ECONNABORTED, errno.EPROTO]


@each_acceptor
def test_accept_error_is_retried_after_a_pause(
    start_server: StartServer, context: ssl.SSLContext | None, accept: FailingAccept, caplog: pytest.LogCaptureFixture
) -> None:
    """A stop does not wait for it."""
    with start_server(tls=context is not None) as server:
        started = monotonic()
        for error in PERSISTENT_ERRORS:
            start = monotonic()
            accept.begin(error)
            with connect(server) as plain:
                accept.wait(failures=3)
                assert accept.failures <= 4 + (monotonic() - start) / accept.RETRY_DELAY  # no busy waiting
                accept.end()
                client = context.wrap_socket(plain, server_hostname="localhost") if context else plain
                assert is_echoed(client)
                client.close()
        lines = log_lines(caplog, logging.WARNING)
        assert 1 <= len(lines) <= 1 + (monotonic() - started)
        assert lines[0] == "accept failed: too many open files; retrying in 0.1 s"
        accept.begin(errno.EMFILE)
        with connect(server):
            accept.wait(failures=1)
            stopped = monotonic()
            server.close()
    assert accept.failures <= 4 + (monotonic() - stopped) / accept.RETRY_DELAY
    assert monotonic() - stopped < MAX_DELAY


@each_acceptor
def test_accept_aborted_connection_does_not_delay_the_next(
    start_server: StartServer, context: ssl.SSLContext | None, accept: FailingAccept
) -> None:
    with start_server(tls=context is not None) as server:
        for number in TRANSIENT_ERRORS:
            accept.begin(number, max_failures=50)  # a second after each would take too long
            with connect(server, context) as client:
                assert is_echoed(client)
            assert accept.failures == 50


def test_accept_by_another_worker_does_not_delay_the_next(
    accept: FailingAccept, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_constant(monkeypatch, "ACCEPT_RETRY_DELAY", 2 * TIMEOUT)  # a pause would fail the test
    with sync.serve(port=0, mode="stream") as server:
        accept.begin(errno.EAGAIN, max_failures=1)
        with connect(server) as client:
            assert is_echoed(client)
        assert accept.failures == 1


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
def test_log_lines_account_for_every_refusal(
    start_server: StartServer, is_stopped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Within a second or so, and at a stop, no event waits for the next one to be logged."""

    def logged() -> int:
        return sum(count_events(line) for line in log_lines(caplog, logging.WARNING) if "connection refused" in line)

    with start_server(limit_connections=1) as server, connect(server) as client:
        assert is_echoed(client)
        for _ in range(20):
            with connect(server) as refused, suppress(ConnectionError):
                assert refused.recv(1) == b""
        assert server.stats.refused == 20
        if not is_stopped:
            wait_until(lambda: logged() == 20)
    assert logged() == server.stats.refused == 20


HEADER = b"PROXY UNKNOWN\r\n"


def lack_memory(function: Callable[..., Any], is_lacking: Callable[..., bool]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if is_lacking(*arguments):
            raise MemoryError
        return function(*arguments, **options)

    return call


@pytest.mark.internal_errors
@pytest.mark.parametrize(("context", "header"), [(False, b""), (True, b""), (False, HEADER)], indirect=["context"])
def test_new_connection_raising_ends_only_itself(
    start_server: StartServer,
    context: ssl.SSLContext | None,
    header: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is no memory for its admission, or for its conversation."""
    for owner, name in ((Admission, "has_place"), (StreamConversation, "__init__")):
        calls = itertools.count()
        is_first = lambda *_, calls=calls: next(calls) == 0  # noqa: E731
        monkeypatch.setattr(owner, name, lack_memory(getattr(owner, name), is_first))
    options: Any = {"tls": context is not None, "proxy_protocol": "auto" if header else "off"}
    with start_server(limit_connections=1, **options) as server:
        for number in (1, 2):
            with suppress(ConnectionError, ssl.SSLError), connect(server, context) as client:
                client.sendall(header)
                assert client.recv(1) == b""
            wait_for(server, failed=number)
        with connect(server, context) as client:
            client.sendall(header)
            assert is_echoed(client)
        wait_for(server, active=0)
        assert server.stats.accepted == 1
        assert server.stats.tls_failures == server.stats.proxy_failures == 0
    lines = log_lines(caplog, logging.WARNING)
    assert len(lines) == 2
    assert all(line.endswith(" internal error, connection aborted: MemoryError()") for line in lines)


@pytest.mark.internal_errors
def test_internal_error_aborts_only_its_connection(
    start_server: StartServer,
    context: ssl.SSLContext | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receive, error = StreamConversation.receive, MemoryError() if context else ValueError("a bug")

    def fail(self: StreamConversation, data: bytes) -> bytes:
        if data == b"trigger\n":
            raise error
        return receive(self, data)

    monkeypatch.setattr(StreamConversation, "receive", fail)
    with (
        start_server(tls=context is not None) as server,
        connect(server, context) as healthy,
        connect(server, context) as failing,
    ):
        assert is_echoed(healthy)
        assert is_echoed(failing)
        failing.sendall(b"trigger\n")
        with suppress(ConnectionError, ssl.SSLError):
            assert failing.recv(100) == b""
        wait_for(server, active=1)
        assert server.stats.failed == 1
        assert is_echoed(healthy)
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
    with start_server() as server, connect(server) as healthy:
        with connect(server) as failing:
            failing.sendall(b"one\ntwo\nlast\n")
            with suppress(ConnectionError):
                while failing.recv(100):
                    pass
        wait_for(server, active=1)
        assert server.stats.failed == 1
        assert is_echoed(healthy)


def divide_by_zero(record: logging.LogRecord) -> bool:
    return 1 // 0 == 1


@pytest.mark.internal_errors
def test_log_that_raises_does_not_end_the_server(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the line about the error cannot be logged."""
    monkeypatch.setattr(logging.getLogger("echo_async.server"), "filters", [divide_by_zero])
    with start_server(mode="stream", limit_connections=1) as server:
        with connect(server) as served:
            assert is_echoed(served)
            with connect(server) as refused:
                assert receive_all(refused) == b""
            assert is_echoed(served)
        wait_for(server, active=0)
        with connect(server) as served:
            assert is_echoed(served)


@pytest.mark.internal_errors
def test_log_that_raises_leaves_no_connection_open(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first line about a connection, at level debug, precedes its end."""
    caplog.set_level(logging.DEBUG, "echo_async.server")
    with start_server(mode="stream") as server:
        monkeypatch.setattr(logging.getLogger("echo_async.server"), "filters", [divide_by_zero])
        for number in (1, 2):
            with connect(server) as client, suppress(ConnectionError):
                assert client.recv(100) == b""
            wait_for(server, failed=number, active=0)
        monkeypatch.undo()
        with connect(server) as client:
            assert is_echoed(client)


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
    with start_server(timeout_idle=2, limit_message_size=100) as server, connect(server) as client:
        client.sendall(20 * b"a\n" + 200 * b"x")
        started = monotonic()
        assert receive_all(client) == 20 * b"a\n"
        assert monotonic() - started < LINGER_TIMEOUT / 2


# Every connection is in exactly one counter at its end, whatever its client, the limits and a lack of memory do

OUT_OF_MEMORY = b"out of memory\n"
STEPS: list[tuple[type, str]] = [
    (asyncio.SelectorEventLoop, "_make_socket_transport"),
    (asyncio.StreamReader, "__init__"),
    (Connection, "__init__"),
    (PendingSlot, "__init__"),
    (TlsLayer, "__init__"),
    (TlsLayer, "receive"),
    (StreamConversation, "__init__"),
    (Runner, "__init__"),
]
"""What a connection begins with, after the event loop or the kernel has accepted it."""


@contextmanager
def limited_memory(without: set[tuple[int, int]]) -> Iterator[None]:
    """Let these calls of ``STEPS``, and every message ``OUT_OF_MEMORY``, find no memory."""
    with pytest.MonkeyPatch.context() as patch:
        for step, (owner, name) in enumerate(STEPS):
            calls = zip(itertools.repeat(step), itertools.count())
            is_lacking = lambda *_, calls=calls: next(calls) in without  # noqa: E731
            patch.setattr(owner, name, lack_memory(getattr(owner, name), is_lacking))
        receive = lack_memory(StreamConversation.receive, lambda _, data: OUT_OF_MEMORY in data)
        patch.setattr(StreamConversation, "receive", receive)
        yield


def total(stats: Stats) -> int:
    """Return how many connections are in a counter."""
    never_accepted = stats.refused + stats.faults.get("refuse", 0) + stats.tls_failures + stats.failed
    return stats.accepted + never_accepted - sum(stats.ended.get(end, 0) for end in ("tls_failed", "failed"))


ENDINGS = {"echo": b"", "incomplete": b"incomplete", "too long": 2000 * b"x", "idle": b"", "unfinished": b"unfinished"}
ENDINGS |= {"no memory": OUT_OF_MEMORY, "reset": b"", "silent": b""}
"""How a client ends its connection, or lets the server end it, and what it sends before."""
FAULTS = ["none", "close", "close=3", "reset=3", "half-close", "corrupt", "drop", "stall", "refuse", "reset=0.05s"]


def behave(server: echo_async.EchoServer, ending: str, context: ssl.SSLContext | None) -> None:
    is_silent = ending == "silent"
    with suppress(OSError, AssertionError), connect(server, None if is_silent else context) as client:
        if is_silent:
            return
        assert is_echoed(client)
        client.sendall(ENDINGS[ending])
        if ending == "reset":
            reset(client)
        elif ending not in ("echo", "incomplete"):
            receive_all(client)


@pytest.mark.internal_errors
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tls=st.booleans(),
    endings=st.lists(st.sampled_from(list(ENDINGS)), min_size=1, max_size=12),
    faults=st.none() | st.lists(st.sampled_from(FAULTS), min_size=1, max_size=12).map(";".join),
    limit=st.integers(2, 12),
    without_memory=st.sets(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 11)), max_size=4),
)
def test_each_connection_is_in_one_counter_in_every_snapshot(
    start_server: StartServer,
    client_context: ssl.SSLContext,
    tls: bool,
    endings: list[str],
    faults: str | None,
    limit: int,
    without_memory: set[tuple[int, int]],
) -> None:
    context = client_context if tls else None
    options: Any = {"limit_connections": limit, "limit_message_size": 1000, "timeout_idle": 0.1, "timeout_message": 0.1}
    with limited_memory(without_memory), start_server(tls=tls, fault_sequence=faults, **options) as server:
        taken, is_done = [server.stats], threading.Event()

        def take_snapshots() -> None:
            while not is_done.wait(0.001):
                taken.append(server.stats)

        with ThreadPoolExecutor(1 + len(endings)) as threads:
            threads.submit(take_snapshots)
            try:
                list(threads.map(lambda ending: behave(server, ending, context), endings))
                wait_until(lambda: server.stats.active == 0 and total(server.stats) >= len(endings))
            finally:
                is_done.set()
        taken.append(server.stats)
    for stats in taken:
        assert stats.accepted == stats.active + sum(stats.ended.values())
        assert set(stats.ended) <= set(ENDS)
    last = taken[-1]
    # A connection that has timed out can fail as well, while it lingers.
    timed_out = sum(last.ended.get(end, 0) for end in TIMEOUT_ENDS)
    assert total(last) - timed_out <= len(endings) <= total(last)
    assert last.lost <= sum(last.ended.get(end, 0) for end in ("lost", "timeout_message", "reset", "failed"))
