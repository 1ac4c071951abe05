"""A session whose connections block, and how these are opened.

A session is written as coroutines (:mod:`echo_async.client.session`). What they wait for here blocks instead: they are
never suspended, and :func:`.awaitable.run` returns their results without an event loop.

Every wait has a deadline, except that of the resolver, which has its own.
"""

import os
import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import nullcontext, suppress
from selectors import EVENT_WRITE
from time import monotonic, perf_counter, sleep
from typing import TypeVar, cast

from ..awaitable import run
from ..client.endpoint import (
    CONNECTION_ATTEMPT_DELAY,
    Endpoint,
    closed_on_error,
    connect_unix,
    new_socket,
    refuse_self_connection,
    seconds_left,
    start_tls,
)
from ..client.session import Session
from ..compat import CONNECT_IN_PROGRESS, PollSelector
from ..net import AddressInfo
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
        endpoint, started, deadline = self._endpoint, perf_counter(), monotonic() + seconds
        if endpoint.config.uds is not None:
            connected = await connect_unix(
                os.fspath(endpoint.config.uds), lambda delay: _sleep(min(delay, seconds_left(deadline)))
            )
        else:
            connected = _race_addresses(list(endpoint.numeric or endpoint.resolve()), deadline)
        endpoint.start(connected, started)
        if endpoint.ssl is not None:
            connected = start_tls(endpoint, connected, deadline)
            connected.setblocking(False)
        return BlockingConnection(endpoint, connected)


async def _sleep(seconds: float) -> None:
    sleep(seconds)  # noqa: ASYNC251


def _race_addresses(waiting: list[AddressInfo], deadline: float) -> socket.socket:
    """Connect to the first address that accepts; the next is tried after a delay, or after a failure (RFC 8305)."""
    failure: OSError | None = None
    running: set[socket.socket] = set()
    selector = PollSelector()
    try:
        while running or waiting:
            left = seconds_left(deadline)
            try:
                if waiting:
                    connecting = _start_connecting(waiting.pop(0))
                    running.add(connecting)
                    selector.register(connecting, EVENT_WRITE)
                for key, _ in selector.select(min(left, CONNECTION_ATTEMPT_DELAY) if waiting else left):
                    connecting = cast(socket.socket, key.fileobj)
                    selector.unregister(connecting)
                    running.remove(connecting)
                    with closed_on_error(connecting):
                        _finish_connecting(connecting)
                    return connecting
            except OSError as error:
                failure = failure or error
    finally:
        for connecting in running:
            connecting.close()
    assert failure is not None
    raise failure


def _start_connecting(info: AddressInfo) -> socket.socket:
    with closed_on_error(new_socket(info)) as connecting:
        code = connecting.connect_ex(info[4])
        if code not in CONNECT_IN_PROGRESS:
            raise OSError(code, os.strerror(code))
        return connecting


def _finish_connecting(connecting: socket.socket) -> None:
    if code := connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))
    refuse_self_connection(connecting)
