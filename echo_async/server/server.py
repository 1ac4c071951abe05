"""The server on an event loop.

:class:`EchoServer` differs from :class:`asyncio.Server` at the end. ``close`` also ends the connections (asyncio
leaves them open), and ``wait_closed`` returns within ``timeout_graceful_shutdown`` on every Python and event loop
(asyncio's returns at once on 3.11 and on uvloop, and waits for every client from 3.12 on).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Self, Unpack

from .. import net
from ..awaitable import AwaitableContextManager
from ..background import start_resolver
from ..config import EngineName, ServerConfig, ServerOptions
from ..errors import StartError, describe_error
from ..stats import Stats
from .admission import max_connections
from .base_server import Acceptor, BaseServer
from .listeners import ListenerConfig, ListeningSockets

LISTENER_DESCRIPTORS = 8  # of a listener besides its connections: sockets, and selectors of the threads engine

UDP_DESCRIPTORS = 4  # of a listener that answers datagrams as well


def serve(**options: Unpack[ServerOptions]) -> AwaitableContextManager[EchoServer]:
    """Start an echo server in the running event loop: ``async with serve(port=0) as server:``.

    ``server = await serve(...)`` works as well; then call ``close()`` and ``await wait_closed()`` at the end.

    Args:
        **options: The fields of :class:`~echo_async.ServerConfig`. Sizes are in bytes, times in seconds.

    Returns:
        An :class:`EchoServer`, once it is awaited or entered. It accepts connections by then.

    Raises:
        ConfigError: An option is invalid.
        StartError: The address cannot be bound, or a certificate is invalid (when awaited or entered).
    """
    config = ServerConfig(**options)
    return AwaitableContextManager(lambda: start_server([ListenerConfig(config)]), "serve")


async def start_server(listeners: Sequence[ListenerConfig]) -> EchoServer:
    """Serve all of ``listeners``, or none: :exc:`~echo_async.StartError` if one cannot be served."""
    async with listen(listeners) as bound:
        server = EchoServer(zip(divide_limit(listeners), bound, strict=True))
        await server.start()
        return server


@contextlib.asynccontextmanager
async def listen(listeners: Sequence[ListenerConfig]) -> AsyncIterator[list[ListeningSockets]]:
    """Bind the addresses of all ``listeners``, or of none. They are closed if the block fails."""
    with contextlib.ExitStack() as on_failure:
        bound = []
        for each in listeners:
            bound.append(await _bind(*each))
            on_failure.callback(bound[-1].close)
        yield bound
        on_failure.pop_all()


async def _bind(config: ServerConfig, descriptors: Sequence[int]) -> ListeningSockets:
    """Listen on one listener's addresses. A host name is resolved without blocking the event loop."""
    if descriptors:
        return ListeningSockets.adopt(descriptors, has_udp=config.udp)
    try:
        infos = net.resolve(config, socket.AI_NUMERICHOST)
    except StartError:  # it is a name
        try:
            infos = await asyncio.wrap_future(start_resolver(partial(net.resolve, config)))
        except OSError as error:
            raise StartError(f"cannot listen on host {config.host!r}: {describe_error(error)}") from error
    return ListeningSockets.bind(config, infos)


def divide_limit(listeners: Sequence[ListenerConfig]) -> Iterator[ServerConfig]:
    """Divide the connections that the descriptor limit has room for among the listeners without a limit."""
    configs = [each.config for each in listeners]
    limits = [each.limit_connections for each in configs]
    reserved = sum(
        LISTENER_DESCRIPTORS + UDP_DESCRIPTORS * each.udp + (each.limit_connections or 0) for each in configs
    )
    for config, limit in zip(configs, limits, strict=True):
        is_shared = limit is None and len(limits) > 1
        share = max(1, (max_connections() - reserved) // limits.count(None)) if is_shared else limit
        yield replace(config, limit_connections=share)


def acceptor_of(engine: EngineName) -> Callable[..., Acceptor]:
    """Return the class that serves a listener with ``engine``; nothing of another engine is imported."""
    if engine == "threads":
        from .thread_acceptor import ThreadAcceptor

        return ThreadAcceptor
    from .acceptor import AsyncioAcceptor

    return AsyncioAcceptor


class EchoServer(BaseServer):
    """A running echo server; :func:`serve` creates one."""

    worker_restarts = 0  # it has no workers

    def __init__(self, bound: Iterable[tuple[ServerConfig, ListeningSockets]]) -> None:
        super().__init__([acceptor_of(config.engine)(config, sockets, self._on_closed) for config, sockets in bound])
        self._loop = asyncio.get_running_loop()
        self._serving = 0  # listeners that were started and are not closed
        self._closed = asyncio.Event()

    async def start(self) -> None:
        """Accept connections from now on. If a listener cannot, the others are aborted. Once, after the server is made.

        The caller closes the sockets then.
        """
        try:
            for each in self._acceptors:
                await each.start()
                self._serving += 1
        except BaseException as error:
            del self._acceptors[self._serving :]
            if self._acceptors:
                self.abort()
                await self.wait_closed()
            if not isinstance(error, OSError | NotImplementedError):
                raise
            loop = type(self._loop)
            name, reason = f"{loop.__module__}.{loop.__name__}", describe_error(error)
            raise StartError(f"cannot serve on {name}: {reason}; use asyncio or uvloop") from error

    @property
    def listener_names(self) -> list[str]:
        """The first address of each listener, formatted."""
        return [each.sockets.name for each in self._acceptors]

    async def fetch_stats(self) -> list[Stats]:
        """Return the counters of each listener."""
        return [each.registry.stats for each in self._acceptors]

    async def is_healthy(self) -> bool:
        """Return whether connections are accepted."""
        return self.is_serving()

    async def wait_for(self, *, timeout: float = 5.0, **counters: int | Mapping[str, int]) -> None:  # noqa: ASYNC109
        """Wait until the counters of :attr:`stats` are as expected.

        Args:
            timeout: Seconds.
            **counters: What each is at least: ``accepted=2``, ``faults={"reset": 1}``. ``active`` is exactly that.

        Raises:
            TimeoutError: They are not. Its text has all counters.
            AttributeError: There is no such counter.
        """
        for seconds in self._wait_for(timeout, counters):
            await asyncio.sleep(seconds)

    async def disconnect(self, *, reset: bool = False) -> None:
        """End every connection now, also those that wait to be accepted, and keep listening.

        Args:
            reset: Whether the clients see a reset. Else they see it only if they have sent what was not read.
        """
        for each in self._acceptors:
            await each.disconnect(reset=reset)

    async def wait_closed(self) -> None:
        """Wait until no socket, connection, thread or task of the server is left. Always returns after :meth:`close`.

        If it is canceled during the shutdown, the connections are aborted.
        """
        try:
            await self._closed.wait()
        except asyncio.CancelledError:
            if self._is_stopping:
                self.abort()
                await self._closed.wait()
            raise
        finally:
            if self._closed.is_set():
                for each in self._acceptors:
                    each.join()

    async def serve_forever(self) -> None:
        """Wait until the server is closed; close it if this is canceled."""
        try:
            await self._closed.wait()
        finally:
            self.close()
            await self.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
        await self.wait_closed()

    def _on_closed(self) -> None:
        """A listener is closed; called in its thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits
            self._loop.call_soon_threadsafe(self._count_closed)

    def _count_closed(self) -> None:
        self._serving -= 1
        if not self._serving:
            self._closed.set()
