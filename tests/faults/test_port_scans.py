"""Port scans: no log line and no leak."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest
from support import StartServer, connect, log_lines, reset, wait_for

from echo_async.stats import Stats

pytestmark = pytest.mark.usefixtures("no_leaks")


HANDSHAKES: dict[str, dict[str, Any]] = {"TLS handshake": {"tls": True}, "PROXY header": {"proxy_protocol": "auto"}}


@pytest.mark.parametrize(("step", "ending"), [("TLS handshake", reset), ("PROXY header", socket.socket.close)])
def test_port_scan_before_a_handshake_is_no_failure(
    start_server: StartServer, step: str, ending: Callable[[socket.socket], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "echo_async")
    with start_server(**HANDSHAKES[step]) as server:
        names = []
        for number in range(1, 4):
            client = connect(server)
            names.append("{}:{}".format(*client.getsockname()))
            ending(client)
            wait_for(server, accepted=number)
        assert server.stats == Stats(accepted=3, ended={"closed": 3})
    reason = "closed by the peer" if ending is socket.socket.close else "connection reset by peer"
    lines = [f"{name} connection lost before the {step}: {reason}" for name in names]
    assert log_lines(caplog, logging.DEBUG) == lines


def test_port_scan_between_header_and_tls_is_no_failure(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "echo_async")
    with start_server(tls=True, proxy_protocol="auto") as server:
        with connect(server) as client:
            client.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
        wait_for(server, ended={"closed": 1})
        assert server.stats.accepted == 1
    assert log_lines(caplog, logging.DEBUG) == [
        "192.0.2.1:1 connection lost before the TLS handshake: closed by the peer"
    ]
