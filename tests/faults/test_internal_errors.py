"""Errors in the server's own code."""

from __future__ import annotations

import logging
import re
import ssl
from contextlib import suppress

import pytest
from support import (
    Start,
    connect,
    each_kind,
    echoes,
    lines_of,
    wait_until,
)

from echo_async.conversation import StreamConversation

pytestmark = pytest.mark.usefixtures("no_leaks")


@each_kind
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("error", [ValueError("a bug"), MemoryError()], ids=["bug", "memory"])
def test_an_error_of_the_servers_own_ends_that_client_only(
    start: Start,
    tls: bool,
    error: Exception,
    trusting: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receive = StreamConversation.receive

    def fail(self: StreamConversation, data: bytes) -> bytes:
        if data == b"poison\n":
            raise error
        return receive(self, data)

    monkeypatch.setattr(StreamConversation, "receive", fail)
    with start(tls=tls) as server, connect(server) as one, connect(server) as two:
        well, ill = (
            trusting.wrap_socket(client, server_hostname="localhost") if tls else client for client in (one, two)
        )
        assert echoes(well)
        assert echoes(ill)
        ill.sendall(b"poison\n")
        with suppress(ConnectionError, ssl.SSLError):
            assert ill.recv(100) == b""
        wait_until(lambda: server.stats.active == 1)
        assert server.stats.failed == 1
        assert echoes(well)
        well.close()
        ill.close()
    [line] = lines_of(caplog, logging.WARNING)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ closed for an error of the server's: .*(a bug|Memory).*", line)
