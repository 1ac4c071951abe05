"""Errors of ``accept`` in the engines that call it themselves, by a fake of ``socket.accept``."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

import pytest
from support import (
    BACKENDS,
    MAX_DELAY,
    TIMEOUT,
    ServerThread,
    StartServer,
    connect,
    count_events,
    is_echoed,
    log_lines,
    set_constant,
    wait_for,
    wait_until,
)

import echo_async
from echo_async import sync
from echo_async.server.admission import Admission
from echo_async.wire.conversation import StreamConversation

pytestmark = pytest.mark.usefixtures("no_leaks")


class FailingAccept:
    """Replaces ``socket.accept``: after ``begin`` it fails up to ``max_failures`` times, until ``end``."""

    RETRY_DELAY = 0.02  # seconds

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_failures: int = 1000) -> None:
        self.error: Exception | None = None
        self.failures = 0
        self._max_failures = max_failures
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

    def begin(self, error: int | Exception) -> None:
        """Fail with an exception, or with the OSError of an error number."""
        with self._lock:
            self.failures = 0
            self.error = OSError(error, os.strerror(error)) if isinstance(error, int) else error

    def wait(self, failures: int) -> None:
        with self._lock:
            assert self._has_failed.wait_for(lambda: self.failures >= failures, TIMEOUT)

    def end(self) -> None:
        self.error = None


ACCEPTORS = [(backend, tls) for backend in BACKENDS for tls in (False, True) if tls or backend.loop == "asyncio"]

each_acceptor = pytest.mark.parametrize(
    ("backend", "tls"), ACCEPTORS, ids=["-".join(backend) + ("-tls" if tls else "") for backend, tls in ACCEPTORS]
)

PERSISTENT_ERRORS: list[int | Exception] = [
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EPERM,
    errno.EINVAL,
]
PERSISTENT_ERRORS += [MemoryError(), ValueError("a bug")]
TRANSIENT_ERRORS = [errno.ECONNABORTED, errno.EPROTO]


@each_acceptor
def test_accept_error_is_retried_after_a_pause(
    start_server: StartServer,
    tls: bool,
    client_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accept = FailingAccept(monkeypatch)
    with start_server(tls=tls) as server:
        started = monotonic()
        for error in PERSISTENT_ERRORS:
            start = monotonic()
            accept.begin(error)
            with connect(server) as plain:
                accept.wait(failures=3)
                assert accept.failures <= 4 + (monotonic() - start) / accept.RETRY_DELAY  # no busy waiting
                accept.end()
                client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
                assert is_echoed(client)
                client.close()
        lines = log_lines(caplog, logging.WARNING)
        assert 1 <= len(lines) <= 1 + (monotonic() - started)
        assert lines[0] == "accept failed: too many open files; retrying in 0.1 s"


@each_acceptor
def test_accept_aborted_connection_does_not_delay_the_next(
    start_server: StartServer,
    tls: bool,
    client_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = FailingAccept(monkeypatch, max_failures=50)  # a second after each would take too long
    with start_server(tls=tls) as server:
        for number in TRANSIENT_ERRORS:
            accept.begin(number)
            with connect(server) as plain:
                client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
                assert is_echoed(client)
                client.close()
            assert accept.failures == 50


STEPS: dict[str, dict[str, Any]] = {"plain": {}, "tls": {"tls": True}, "proxy": {"proxy_protocol": "auto"}}
each_step = pytest.mark.parametrize("step", STEPS)


@contextmanager
def connect_through(
    server: echo_async.EchoServer, step: str, client_context: ssl.SSLContext
) -> Iterator[socket.socket]:
    """Connect, and do the TLS handshake or send the PROXY header."""
    with connect(server) as plain:
        if step == "proxy":
            plain.sendall(b"PROXY UNKNOWN\r\n")
        if step != "tls":
            yield plain
            return
        with client_context.wrap_socket(plain, server_hostname="localhost") as client:
            yield client


def fail_once(function: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """Return a function that raises ``error`` at its first call, and then is ``function``."""
    errors = [error]

    def call(*args: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return function(*args, **options)

    return call


@pytest.mark.internal_errors
@each_step
def test_new_connection_raising_ends_only_itself(
    start_server: StartServer,
    step: str,
    client_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """There is no memory for its admission, or for its conversation."""
    for owner, name in ((Admission, "has_place"), (StreamConversation, "__init__")):
        monkeypatch.setattr(owner, name, fail_once(getattr(owner, name), MemoryError()))
    with start_server(limit_connections=1, **STEPS[step]) as server:
        for number in (1, 2):
            with suppress(ConnectionError, ssl.SSLError), connect_through(server, step, client_context) as client:
                assert client.recv(1) == b""
            wait_for(server, failed=number)
        with connect_through(server, step, client_context) as client:
            assert is_echoed(client)
        wait_for(server, active=0)
        assert server.stats.accepted == 1
        assert server.stats.tls_failures == server.stats.proxy_failures == 0
    lines = log_lines(caplog, logging.WARNING)
    assert len(lines) == 2
    assert all(line.endswith(" internal error, connection aborted: MemoryError()") for line in lines)


@pytest.mark.internal_errors
def test_transport_without_memory_ends_only_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    make = asyncio.SelectorEventLoop._make_socket_transport  # type: ignore[attr-defined]
    monkeypatch.setattr(asyncio.SelectorEventLoop, "_make_socket_transport", fail_once(make, MemoryError()))
    with ServerThread("asyncio", {"engine": "protocol", "port": 0, "mode": "stream"}) as server:
        with connect(server) as client:
            assert client.recv(1) == b""
        wait_for(server, failed=1)
        with connect(server) as client:
            assert is_echoed(client)


def test_accept_by_another_worker_does_not_delay_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = FailingAccept(monkeypatch, max_failures=1)
    set_constant(monkeypatch, "ACCEPT_RETRY_DELAY", 2 * TIMEOUT)  # a pause would fail the test
    with sync.serve(port=0, mode="stream") as server:
        accept.begin(errno.EAGAIN)
        with connect(server) as client:
            assert is_echoed(client)
        assert accept.failures == 1


@each_acceptor
def test_accept_error_during_shutdown_does_not_delay_it(
    start_server: StartServer, tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = FailingAccept(monkeypatch)
    with start_server(tls=tls) as server:
        start = monotonic()
        accept.begin(errno.EMFILE)
        with connect(server):
            accept.wait(failures=1)
            server.close()
    assert accept.failures <= 4 + (monotonic() - start) / accept.RETRY_DELAY
    assert monotonic() - start < MAX_DELAY


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
