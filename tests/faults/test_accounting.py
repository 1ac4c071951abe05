"""Every connection is in exactly one counter at its end, whatever its client, the limits and a lack of memory do."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import StartServer, connect, is_echoed, receive_all, reset, wait_until

import echo_async
from echo_async.engines.connection import Connection
from echo_async.engines.runner import Runner
from echo_async.server.admission import PendingSlot
from echo_async.stats import ENDS, TIMEOUT_ENDS, Stats
from echo_async.wire.conversation import StreamConversation
from echo_async.wire.tls_layer import TlsLayer

pytestmark = pytest.mark.usefixtures("no_leaks")

OUT_OF_MEMORY = b"out of memory\n"


def lack_memory(function: Callable[..., Any], is_lacking: Callable[..., bool]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if is_lacking(*arguments):
            raise MemoryError
        return function(*arguments)

    return call


STEPS: list[tuple[type, str]] = [
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


@contextmanager
def snapshots(server: echo_async.EchoServer) -> Iterator[list[Stats]]:
    """Take snapshots all the time, in another thread."""
    taken, stop = [server.stats], threading.Event()

    def take() -> None:
        while not stop.wait(0.001):
            taken.append(server.stats)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join(10)
        taken.append(server.stats)


def total(stats: Stats) -> int:
    """Return how many connections are in a counter."""
    never_accepted = stats.refused + stats.faults.get("refuse", 0) + stats.tls_failures + stats.failed
    return stats.accepted + never_accepted - sum(stats.ended.get(end, 0) for end in ("tls_failed", "failed"))


ENDINGS = ["echo", "incomplete", "too long", "idle", "unfinished", "no memory", "reset", "silent"]
FAULTS = ["none", "close", "close=3", "reset=3", "half-close", "corrupt", "drop", "stall", "refuse", "reset=0.05s"]


def behave(server: echo_async.EchoServer, ending: str, context: ssl.SSLContext | None) -> None:
    """Connect, and end the connection, or let the server end it."""
    with suppress(OSError, AssertionError), connect(server) as plain:
        if ending == "silent":
            return
        client = plain if context is None else context.wrap_socket(plain, server_hostname="localhost")
        with client:
            assert is_echoed(client, b"hello\n")
            match ending:
                case "incomplete":
                    client.sendall(b"incomplete")
                case "too long":
                    client.sendall(2000 * b"x")
                    receive_all(client)
                case "idle":
                    receive_all(client)
                case "unfinished":
                    client.sendall(b"unfinished")
                    receive_all(client)
                case "no memory":
                    client.sendall(OUT_OF_MEMORY)
                    receive_all(client)
                case "reset":
                    reset(client)


@pytest.mark.internal_errors
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tls=st.booleans(),
    endings=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=12),
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
    with (
        limited_memory(without_memory),
        start_server(tls=tls, fault_sequence=faults, **options) as server,
        snapshots(server) as taken,
    ):
        clients = [threading.Thread(target=behave, args=(server, each, context), daemon=True) for each in endings]
        for each in clients:
            each.start()
        for each in clients:
            each.join(20)
        wait_until(lambda: server.stats.active == 0 and total(server.stats) >= len(endings))
    for stats in taken:
        assert stats.accepted == stats.active + sum(stats.ended.values())
        assert set(stats.ended) <= set(ENDS)
    last = taken[-1]
    # A connection that has timed out can fail as well, while it lingers.
    timed_out = sum(last.ended.get(end, 0) for end in TIMEOUT_ENDS)
    assert total(last) - timed_out <= len(endings) <= total(last)
    assert last.lost <= sum(last.ended.get(end, 0) for end in ("lost", "timeout_message", "reset", "failed"))
