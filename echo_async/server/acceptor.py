"""Accepts connections for the asyncio engines, and ends all of them at a shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from importlib import import_module
from typing import cast

from ..compat import is_ready
from ..engines.context import ServerContext, Slot
from ..engines.loop_internals import (
    ABORT_TURNS,
    ACCEPT_BATCH,
    keep_freed_memory,
    make_transport,
    run_turns,
    start_serving,
    stop_accepting,
)
from ..net import format_address, shut_down
from .accept_loop import AcceptLoop
from .admission import ACCEPT_RETRY_DELAY, Admission, NativeSlot
from .base_server import Acceptor
from .registry import DRAIN_INTERVAL
from .sweeper import Sweeper
from .udp import start_receiver


class Aborted(asyncio.Protocol):
    """Takes the place of a protocol for which there was no memory."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


ABORTED = Aborted()


class SelectorServer:
    """Takes the place of :class:`asyncio.Server` in asyncio's own event loop.

    That one starts a task per connection, which takes a sixth of the instructions of one with one message.
    """

    def __init__(
        self,
        admission: Admission,
        loop: asyncio.SelectorEventLoop,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
    ) -> None:
        self._admission = admission
        self._loop = loop
        self._listener = listener
        self._make_protocol = make_protocol
        self._retry_timer: asyncio.TimerHandle | None = None
        self._start()

    def _start(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Accept no more. What is accepted has its transport."""
        self._loop.remove_reader(self._listener)
        if self._retry_timer is not None:
            self._retry_timer.cancel()

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                connected, peername = self._listener.accept()
            except BlockingIOError:
                return
            except Exception as error:
                if self._admission.on_accept_error(error):
                    self.close()
                    self._retry_timer = self._loop.call_later(ACCEPT_RETRY_DELAY, self._start)
                    return
                continue
            try:
                make_transport(self._loop, connected, self._make_protocol(), peername)
            except Exception as error:  # a lack of memory
                self._admission.registry.fail(format_address(peername), error)
                connected.close()


class AsyncioAcceptor(Acceptor):
    """Serves connections in the running event loop, and sweeps them for timeouts meanwhile."""

    async def start(self) -> None:
        engine = import_module(f"..engines.{self.config.engine}", __package__)
        self._make_factory: Callable[[ServerContext, Slot], Callable[[], asyncio.Protocol]] = engine.protocol_factory
        self._loop = asyncio.get_running_loop()
        self._servers: list[asyncio.Server | SelectorServer | AcceptLoop] = []
        self._sweeper = Sweeper(self.registry)
        keep_freed_memory()
        try:
            for listener in self.sockets.sockets if self.config.accepts else ():
                self._servers.append(await self._serve(listener))
            self._receiver = start_receiver(self._admission, self.sockets.datagram_sockets)
        except BaseException:  # canceled
            self._stop_listening()
            self.registry.abort()
            raise
        self._sweeper.start()

    async def _serve(self, listener: socket.socket) -> asyncio.Server | SelectorServer | AcceptLoop:
        if self.certificates is not None or self._admission.expects_header or self.config.has_scripts:
            return AcceptLoop(self._admission, self._loop, listener, self.certificates, self._make_factory)
        make_protocol, backlog = self._protocol_factory(), self.config.backlog
        if type(self._loop) is asyncio.SelectorEventLoop:
            listener.listen(backlog)
            return SelectorServer(self._admission, self._loop, listener, make_protocol)
        server = await self._loop.create_server(make_protocol, sock=listener, backlog=ACCEPT_BATCH, start_serving=False)
        return await start_serving(server, listener, backlog)

    def _protocol_factory(self) -> Callable[[], asyncio.Protocol]:
        make, registry = self._make_factory(self.registry, NativeSlot(self._admission)), self.registry

        def make_protocol() -> asyncio.Protocol:
            try:
                return make()
            except Exception as error:  # which would end a listener of uvloop
                registry.fail("unknown peer", error)
                return ABORTED

        return make_protocol

    def close(self) -> None:
        if _is_running(self._loop):
            self._begin_shutdown()
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and everything with it
                self._loop.call_soon_threadsafe(self._begin_shutdown)

    def abort(self) -> None:
        self._is_aborting = True
        self.close()
        self.registry.abort()

    async def disconnect(self, *, reset: bool) -> None:
        await self._accept_waiting()
        await run_turns(ABORT_TURNS)  # those that are accepted are established then
        for slot in list(self.registry.pending):
            slot.is_aborted = True
            shut_down(slot.connected)
        self.registry.abort(reset=reset)

    def _begin_shutdown(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._shutdown = self._loop.create_task(self._shut_down())

    async def _shut_down(self) -> None:
        registry = self.registry
        emptied = asyncio.Event()
        registry.on_empty = emptied.set
        deadline = self._loop.time() + self.config.timeout_graceful_shutdown
        try:
            self._stop_udp()
            if self._servers:
                await self._drain_backlog()
            self.sockets.shut_down()
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
            self.registry.write_pending_logs(at_once=True)
            self._on_closed()

    async def _accept_waiting(self) -> None:
        listeners = self.sockets.sockets
        turns = len(listeners) * self.config.backlog  # connections that arrive now do not extend this
        while turns and is_ready(listeners) and not self._is_aborting:
            turns -= 1
            await run_turns(1)

    async def _drain_backlog(self) -> None:
        """Accept what waits in the backlogs, and then no more: closing a listener resets it, whatever it has sent."""
        await self._accept_waiting()
        for server in self._servers:
            if isinstance(server, AcceptLoop):
                server.stop()
            elif isinstance(server, SelectorServer):
                server.close()
        await stop_accepting(self._loop, self.sockets.sockets)

    def _stop_listening(self) -> None:
        self._stop_udp()
        self.sockets.shut_down()
        for server in self._servers:
            server.close()
        self._servers.clear()
        self.sockets.close()


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
