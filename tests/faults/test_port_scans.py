"""Port scans: no log line and no leak."""

from __future__ import annotations

import logging
from contextlib import suppress
from time import monotonic

import pytest
from support import (
    StartServer,
    connect,
    is_echoed,
    log_lines,
    receive_all,
    reset,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_port_scan_is_not_logged(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start_server() as server, connect(server) as healthy:
        for number in range(400):
            client = connect(server)
            reset(client) if number % 2 else client.close()
        wait_until(lambda: server.stats.accepted == 401 and server.stats.active == 1)
        assert log_lines(caplog, logging.INFO) == []
        assert is_echoed(healthy)


def test_port_scan_over_limit_is_logged_once_per_second(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    with start_server(limit_connections=1) as server, connect(server) as healthy:
        assert is_echoed(healthy)
        start = monotonic()
        for _ in range(400):
            with connect(server) as client, suppress(ConnectionError):
                assert receive_all(client) == b""
        assert server.stats.refused == 400
        assert 1 <= len(log_lines(caplog, logging.INFO)) <= 1 + (monotonic() - start)
        assert is_echoed(healthy)
