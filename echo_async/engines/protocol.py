"""Callbacks on asyncio's transports: no task per connection, one call into the conversation and one write per read.

It takes what the kernel has, whatever ``chunk_size`` is, and saves a coroutine's turn per read. It writes only
``bytes``: a transport keeps what it could not send without copying it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from ..compat import is_readable
from ..server.handshake_acceptor import OnEstablished
from ..server.origin import UNKNOWN, Origin
from ..server.registry import Registry
from .connection import Connection
from .loop_internals import ACCEPT_BATCH, TRANSPORT_ERRORS, abort_transport, write_buffer_size

LARGE_READ = 200_000  # bytes; after a read of less, the kernel has no more: event loops read 256,000 at a time
LARGE_READS_PER_TURN = 4  # without a reply, before other connections get their turn; one with a reply ends the turn


async def create_server(registry: Registry, on_established: OnEstablished, listener: socket.socket) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(
        partial(_connection_class(registry), registry, on_established),
        sock=listener,
        backlog=ACCEPT_BATCH,
        start_serving=False,
    )


def create_protocol(registry: Registry, on_established: OnEstablished, origin: Origin) -> asyncio.Protocol:
    return _connection_class(registry)(registry, on_established, origin)


def _connection_class(registry: Registry) -> type[ProtocolConnection]:
    is_logging = registry.context.log_messages or registry.context.log_chunks
    return LoggedProtocolConnection if is_logging else ProtocolConnection


class ProtocolConnection(Connection, asyncio.Protocol):
    """One connection of the ``protocol`` engine."""

    __slots__ = (
        "_drain_target",
        "_is_writing_paused",
        "_large_reads",
        "_on_established",
        "_registry",
        "_transport",
        "_write",
    )

    needs_whole_replies = False
    """Whether the parts of a large reply are joined before they are written."""

    _transport: asyncio.Transport
    _write: Callable[[bytes], object]

    def __init__(self, registry: Registry, on_established: OnEstablished, origin: Origin = UNKNOWN) -> None:
        self.context = registry.context
        self._peername = origin.peername
        self._header = origin.header
        self._registry = registry
        self._on_established = on_established
        self._is_writing_paused = False
        self._large_reads = 0
        self._drain_target: int | None = None  # bytes that may have been sent to us when the shutdown began

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._write = self._transport.write
        try:
            if self._on_established():
                super().__init__(self.context, self._peername, self._header)
                if not self.needs_whole_replies:
                    self.conversation.write_parts_with(self._write)
                self._registry.add(self)
            else:
                self._transport.abort()
        except Exception as error:  # an event loop would keep the connection open
            self.fail(error)

    @property
    def peer(self) -> str:
        """The peer's address. Without a handshake it is looked up on demand, until the connection is lost."""
        if self._peername is None:
            self._peername = self._transport.get_extra_info("peername")
        return super().peer

    def data_received(self, data: bytes) -> None:
        conversation = self.conversation
        try:
            reply = conversation.receive(data)
            if reply:
                write = self._write  # a local: calling through a slot is slower in CPython
                write(reply)
            if conversation.finished and self._lingering_since is None:
                self.finish()
            elif len(data) > LARGE_READ:
                self._count_large_read(reply)
        except Exception as error:
            self.fail(error)

    def _count_large_read(self, reply: bytes) -> None:
        """End the turn if it was long enough: libuv reads 32 times in a row (src/unix/stream.c, uv__read)."""
        self._large_reads += 1
        if not reply and self._large_reads % LARGE_READS_PER_TURN:
            return
        if self._can_read() and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._resume_reading)

    def eof_received(self) -> bool:
        self.conversation.receive_eof()
        if self._lingering_since is None and self._transport.can_write_eof():
            with contextlib.suppress(*TRANSPORT_ERRORS):  # the client has reset the connection
                self._transport.write_eof()  # closing is no end if a child process has a duplicate of the socket
        return False  # the transport sends what is left and closes

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self.log_lost(error)
        self._registry.remove(self)

    def pause_writing(self) -> None:
        """Apply backpressure: the client does not read, so nothing is read from it."""
        self._is_writing_paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        self._resume_reading()

    def _can_read(self) -> bool:
        return not self._is_writing_paused

    def _kernel_buffered(self) -> int:
        """Return the most bytes that can wait in the kernel to be read: 0, or the size of its buffer."""
        connected = self._transport.get_extra_info("socket")
        if self._transport.is_closing() or not is_readable([connected]):
            return 0
        return int(connected.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))

    def _resume_reading(self) -> None:
        if self._can_read() and not self._transport.is_closing():
            self._transport.resume_reading()

    def unsent(self) -> int:
        return write_buffer_size(self._transport)

    def finish(self) -> None:
        self.conversation.finish()
        self._lingering_since = self.context.now()
        try:
            if self._transport.can_write_eof():
                self._transport.write_eof()
            else:
                self._transport.close()
        except TRANSPORT_ERRORS:  # the client has reset the connection
            self._transport.abort()

    def stop(self) -> None:
        conversation = self.conversation
        if self._drain_target is None:
            self._drain_target = conversation.received + self._kernel_buffered()
        # Later sweeps call this again until all of that is read. What arrives after it is not answered.
        if not self._can_read() or (conversation.received < self._drain_target and self._kernel_buffered()):
            return
        conversation.stop()
        if conversation.finished and self._lingering_since is None:
            self.finish()

    def abort(self) -> None:
        abort_transport(self._transport)


class LoggedProtocolConnection(ProtocolConnection):
    """The same with logging. The lines for one read are written in turns; nothing is read until they are."""

    __slots__ = ("_lines", "_loop")

    needs_whole_replies = True

    def __init__(self, registry: Registry, on_established: OnEstablished, origin: Origin = UNKNOWN) -> None:
        super().__init__(registry, on_established, origin)
        self._loop = asyncio.get_running_loop()
        self._lines: Iterator[None] | None = None  # still to be written

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.context.log_messages:
            self._write = self._write_and_log

    def data_received(self, data: bytes) -> None:
        if self.context.log_chunks:
            self.log_chunk(data)
        super().data_received(data)

    def _write_and_log(self, reply: bytes) -> None:
        self._transport.write(reply)
        self._log(self.log_reply(reply))
        if self._lines is not None:
            self._transport.pause_reading()

    def _log(self, lines: Iterator[None]) -> None:
        self._lines = None
        try:
            for _ in lines:
                self._lines = lines
                self._loop.call_soon(self._log_more)
                return
        except Exception as error:  # of a logging filter, for instance
            self.fail(error)

    def _log_more(self) -> None:
        assert self._lines is not None
        self._log(self._lines)
        self._resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        """Count as open until all messages are logged."""
        if self._lines is None:
            super().connection_lost(error)
        else:
            self._loop.call_soon(self.connection_lost, error)

    def abort(self) -> None:
        if self._lines is not None:  # a shutdown does not wait longer
            self.finish_log(self._lines)
        super().abort()

    def _can_read(self) -> bool:
        return self._lines is None and super()._can_read()
