"""Errors of ``accept``, by a fake of the call itself wherever the engine calls it."""

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
    wait_until,
)

from echo_async import sync

pytestmark = pytest.mark.usefixtures("no_leaks")


class FailingAccept:
    """``socket.accept`` that fails for as long as it is told to; and gives up failing before a test would hang."""

    MOST = 1000
    PAUSE = 0.02

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = MOST) -> None:
        self.error: OSError | None = None
        self.failed = 0
        self._most = most
        for module in ("handshake_acceptor", "thread_acceptor"):
            monkeypatch.setattr(f"echo_async.engines.{module}.ACCEPT_RETRY_DELAY", self.PAUSE)
        self._accept = socket.socket.accept
        monkeypatch.setattr(socket.socket, "accept", lambda listener: self(listener))

    def __call__(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        if self.error is not None and self.failed < self._most:
            self.failed += 1
            raise self.error
        return self._accept(listener)

    def begin(self, number: int) -> None:
        self.failed = 0
        self.error = OSError(number, os.strerror(number))

    def end(self) -> None:
        self.error = None


OUR_ACCEPT = [(backend, tls) for backend in BACKENDS for tls in (False, True) if tls or backend.engine == "threads"]

each_accept_of_ours = pytest.mark.parametrize(
    ("backend", "tls"), OUR_ACCEPT, ids=["-".join(backend) + ("-tls" if tls else "") for backend, tls in OUR_ACCEPT]
)

SHORT_OF = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]

LASTING = [*SHORT_OF, errno.EPERM, errno.EINVAL]

PASSING = [errno.ECONNABORTED, errno.EPROTO, errno.EPERM]


@each_accept_of_ours
@pytest.mark.parametrize("number", LASTING, ids=errno.errorcode.get)
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
        began = monotonic()
        accept.begin(number)
        with connect(server) as plain:
            wait_until(lambda: accept.failed >= 3)
            assert accept.failed <= 4 + (monotonic() - began) / accept.PAUSE  # no busy waiting
            accept.end()
            ended = monotonic()
            client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
            assert is_echoed(client)
            assert monotonic() - ended < MAX_DELAY
            client.close()
        said = [line for line in log_lines(caplog, logging.WARNING) if "cannot accept" in line]
        assert 1 <= len(said) <= 1 + (monotonic() - began)
        assert os.strerror(number).lower() in said[0].lower()


@each_accept_of_ours
def test_accept_aborted_connection_does_not_delay_the_next(
    start_server: StartServer,
    tls: bool,
    client_context: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = FailingAccept(monkeypatch, most=1)
    with start_server(tls=tls) as server:
        for number in PASSING:
            accept.begin(number)
            with connect(server) as plain:
                client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
                assert is_echoed(client)
                client.close()
            assert accept.failed == 1


def test_accept_by_another_worker_does_not_delay_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = FailingAccept(monkeypatch, most=1)
    monkeypatch.setattr("echo_async.engines.thread_acceptor.ACCEPT_RETRY_DELAY", 2 * TIMEOUT)  # a pause would be seen
    with sync.serve(port=0, mode="stream") as server:
        accept.begin(errno.EAGAIN)
        with connect(server) as client:
            assert is_echoed(client)
        assert accept.failed == 1


@each_accept_of_ours
def test_accept_error_during_shutdown_does_not_delay_it(
    start_server: StartServer, tls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in LASTING:
        accept = FailingAccept(monkeypatch)
        with start_server(tls=tls) as server:
            began = monotonic()
            accept.begin(number)
            with connect(server):
                wait_until(lambda accept=accept: accept.failed >= 1)  # type: ignore[misc]
                server.close()
                wait_until(lambda server=server: not server.sockets)  # type: ignore[misc]
                assert accept.failed <= 4 + (monotonic() - began) / accept.PAUSE
                assert monotonic() - began < MAX_DELAY
        accept.end()
