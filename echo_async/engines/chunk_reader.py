"""Reads the input of a connection as the bytes that arrived.

asyncio's StreamReader appends all input to a bytearray, copies each chunk from its front and moves the rest.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from .loop_internals import is_fed_by, read_buffered


@dataclass(slots=True, eq=False)
class ChunkReader(asyncio.Protocol):
    """Replaces the protocol of a transport, with the :meth:`read` of a StreamReader.

    The replaced protocol is still told everything but the input, so a StreamWriter works as before.
    """

    _transport: asyncio.Transport
    _max_size: int  # bytes that are not read yet above which nothing more is received
    _loop: asyncio.AbstractEventLoop
    _data: bytes = b""  # what is not read yet
    _is_paused: bool = False
    _is_ended: bool = False
    _error: Exception | None = None
    _waiter: asyncio.Future[None] | None = None
    _connection: Any = None  # a StreamConnection, whose module imports this one
    _discard: Callable[[bytes], object] | None = None
    _replaced: asyncio.Protocol = field(init=False)

    def __post_init__(self) -> None:
        self._replaced = cast(asyncio.Protocol, self._transport.get_protocol())
        self._transport.set_protocol(self)

    def notify(self, connection: Any) -> None:
        """Start ``connection`` if there is something to read and it is not reading; tell it when it is lost."""
        self._connection = connection

    def discard(self, function: Callable[[bytes], object]) -> None:
        """Give ``function`` the input from now on, with what is buffered. At its end the transport is closed.

        The error of a connection that is lost already is raised.
        """
        if self._error is not None:
            raise self._error
        self._discard = function
        if self._data:
            function(self._data)
            self._data = b""
        self.receive_more()
        if self._is_ended:
            self._transport.close()

    async def read(self, _: int) -> bytes:
        """Return all that has arrived, as soon as there is something, and nothing at the end of input."""
        if not self._data and not self._is_ended:
            if self._is_paused:
                self.receive_more()
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        data, self._data = self._data, b""
        return data

    def unread(self, data: bytes) -> None:
        """Put back ``data``, which was read last, unless the connection is lost."""
        if self._error is None:
            self._data = data + self._data

    def receive_more(self) -> None:
        """Resume receiving, if all was read."""
        if self._is_paused and not self._data:
            self._is_paused = False
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._discard is not None:
            self._discard(data)
            return
        self._data += data  # no copy if one of them is empty
        self._wake()
        if len(self._data) > self._max_size and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._is_ended = True
        if self._discard is not None:
            return False
        self._wake()
        return self._transport.can_write_eof()  # asyncio's own TLS has no half-closed connections

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            error.with_traceback(None)  # of a write, which refers to the connection
            self._error, self._data = error, b""
        self._replaced.connection_lost(error)  # which keeps the error and its traceback
        self._is_ended = True
        connection, self._connection = self._connection, None  # which refers to this object
        self._wake()
        if connection is not None:
            connection.on_lost(error)

    def pause_writing(self) -> None:
        self._replaced.pause_writing()

    def resume_writing(self) -> None:
        self._replaced.resume_writing()

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
        elif self._connection is not None:
            self._connection.start()


def take_over(
    reader: asyncio.StreamReader, transport: asyncio.WriteTransport, max_size: int, loop: asyncio.AbstractEventLoop
) -> ChunkReader | asyncio.StreamReader:
    """Return a ChunkReader in place of ``reader``, with what that has buffered.

    A ``reader`` that is not fed by ``transport``, or no longer, is returned itself.
    """
    if not is_fed_by(reader, transport):
        return reader
    chunks = ChunkReader(cast(asyncio.Transport, transport), max_size, loop)
    if data := read_buffered(reader):
        chunks.data_received(data)
    if reader.at_eof():
        chunks.eof_received()
    return chunks
