"""Accepts connections for the asyncio engines, and ends all of them at a shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Protocol

from ..compat import is_readable
from ..engines.context import ServerContext, Slot
from ..engines.loop_internals import ABORT_TURNS, keep_freed_memory, run_turns, start_serving, stop_accepting
from ..tls import Certificates
from .accept_loop import AcceptLoop
from .admission import Admission, NativeSlot
from .listeners import ListeningSockets
from .registry import DRAIN_INTERVAL
from .sweeper import Sweeper
from .udp import Receiver, start_receiver


class AsyncioEngine(Protocol):
    """What the modules ``streams`` and ``protocol`` provide."""

    def create_protocol(self, context: ServerContext, slot: Slot) -> asyncio.Protocol:
        """Return the protocol for one connection, whose transport is made by the caller."""

    async def create_server(self, context: ServerContext, slot: Slot, listener: socket.socket) -> asyncio.Server:
        """Return a server that makes such protocols, and does not serve yet."""


class AsyncioAcceptor:
    """Serves ``listeners`` with ``engine`` in the running event loop; ``on_closed`` is called at the end.

    It sweeps the connections for timeouts meanwhile.
    """

    def __init__(
        self,
        engine: AsyncioEngine,
        admission: Admission,
        listeners: ListeningSockets,
        certificates: Certificates | None,
        on_closed: Callable[[], object],
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._registry = admission.registry
        self._listeners = listeners
        self._certificates = certificates
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._servers: list[asyncio.Server | AcceptLoop] = []
        self._sweeper = Sweeper(self._registry)
        self._receiver: Receiver | None = None
        self._is_stopping = self._is_aborting = False

    async def start(self) -> None:
        """Accept connections from now on. Once, after the acceptor is made."""
        keep_freed_memory()
        try:
            for listener in self._listeners.sockets if self._admission.config.accepts else ():
                self._servers.append(await self._serve(listener))
            self._receiver = start_receiver(self._admission, self._listeners.datagram_sockets)
        except BaseException:  # canceled
            self._stop_listening()
            self._registry.abort()
            raise
        self._sweeper.start()

    async def _serve(self, listener: socket.socket) -> asyncio.Server | AcceptLoop:
        config = self._admission.config
        if self._certificates is None and not self._admission.expects_header and not config.has_scripts:
            server = await self._engine.create_server(self._registry, NativeSlot(self._admission), listener)
            return await start_serving(server, listener, config.backlog)
        return AcceptLoop(self._admission, self._loop, listener, self._certificates, self._engine.create_protocol)

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once; safe to call twice, and from any thread."""
        if _is_running(self._loop):
            self._begin_shutdown()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and everything with it
                self._loop.call_soon_threadsafe(self._begin_shutdown)

    def abort(self) -> None:
        """Shut down without waiting for any client. Call it in the event loop."""
        self._is_aborting = True
        self.close()
        self._registry.abort()

    def join(self) -> None:
        """Do nothing: nothing is left to wait for after ``on_closed``."""

    def _begin_shutdown(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._shutdown = self._loop.create_task(self._shut_down())

    async def _shut_down(self) -> None:
        registry = self._registry
        emptied = asyncio.Event()
        registry.on_empty = emptied.set
        deadline = self._loop.time() + self._admission.config.timeout_graceful_shutdown
        try:
            self._stop_udp()
            if self._servers:
                await self._drain_backlog()
            self._listeners.shut_down()
            for server in self._servers:
                server.close()
            await run_turns(1)  # nothing waits for a listener when it is closed: select would fail
            self._stop_listening()
            registry.drain()
            while not self._admission.is_idle and not self._is_aborting and self._loop.time() < deadline:
                emptied.clear()  # it may have been empty before: connections still came from the backlog
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_INTERVAL):
                        await emptied.wait()
                registry.sweep()
        finally:
            self._stop_listening()
            registry.abort()
            self._sweeper.stop()
            for _ in range(ABORT_TURNS):
                if not self._admission.is_idle:
                    await run_turns(1)
            self._on_closed()

    async def _drain_backlog(self) -> None:
        """Accept what waits in the backlogs: closing a listener resets it, whatever it has sent."""
        listeners = self._listeners.sockets
        turns = len(listeners) * self._admission.config.backlog  # connections that arrive now do not extend this
        while turns and is_readable(listeners) and not self._is_aborting:
            turns -= 1
            await run_turns(1)
        for server in self._servers:
            if isinstance(server, AcceptLoop):
                server.stop()
        await stop_accepting(self._loop, listeners)

    def _stop_udp(self) -> None:
        if self._receiver is not None:
            self._receiver.stop()
            self._receiver.wait_stopped()
        self._listeners.close_udp()

    def _stop_listening(self) -> None:
        self._stop_udp()
        self._listeners.shut_down()
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._listeners.close()


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
