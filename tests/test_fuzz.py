"""Fuzzing: any input, in any split and at any time, gets only the documented replies.

Servers of each engine have clients that perform random actions. A simple model of the wire protocol has the replies,
so that errors which all engines have in common are found as well.
"""

from __future__ import annotations

import logging
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import BACKENDS, Backend, ServerThread, connect, expected_replies, receive_all, reset, wait_for

import echo_async
from echo_async.config import Mode, ServerOptions

MODES: list[Mode] = ["message", "stream", "raw"]

# Any bytes, with frequent newlines.
BYTES = st.lists(st.one_of(st.just(b"\n"), st.binary(max_size=12), st.just(b"x" * 40)), max_size=12).map(b"".join)

LIMIT = 200


@pytest.fixture(params=BACKENDS, ids="-".join, scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[dict[Mode, echo_async.EchoServer]]:
    """A server in each mode, on one backend, for all examples."""
    backend: Backend = request.param
    options: ServerOptions = {"engine": backend.engine, "port": 0, "limit_message_size": LIMIT, "chunk_size": 7}
    with ExitStack() as servers:
        yield {mode: servers.enter_context(ServerThread(backend.loop, {**options, "mode": mode})) for mode in MODES}


class FuzzedClient:
    """A client that performs actions and records what it sends and receives."""

    def __init__(self, server: echo_async.EchoServer) -> None:
        self.socket = connect(server)
        self.sent = self.received = b""
        self.broken = False

    def do(self, action: object) -> None:
        with suppress(ConnectionError):
            if isinstance(action, bytes):
                self.socket.sendall(action)
                self.sent += action
            elif action == "read":
                if select.select([self.socket], [], [], 0.002)[0]:
                    self.received += self.socket.recv(100)
            elif action == "end":
                with suppress(OSError):  # not connected anymore
                    self.socket.shutdown(socket.SHUT_WR)
            return
        self.broken = True

    def end(self, how: str) -> None:
        if how == "reset":
            reset(self.socket)
        elif how == "read":
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            try:
                self.received += receive_all(self.socket)
            except ConnectionError:
                self.broken = True
        self.socket.close()


ACTIONS = st.lists(
    st.one_of(BYTES.filter(bool), st.binary(min_size=1, max_size=300), st.sampled_from(["read", "end"])), max_size=8
)
CLIENTS = st.lists(st.tuples(ACTIONS, st.sampled_from(["read", "read", "close", "reset"])), min_size=1, max_size=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mode=st.sampled_from(MODES), clients=CLIENTS)
def test_fuzz_any_actions_of_clients_get_correct_replies(
    server: dict[Mode, echo_async.EchoServer],
    caplog: pytest.LogCaptureFixture,
    mode: Mode,
    clients: list[tuple[list[object], str]],
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    echo = server[mode]
    before = echo.stats
    fuzzed = [FuzzedClient(echo) for _ in clients]
    for step in range(max(len(actions) for actions, _ in clients)):  # one action per client and step
        for client, (actions, _) in zip(fuzzed, clients, strict=True):
            if step < len(actions):
                client.do(actions[step])
    for client, (_, how) in zip(fuzzed, clients, strict=True):
        client.end(how)
        expected = expected_replies(mode, client.sent, LIMIT)
        assert expected.startswith(client.received)
        if how == "read" and not client.broken:
            assert client.received == expected
    wait_for(echo, accepted=before.accepted + len(clients), active=0)
    assert echo.stats.failed == 0
    assert echo.stats.timeouts_idle + echo.stats.timeouts_message + echo.stats.timeouts_write == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert all(record.getMessage().isprintable() for record in caplog.records)
    caplog.clear()


@pytest.mark.usefixtures("no_leaks")
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    backend=st.sampled_from(BACKENDS),
    mode=st.sampled_from(MODES),
    clients=st.lists(ACTIONS, min_size=1, max_size=4),
    during=st.booleans(),
)
def test_fuzz_shutdown_at_any_time_sends_only_correct_bytes(
    backend: Backend, mode: Mode, clients: list[list[object]], during: bool
) -> None:
    options: ServerOptions = {"engine": backend.engine, "port": 0, "mode": mode, "limit_message_size": LIMIT}
    with ServerThread(backend.loop, {**options, "timeout_graceful_shutdown": 0.05, "no_access_log": True}) as echo:
        fuzzed = [FuzzedClient(echo) for _ in clients]
        for client, actions in zip(fuzzed, clients, strict=True):
            for number, action in enumerate(actions):
                if during and number == len(actions) // 2:
                    echo.close()
                client.do(action)
        echo.close()
        for client in fuzzed:
            client.end("read")
            assert expected_replies(mode, client.sent, LIMIT).startswith(client.received)
    assert echo.stats.active == echo.stats.failed == 0
