"""The server object: it owns its listening sockets and every connection, so it can always end.

It differs from :class:`asyncio.Server` in what matters at the end: ``close`` also ends the connections
(asyncio's leaves them), and ``wait_closed`` ends within ``timeout_graceful_shutdown``, on every Python
and loop (asyncio's returns at once on 3.11 and on uvloop, and waits for every client from 3.12 on).
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack

from .. import net
from ..awaitable import AwaitableContextManager
from ..config import ServerConfig, ServerOptions
from ..engines import protocol, streams
from ..engines.acceptor import Listener
from ..engines.sweeper import Sweeper
from .base import BaseServer

__all__ = ["EchoServer", "serve", "start_server"]

ENGINES = {"streams": streams.listen, "protocol": protocol.listen}
ACCEPT_TURNS = 10  # turns of the loop until a client that was accepted has its connection, and what it sent is read
ABORT_TURNS = 10  # turns of the loop in which a transport that was aborted reports that it is closed
DRAIN_INTERVAL = 0.05  # seconds between two sweeps while the server stops


def serve(**options: Unpack[ServerOptions]) -> AwaitableContextManager[EchoServer]:
    """Start an echo server in the running event loop: ``async with serve(port=0) as server:``.

    ``server = await serve(...)`` works as well; then call ``close()`` and ``await wait_closed()`` at the
    end. ``options`` are the fields of :class:`~echo_async.ServerConfig` (sizes in bytes, times in seconds).

    Raises :exc:`~echo_async.ConfigError` for an option that makes no sense, :exc:`~echo_async.StartError`
    if the address cannot be bound.
    """
    config = ServerConfig(**options)
    return AwaitableContextManager(lambda: start_server(config))


async def start_server(config: ServerConfig, sockets: Sequence[socket.socket] | None = None) -> EchoServer:
    """Serve on ``sockets``, which are listening already, or on those that ``config`` names."""
    if config.engine == "threads":
        from .threaded import ThreadedEchoServer

        return await ThreadedEchoServer.start(config, sockets)
    return await EchoServer.start(config, sockets)


class EchoServer(BaseServer):
    """A running echo server; :func:`serve` makes one."""

    def __init__(self, config: ServerConfig, sockets: Sequence[socket.socket], path: str | None = None) -> None:
        super().__init__(config, sockets, path)
        self._loop = asyncio.get_running_loop()
        self._servers: list[Listener] = []
        self._sweeper = Sweeper(self._registry)
        self._stopper: asyncio.Task[None] | None = None
        self._aborting = False
        self._closed = asyncio.Event()

    @classmethod
    async def start(cls, config: ServerConfig, sockets: Sequence[socket.socket] | None = None) -> Self:
        """Serve on ``sockets``, which are listening already, or on those that ``config`` names."""
        if sockets is None:
            self = cls(config, net.bind(config, await _resolve(config)), config.uds)
        else:
            self = cls(config, sockets)
        try:
            await self._listen()
        except BaseException:  # cancelled
            self._stop_listening()
            self._registry.abort()
            raise
        return self

    async def _listen(self) -> None:
        listen = ENGINES[self.config.engine]
        for each in self._sockets:
            self._servers.append(await listen(self._registry, self._loop, each, self._certificates))
        self._sweeper.start()

    def close(self) -> None:
        """Stop: accept no more, answer what was received, end the connections. Returns at once.

        Can be called twice, and from any thread. What is not done within ``timeout_graceful_shutdown``
        seconds is aborted.
        """
        self._stopping = True
        if _is_running(self._loop):
            self._start_stopping()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and everything with it
                self._loop.call_soon_threadsafe(self._start_stopping)

    def abort(self) -> None:
        """Stop without waiting for any client. To be called in the server's event loop."""
        self._aborting = True
        self.close()
        self._registry.abort()

    async def wait_closed(self) -> None:
        """Wait until it is closed: no socket, connection or task of its own is left. Always ends after ``close``.

        If it is cancelled once the server stops, the connections are aborted.
        """
        try:
            await self._closed.wait()
        except asyncio.CancelledError:
            if self._stopping:
                self.abort()
                await self._closed.wait()
            raise

    async def serve_forever(self) -> None:
        """Wait until it is closed; close it if this is cancelled."""
        try:
            await self._closed.wait()
        finally:
            self.close()
            await self.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    def _start_stopping(self) -> None:
        if self._stopper is None:
            self._stopper = self._loop.create_task(self._stop())

    async def _stop(self) -> None:
        registry = self._registry
        emptied = asyncio.Event()
        registry.on_empty = emptied.set
        deadline = self._loop.time() + self.config.timeout_graceful_shutdown
        try:
            await self._drain_backlog()
            self._stop_listening()
            registry.stop()
            while registry.is_occupied and not self._aborting and self._loop.time() < deadline:
                emptied.clear()  # it may have been empty before: clients still came from the queue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_INTERVAL):
                        await emptied.wait()
                registry.sweep()
        finally:
            self._stop_listening()
            registry.abort()
            self._sweeper.stop()
            for _ in range(ABORT_TURNS):
                if registry.is_occupied:
                    await asyncio.sleep(0)
            self._closed.set()

    async def _drain_backlog(self) -> None:
        """Empty the kernel's queues: closing a listener resets the clients in it, whatever they have sent."""
        waiting = select.poll()
        for each in self._sockets:
            waiting.register(each, select.POLLIN)
        turns = len(self._sockets) * self.config.backlog  # who connects now is not let in for ever
        while waiting.poll(0) and turns and not self._aborting:
            turns -= 1
            await asyncio.sleep(0)
        # asyncio resets a client that it has accepted and whose connection is not made yet when its server is closed.
        for each in self._sockets:
            with contextlib.suppress(RuntimeError):  # uvloop accepts in another way, which has no such gap
                self._loop.remove_reader(each)
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)

    def _stop_listening(self) -> None:
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._close_sockets()


async def _resolve(config: ServerConfig) -> Sequence[net.AddressInfo]:
    infos = net.numeric(config)
    return await asyncio.to_thread(net.resolve, config) if infos is None else infos


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
