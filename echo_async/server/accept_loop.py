"""Accepts connections that have to send a PROXY header or complete a TLS handshake first, or can have a script.

An event loop's own server has no place for what precedes a connection. So this one accepts, and counts a connection
as pending until it is established.
"""

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import cast

from ..engines.context import Slot
from ..engines.loop_internals import run_turns
from ..engines.tls_transport import TlsTransport
from ..net import shut_down
from ..tls import Certificates
from .admission import ACCEPT_RETRY_DELAY, HANDSHAKE_TIMEOUT, SHUTTING_DOWN, Admission, PendingSlot
from .proxy_reader import read_header
from .registry import Registry


class AcceptLoop:
    """Accepts connections on ``listener`` until it is closed."""

    def __init__(
        self,
        admission: Admission,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        certificates: Certificates | None,
        protocol_factory: Callable[[Registry, Slot], Callable[[], asyncio.Protocol]],
    ) -> None:
        self._admission = admission
        self._loop = loop
        self._protocol_factory = protocol_factory
        self._certificates = certificates
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._tasks.add(loop.create_task(self._accept(listener)))

    def stop(self) -> None:
        """Complete the current ``sock_accept``, and begin no other: to cancel one can lose a connection."""
        self._is_stopping = True

    def close(self) -> None:
        """Accept no more, and abort what is pending."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        while not self._is_stopping:
            try:
                connection, peername = await self._loop.sock_accept(listener)
            except Exception as error:
                await asyncio.sleep(ACCEPT_RETRY_DELAY if self._admission.on_accept_error(error) else 0)
                continue
            self._admission.admit(connection, peername, self._begin)

    def _begin(self, slot: PendingSlot) -> None:
        task = self._loop.create_task(self._establish(slot))
        self._tasks.add(task)
        task.add_done_callback(partial(self._on_done, slot))

    def _on_done(self, slot: PendingSlot, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # before it began
            slot.release()
            _close(slot.connected)

    async def _establish(self, slot: PendingSlot) -> None:
        """Read the PROXY header, do the TLS handshake, whichever is configured; then serve the connection."""
        await run_turns(1)  # its task is in _tasks then, also if the program starts tasks eagerly
        fail = self._admission.fail_header
        try:
            if self._admission.expects_header:
                header, seconds = self._admission.new_header(), self._admission.config.timeout_message
                slot.set_header(await read_header(self._loop, slot.connected, header, seconds))
            protocol = self._protocol_factory(self._admission.registry, slot)()
            if self._certificates is None:  # takes no time: a shutdown does not cancel it
                self._tasks.discard(cast(asyncio.Task[None], asyncio.current_task()))
                await self._loop.connect_accepted_socket(lambda: protocol, slot.connected)
            else:
                handshake = self._loop.create_future()
                on_error = partial(self._admission.fail_tls, slot)
                secured = TlsTransport(self._certificates.context, protocol, handshake, on_error)
                fail = partial(self._admission.fail_handshake, secured.tls)
                async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                    await self._do_handshake(slot.connected, secured, handshake)
        except (Exception, asyncio.CancelledError) as error:
            if slot in self._admission.registry.pending:  # else its engine ends it; a shutdown drains it
                fail(slot, error if isinstance(error, Exception) and not slot.is_aborted else SHUTTING_DOWN)
                _close(slot.connected)
            error.with_traceback(None)  # which refers to the connection, which has the error

    async def _do_handshake(
        self, connected: socket.socket, secured: TlsTransport, handshake: asyncio.Future[Exception | None]
    ) -> None:
        transport, _ = await self._loop.connect_accepted_socket(lambda: secured, connected)
        try:
            if (error := await handshake) is not None:
                raise error
        except BaseException:
            transport.abort()
            raise


def _close(connection: socket.socket) -> None:
    shut_down(connection)
    connection.close()
