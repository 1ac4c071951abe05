"""Port scans: no log line and no leak."""

from __future__ import annotations

import logging
from contextlib import suppress
from time import monotonic

import pytest
from support import (
    Start,
    connect,
    each_kind,
    echoes,
    lines_of,
    receive_all,
    reset,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


@each_kind
def test_a_port_scan_is_no_line_in_the_log_and_leaves_nothing(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start() as server, connect(server) as well:
        for number in range(400):
            client = connect(server)
            reset(client) if number % 2 else client.close()
        wait_until(lambda: server.stats.accepted == 401 and server.stats.active == 1)
        assert lines_of(caplog, logging.INFO) == []
        assert echoes(well)


@each_kind
def test_a_scan_over_the_limit_is_one_line_a_second(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start(limit_connections=1) as server, connect(server) as well:
        assert echoes(well)
        began = monotonic()
        for _ in range(400):
            with connect(server) as client, suppress(ConnectionError):
                assert receive_all(client) == b""
        assert server.stats.refused == 400
        assert 1 <= len(lines_of(caplog, logging.INFO)) <= 1 + (monotonic() - began)
        assert echoes(well)
