"""Both clients behind one interface, that of the blocking client, so that a test of one is a test of both."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from support import ALL_BACKENDS, TIMEOUT

import echo_async
from echo_async import sync
from echo_async.loops import loop_factory

T = TypeVar("T")

# As with servers, each once: what only the asyncio client has is tested on each event loop.
CLIENTS = ("blocking", "asyncio", *(["uvloop"] if ALL_BACKENDS else []))
ASYNC_SOURCE = "asyncio with asynchronous messages"

Connect = Callable[..., "sync.EchoClient | AsyncioClient"]
Echo = Callable[..., Any]


async def one_by_one(messages: Iterable[T]) -> AsyncIterator[T]:
    for message in messages:
        await asyncio.sleep(0)
        yield message


class AsyncioClient:
    """A client of asyncio, whose event loop runs during each call."""

    def __init__(self, run: Callable[[Awaitable[Any]], Any], client: echo_async.EchoClient, source: Any) -> None:
        self.run = run
        self.client = client
        self._source = source
        self.name = client.name
        self.close = client.close

    def echo(self, message: Any) -> Any:
        return self.run(self.client.echo(message))

    def ping(self) -> float:
        seconds: float = self.run(self.client.ping())
        return seconds

    def stream(self, messages: Any, **options: Any) -> Generator[Any, None, None]:
        given = messages if isinstance(messages, str) else self._source(messages)
        return self._next_replies(self.client.stream(given, **options))

    def _next_replies(self, replies: Any) -> Generator[Any, None, None]:
        end = object()
        try:
            while (reply := self.run(anext(replies, end))) is not end:
                yield reply
        finally:
            self.run(replies.aclose())
            self.run(check_no_task())

    def __enter__(self) -> AsyncioClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        self.run(self.client.wait_closed())


async def check_no_task() -> None:
    assert asyncio.all_tasks() == {asyncio.current_task()}


@contextmanager
def client_functions(kind: str) -> Iterator[tuple[Connect, Echo]]:
    """Return ``connect`` and ``echo`` of a client. A loop must be left without a task and without an error."""
    if kind == "blocking":
        yield sync.connect, sync.echo
        return
    errors: list[dict[str, Any]] = []
    factory = loop_factory("uvloop" if kind == "uvloop" else "asyncio")
    with asyncio.Runner(loop_factory=factory, debug=True) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: errors.append(context))

        def run(awaitable: Awaitable[T]) -> T:
            async def wait() -> T:
                return await awaitable

            return runner.run(wait())

        def connect(*address: Any, **options: Any) -> AsyncioClient:
            connecting = echo_async.connect(*address, **options)
            return AsyncioClient(run, run(connecting), one_by_one if kind == ASYNC_SOURCE else lambda given: given)

        yield connect, lambda *args, **options: run(echo_async.echo(*args, **options))
        run(check_no_task())
    assert not errors


def wait_disconnected(client: sync.EchoClient | AsyncioClient) -> None:
    """Wait until the end of the connection, or unexpected bytes, have arrived between two messages."""
    if isinstance(client, AsyncioClient):
        client.run(disconnected(client.client))
    else:
        connection = client._session.connection
        assert connection is not None
        assert select.select([connection._socket], [], [], TIMEOUT)[0]


async def disconnected(client: echo_async.EchoClient) -> None:
    """Wait until the client has closed its connection between two messages, for which it has no public event."""
    assert client._session.connection is not None
    await client._session.connection.closed
