"""Callbacks on asyncio's transports: no task a client, one call into the conversation and one write a read.

It takes what the kernel has, so ``chunk_size`` does not slow it; what it saves is a coroutine's turn for
every read. Only ``bytes`` are written: a transport keeps what it could not send without copying it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import cast

from ..logs import log
from .accepting import BATCH, Listener, TlsListener, restore_backlog
from .connection import Connection
from .registry import Registry

__all__ = ["ProtocolConnection", "listen"]


async def listen(
    registry: Registry, loop: asyncio.AbstractEventLoop, listener: socket.socket, context: ssl.SSLContext | None
) -> Listener:
    """Begin to accept clients on ``listener``, over TLS if there is a ``context``."""
    if context is None:
        server = await loop.create_server(lambda: ProtocolConnection(registry), sock=listener, backlog=BATCH)
        restore_backlog(listener, registry)
        return server
    return TlsListener(registry, loop, listener, context, lambda: TlsProtocolConnection(registry))


class ProtocolConnection(Connection, asyncio.Protocol):
    """One client of the ``protocol`` engine."""

    __slots__ = ("_receive", "_send", "_transport")

    _transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._is_let_in():
            return self._transport.abort()
        self._peername = transport.get_extra_info("peername")
        self._receive = self._receive_and_log if self.registry.log_chunks else self.conversation.receive
        self._send = self._send_and_log if self.registry.log_messages else self._transport.write
        self.registry.add(self)

    def _is_let_in(self) -> bool:
        return not self.registry.refuse()

    def data_received(self, data: bytes) -> None:
        reply = self._receive(data)
        if reply:
            self._send(reply)
        if self.conversation.finished and self._ended_at is None:
            self.finish()

    def eof_received(self) -> bool:
        self.conversation.receive_eof()
        return False  # the transport sends what is left and closes

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            log.debug("%s broke off: %s", self.peer, error)
        self.registry.remove(self)

    def pause_writing(self) -> None:
        """The client does not read: what it sends has to wait as well."""
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def finish(self) -> None:
        self.conversation.finish()
        self._ended_at = self.registry.now()
        try:
            if self._transport.can_write_eof():
                self._transport.write_eof()
            else:
                self._transport.close()
        except (OSError, RuntimeError):  # the client reset the connection just now
            self._transport.abort()

    def stop(self) -> None:
        self.conversation.stop()
        if self.conversation.finished and self._ended_at is None:
            self.finish()

    def abort(self) -> None:
        self._transport.abort()

    def _receive_and_log(self, data: bytes) -> bytes:
        self.log_chunk(data)
        return self.conversation.receive(data)

    def _send_and_log(self, reply: bytes) -> None:
        self._transport.write(reply)
        self.log_replies(reply)


class TlsProtocolConnection(ProtocolConnection):
    """The same over TLS, where a client was let in before its handshake."""

    __slots__ = ()

    def _is_let_in(self) -> bool:
        self.registry.end_handshake()
        return True
