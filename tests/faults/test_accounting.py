"""Every connection is in exactly one counter at its end, whatever its client, the limits and a lack of memory do."""

from __future__ import annotations

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
from echo_async.stats import ENDS, Stats
from echo_async.wire.conversation import StreamConversation

pytestmark = pytest.mark.usefixtures("no_leaks")

OUT_OF_MEMORY = b"out of memory\n"


def lack_memory(function: Callable[..., Any], is_lacking: Callable[..., bool]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if is_lacking(*arguments):
            raise MemoryError
        return function(*arguments)

    return call


@contextmanager
def limited_memory(without: set[int]) -> Iterator[None]:
    """Let the conversations of these numbers, and every message ``OUT_OF_MEMORY``, find no memory."""
    numbers = iter(range(1000))
    with pytest.MonkeyPatch.context() as patch:
        begin = lack_memory(StreamConversation.__init__, lambda *_: next(numbers) in without)
        receive = lack_memory(StreamConversation.receive, lambda _, data: OUT_OF_MEMORY in data)
        patch.setattr(StreamConversation, "__init__", begin)
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
    return stats.accepted + stats.refused + stats.tls_failures + stats.failed - stats.ended.get("failed", 0)


ENDINGS = ["echo", "incomplete", "too long", "idle", "unfinished", "no memory", "reset", "silent"]


def behave(server: echo_async.EchoServer, ending: str, context: ssl.SSLContext | None) -> None:
    """Connect, and end the connection, or let the server end it."""
    with connect(server) as plain, suppress(OSError, AssertionError):
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


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    endings=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=12),
    limit=st.integers(2, 12),
    without_memory=st.sets(st.integers(0, 11), max_size=3),
)
def test_each_connection_is_in_one_counter_in_every_snapshot(
    start_server: StartServer,
    client_context: ssl.SSLContext,
    tls: bool,
    endings: list[str],
    limit: int,
    without_memory: set[int],
) -> None:
    context = client_context if tls else None
    options: Any = {"limit_connections": limit, "limit_message_size": 1000, "timeout_idle": 0.1, "timeout_message": 0.1}
    with (
        limited_memory(without_memory),
        start_server(tls=tls, **options) as server,
        snapshots(server) as taken,
    ):
        clients = [threading.Thread(target=behave, args=(server, each, context), daemon=True) for each in endings]
        for each in clients:
            each.start()
        for each in clients:
            each.join(20)
        wait_until(lambda: server.stats.active == 0 and total(server.stats) == len(endings))
    for stats in taken:
        assert stats.accepted == stats.active + sum(stats.ended.values())
        assert set(stats.ended) <= set(ENDS)
    last = taken[-1]
    assert total(last) == len(endings)
    assert last.lost <= sum(last.ended.get(end, 0) for end in ("lost", "timeout_message", "reset", "failed"))
