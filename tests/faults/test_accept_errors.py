"""Errors of ``accept`` in the engines that call it themselves, by a fake of ``socket.accept``."""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
from time import monotonic
from typing import Any

import pytest
from support import (
    BACKENDS,
    MAX_DELAY,
    TIMEOUT,
    StartServer,
    connect,
    is_echoed,
    log_lines,
    set_constant,
    wait_until,
)

from echo_async import sync

pytestmark = pytest.mark.usefixtures("no_leaks")


class FailingAccept:
    """Replaces ``socket.accept``: after ``begin`` it fails up to ``max_failures`` times, until ``end``."""

    RETRY_DELAY = 0.02  # seconds

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_failures: int = 1000) -> None:
        self.error: OSError | None = None
        self.failures = 0
        self._max_failures = max_failures
        set_constant(monkeypatch, "ACCEPT_RETRY_DELAY", self.RETRY_DELAY)
        self._accept = socket.socket.accept
        monkeypatch.setattr(socket.socket, "accept", lambda listener: self(listener))

    def __call__(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        if self.error is not None and self.failures < self._max_failures:
            self.failures += 1
            raise self.error
        return self._accept(listener)

    def begin(self, number: int) -> None:
        self.failures = 0
        self.error = OSError(number, os.strerror(number))

    def end(self) -> None:
        self.error = None


ACCEPTORS = [(backend, tls) for backend in BACKENDS for tls in (False, True) if tls or backend.engine == "threads"]

each_acceptor = pytest.mark.parametrize(
    ("backend", "tls"), ACCEPTORS, ids=["-".join(backend) + ("-tls" if tls else "") for backend, tls in ACCEPTORS]
)

PERSISTENT_ERRORS = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.EINVAL]
TRANSIENT_ERRORS = [errno.ECONNABORTED, errno.EPROTO, errno.EPERM]


@each_acceptor
@pytest.mark.parametrize("number", PERSISTENT_ERRORS, ids=errno.errorcode.get)
def test_accept_error_is_retried_after_a_pause(
    start_server: StartServer,
    tls: bool,
    number: int,
    client_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accept = FailingAccept(monkeypatch)
    with start_server(tls=tls) as server:
        start = monotonic()
        accept.begin(number)
        with connect(server) as plain:
            wait_until(lambda: accept.failures >= 3)
            assert accept.failures <= 4 + (monotonic() - start) / accept.RETRY_DELAY  # no busy waiting
            accept.end()
            recovery = monotonic()
            client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
            assert is_echoed(client)
            assert monotonic() - recovery < MAX_DELAY
            client.close()
        lines = [line for line in log_lines(caplog, logging.WARNING) if "accept failed" in line]
        assert 1 <= len(lines) <= 1 + (monotonic() - start)
        assert os.strerror(number).lower() in lines[0].lower()


@each_acceptor
def test_accept_aborted_connection_does_not_delay_the_next(
    start_server: StartServer,
    tls: bool,
    client_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = FailingAccept(monkeypatch, max_failures=1)
    with start_server(tls=tls) as server:
        for number in TRANSIENT_ERRORS:
            accept.begin(number)
            with connect(server) as plain:
                client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
                assert is_echoed(client)
                client.close()
            assert accept.failures == 1


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
    for number in PERSISTENT_ERRORS:
        accept = FailingAccept(monkeypatch)
        with start_server(tls=tls) as server:
            start = monotonic()
            accept.begin(number)
            with connect(server):
                wait_until(lambda accept=accept: accept.failures >= 1)  # type: ignore[misc]
                server.close()
                wait_until(lambda server=server: not server.sockets)  # type: ignore[misc]
                assert accept.failures <= 4 + (monotonic() - start) / accept.RETRY_DELAY
                assert monotonic() - start < MAX_DELAY
        accept.end()
