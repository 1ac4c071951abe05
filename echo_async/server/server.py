"""The server objects: what they have in common, and the one on an event loop.

:class:`EchoServer` differs from :class:`asyncio.Server` at the end. ``close`` also ends the connections (asyncio
leaves them open), and ``wait_closed`` returns within ``timeout_graceful_shutdown`` on every Python and event loop
(asyncio's returns at once on 3.11 and on uvloop, and waits for every client from 3.12 on).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Generic, Self, TypeVar, Unpack, cast

from .. import net
from ..awaitable import AwaitableContextManager
from ..config import EngineName, ServerConfig, ServerOptions
from ..engines.context import ConversationFactory
from ..errors import StartError, describe_error
from ..resolver import run_resolver
from ..stats import Stats
from ..tls import Certificates
from .admission import Admission
from .listeners import Listeners
from .registry import Registry

if TYPE_CHECKING:
    from .acceptor import AsyncioAcceptor
    from .thread_acceptor import ThreadAcceptor

A = TypeVar("A", bound="AsyncioAcceptor | ThreadAcceptor")


def acceptor_of(engine: EngineName) -> Callable[..., AsyncioAcceptor | ThreadAcceptor]:
    """Return what creates the acceptor of ``engine``; no other engine is imported."""
    if engine == "threads":
        from .thread_acceptor import ThreadAcceptor

        return ThreadAcceptor
    from .acceptor import AsyncioAcceptor

    return partial(AsyncioAcceptor, import_module(f"..engines.{engine}", __package__))


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
    return AwaitableContextManager(lambda: start_server(config))


async def start_server(config: ServerConfig) -> EchoServer:
    """Serve on the addresses of ``config``."""
    server = EchoServer(config, await bind(config))
    await server.start()
    return server


async def bind(config: ServerConfig) -> Listeners:
    """Listen on the addresses of ``config``. A host name is resolved without blocking the event loop."""
    infos = net.resolve_literal(config)
    if infos is None:
        try:
            infos = await run_resolver(partial(net.resolve, config))
        except OSError as error:
            raise StartError(f"cannot listen on host {config.host!r}: {describe_error(error)}") from error
    return Listeners.bind(config, infos)


class BaseServer:
    """Addresses, certificates and state: the common part of every server object."""

    def __init__(self, config: ServerConfig, listeners: Listeners) -> None:
        self.config = config
        self._listeners = listeners
        self._is_stopping = False
        try:
            self._certificates = None if config.ssl_certfile is None else Certificates(config)
        except StartError:
            listeners.close()
            raise

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the first listening socket, also after it is closed.

        For a Unix socket it is the path instead, which only ``addresses`` has in its type.
        """
        return cast(tuple[str, int], self._listeners.addresses[0])

    @property
    def addresses(self) -> list[net.Address]:
        """Host and port, or Unix socket path, of every listening socket."""
        return list(self._listeners.addresses)

    @property
    def port(self) -> int | None:
        """The port of the first address; None for a Unix socket."""
        first = self._listeners.addresses[0]
        return None if isinstance(first, str) else first[1]

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty once they are closed."""
        return self._listeners.sockets

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        raise NotImplementedError

    def is_serving(self) -> bool:
        """Whether connections are accepted."""
        return bool(self.sockets) and not self._is_stopping

    def reload_certificates(self) -> None:
        """Read the certificate files again, for new connections. No connection is closed.

        Raises:
            StartError: A file is invalid. The previous certificates stay in use.
        """
        if self._certificates is not None:
            self._certificates.reload()

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once."""
        raise NotImplementedError

    def abort(self) -> None:
        """Shut down without waiting for any client."""
        raise NotImplementedError


class EngineServer(BaseServer, Generic[A]):
    """A server that serves connections in this process, with the acceptor of an engine."""

    def __init__(
        self,
        config: ServerConfig,
        listeners: Listeners,
        make_acceptor: Callable[..., A],
        on_closed: Callable[[], object],
        make_conversation: ConversationFactory | None = None,
    ) -> None:
        super().__init__(config, listeners)
        self._registry = Registry(config, make_conversation)
        self._registry.listener = net.format_address(listeners.addresses[0])
        self._acceptor = make_acceptor(Admission(self._registry), listeners, self._certificates, on_closed)

    @property
    def stats(self) -> Stats:
        return self._registry.stats

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once; safe to call twice, and from any thread.

        No connection is accepted from now on, what was received is answered, connections are closed. Those that
        are open after ``timeout_graceful_shutdown`` seconds are aborted.
        """
        self._is_stopping = True
        self._acceptor.close()

    def abort(self) -> None:
        """Shut down without waiting for any client. In an event loop, call it there."""
        self._is_stopping = True
        self._acceptor.abort()


class EchoServer(EngineServer["AsyncioAcceptor | ThreadAcceptor"]):
    """A running echo server; :func:`serve` creates one."""

    def __init__(self, config: ServerConfig, listeners: Listeners) -> None:
        super().__init__(config, listeners, acceptor_of(config.engine), self._on_closed)
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()

    async def start(self) -> None:
        """Accept connections from now on. Once, after the server is made."""
        try:
            await self._acceptor.start()
        except (OSError, NotImplementedError) as error:
            loop = type(self._loop)
            name, reason = f"{loop.__module__}.{loop.__name__}", describe_error(error)
            raise StartError(f"cannot serve on {name}: {reason}; use asyncio or uvloop") from error

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
                self._acceptor.join()

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
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nothing waits
            self._loop.call_soon_threadsafe(self._closed.set)
