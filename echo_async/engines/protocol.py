"""Callbacks on asyncio's transports: no task a client, one call into the conversation and one write a read.

It takes what the kernel has, so ``chunk_size`` does not slow it; what it saves is a coroutine's turn for
every read. Only ``bytes`` are written: a transport keeps what it could not send without copying it.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from ..logs import log
from ..proxy import Source
from .acceptor import ACCEPT_BATCH, HandshakeAcceptor, Listener, OnEstablished, Tls, start_accepting
from .connection import Connection
from .registry import Registry

__all__ = ["ProtocolConnection", "listen"]


async def listen(
    registry: Registry, loop: asyncio.AbstractEventLoop, listener: socket.socket, tls: Tls | None
) -> Listener:
    """Begin to accept clients on ``listener``, over TLS if there is a ``tls``."""
    make = LoggedProtocolConnection if registry.log_messages or registry.log_chunks else ProtocolConnection
    if tls is not None or registry.expects_header:
        return HandshakeAcceptor(registry, loop, listener, tls, partial(make, registry))
    server = await loop.create_server(partial(make, registry), sock=listener, backlog=ACCEPT_BATCH, start_serving=False)
    return await start_accepting(server, listener, registry)


class ProtocolConnection(Connection, asyncio.Protocol):
    """One client of the ``protocol`` engine."""

    __slots__ = ("_drain_target", "_establish", "_transport", "_write", "_writing_paused")

    _transport: asyncio.Transport
    _write: Callable[[bytes], object]

    def __init__(self, registry: Registry, source: Source = None, on_established: OnEstablished | None = None) -> None:
        super().__init__(registry, source)
        self._establish = on_established  # where it has shown its PROXY header, or done its TLS handshake
        self._writing_paused = False
        self._drain_target: int | None = None  # bytes that it had sent when the server stopped, read or not

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._establish is not None:
            self._peername = self._peername or transport.get_extra_info("peername")
            self._establish()
        elif self.registry.refuse():
            return self._transport.abort()
        self._write = self._transport.write
        self.registry.add(self)

    @property
    def peer(self) -> str:
        """The client's address, asked for when it is needed: without TLS it can be until the connection is lost."""
        self._peername = self._peername or self._transport.get_extra_info("peername")
        return super().peer

    def data_received(self, data: bytes) -> None:
        said = self.conversation
        try:
            reply = said.receive(data)
            if reply:
                write = self._write  # a name of its own: CPython is slow to call what it finds in a slot
                write(reply)
            if said.finished and self._lingering_since is None:
                self.finish()
        except Exception as error:
            self.fail(error)

    def eof_received(self) -> bool:
        self.conversation.receive_eof()
        return False  # the transport sends what is left and closes

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            log.debug("%s broke off: %s", self.peer, error)
        self.registry.remove(self)

    def pause_writing(self) -> None:
        """The client does not read: what it sends has to wait as well."""
        self._writing_paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._read_on()

    def _may_read(self) -> bool:
        return not self._writing_paused

    def _kernel_buffered(self) -> int:
        """Bytes that the client has sent and that wait in the kernel; over TLS, as they are on the wire."""
        if self._transport.is_closing():
            return 0
        waiting = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(waiting, sys.byteorder)

    def _read_on(self) -> None:
        if self._may_read() and not self._transport.is_closing():
            self._transport.resume_reading()

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def finish(self) -> None:
        self.conversation.finish()
        self._lingering_since = self.registry.now()
        try:
            if self._transport.can_write_eof():
                self._transport.write_eof()
            else:
                self._transport.close()
        except (OSError, RuntimeError):  # the client reset the connection just now
            self._transport.abort()

    def stop(self) -> None:
        said = self.conversation
        if self._drain_target is None:
            self._drain_target = said.received + self._kernel_buffered()
        # What has to wait was received as well, so it is asked again until that is read; what comes later is not.
        if not self._may_read() or (said.received < self._drain_target and self._kernel_buffered()):
            return
        said.stop()
        if said.finished and self._lingering_since is None:
            self.finish()

    def abort(self) -> None:
        self._transport.abort()


class LoggedProtocolConnection(ProtocolConnection):
    """The same with the log on. The lines for one read are written in turns; no more is read until they are."""

    __slots__ = ("_lines", "_loop")

    def __init__(self, registry: Registry, source: Source = None, on_established: OnEstablished | None = None) -> None:
        super().__init__(registry, source, on_established)
        self._loop = asyncio.get_running_loop()
        self._lines: Iterator[None] | None = None  # those that are still to be written

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.registry.log_messages:
            self._write = self._write_and_log

    def data_received(self, data: bytes) -> None:
        if self.registry.log_chunks:
            self.log_chunk(data)
        super().data_received(data)

    def _write_and_log(self, reply: bytes) -> None:
        self._transport.write(reply)
        self._lines = self.log_reply(reply)
        for _ in self._lines:
            self._transport.pause_reading()
            self._loop.call_soon(self._log_on)
            return
        self._lines = None

    def _log_on(self) -> None:
        assert self._lines is not None
        for _ in self._lines:
            self._loop.call_soon(self._log_on)
            return
        self._lines = None
        self._read_on()

    def _may_read(self) -> bool:
        return self._lines is None and super()._may_read()
