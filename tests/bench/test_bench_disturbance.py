"""The disturbances of ``bench compare``, with servers that do not serve them."""

from __future__ import annotations

import pytest
from support import TIMEOUT

from echo_async import EchoError
from echo_async.bench.disturbance import Disturbance
from echo_async.bench.load import find_server
from echo_async.bench.plan import LoadPlan
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer


def plan_for(server: HostedServer) -> LoadPlan:
    return find_server(LoadPlan(), *server.address)


def test_flood_with_a_wrong_reply_is_an_error(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="corrupt")
    with Disturbance.parse("flood").run(plan_for(server), []) as finish:
        server.wait_for(messages=1, active=0, timeout=TIMEOUT)  # the client has left
        with pytest.raises(EchoError, match="the flood failed: reply mismatch at byte"):
            finish()


def test_idle_connections_over_the_limit_are_an_error() -> None:
    disturbance = Disturbance.parse("idle=3")
    with HostedServer(limit_connections=2) as server:
        idle = disturbance.run(plan_for(server), [])
        with pytest.raises(EchoError, match="cannot open 3 idle connections: "), idle:
            pass


def test_idle_connections_closed_by_the_server_are_an_error() -> None:
    with HostedServer() as server, Disturbance.parse("idle=3").run(plan_for(server), []) as finish:
        assert finish() is None
        server.close()
        with pytest.raises(EchoError, match="the server closed 3 of 3 idle connections"):
            finish()
