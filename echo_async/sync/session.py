"""A session whose connections block.

A session is written as coroutines (:mod:`echo_async.client.session`). What they wait for here blocks instead: they are
never suspended, and :func:`.awaitable.run` returns their results without an event loop.

Every wait has a deadline, except that of the resolver, which has its own.
"""

from collections.abc import AsyncGenerator, Generator
from contextlib import nullcontext, suppress
from time import monotonic, sleep
from typing import TypeVar

from ..awaitable import run
from ..client.connector import connect_first, start_tls
from ..client.endpoint import Endpoint
from ..client.session import Session
from .connection import BlockingConnection

T = TypeVar("T")


def iterate(generator: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Yield what an asynchronous generator yields in which everything blocks."""
    try:
        with suppress(StopAsyncIteration):
            while True:
                yield run(generator.__anext__())
    finally:
        run(generator.aclose())


class BlockingSession(Session[BlockingConnection]):
    """A session for one thread. It is an event as well: to wait until replies have arrived, it receives them."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.name, nullcontext())
        self._endpoint = endpoint
        run(self.connect())

    def set(self) -> None:
        pass

    def clear(self) -> None:
        pass

    async def wait(self) -> None:
        if self.connection is not None:
            self.connection.wait()

    async def _open(self) -> BlockingConnection:
        return await self._endpoint.connect(self._attempt, _sleep)

    async def _attempt(self, seconds: float) -> BlockingConnection:
        endpoint, deadline = self._endpoint, monotonic() + seconds
        _, connected = connect_first(endpoint, endpoint.numeric or endpoint.resolve(), deadline)
        if endpoint.ssl is not None:
            connected = start_tls(endpoint, connected, deadline)
        return BlockingConnection(endpoint, connected)


async def _sleep(seconds: float) -> None:
    sleep(seconds)  # noqa: ASYNC251
