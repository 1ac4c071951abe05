"""TLS between the transport of an event loop and the protocol of an engine, which see no difference.

The event loops have TLS of their own. It processes in one turn whatever has arrived, cannot be half-closed, and keeps
large buffers for idle connections.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, cast

from ..wire.tls_layer import TlsLayer

NO_PROTOCOL = asyncio.Protocol()  # ignores everything


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """A protocol for the event loop and, once the handshake is complete, a transport for ``protocol``.

    ``handshake`` gets the error of the handshake as its result, or None; ``on_error`` is called with a later one.
    """

    __slots__ = (
        "_handshake",
        "_is_reading_paused",
        "_is_turn_scheduled",
        "_is_writing_paused",
        "_loop",
        "_on_error",
        "_plain",
        "_protocol",
        "tls",
    )

    _plain: asyncio.Transport

    def __init__(
        self,
        context: ssl.SSLContext,
        protocol: asyncio.Protocol,
        handshake: asyncio.Future[Exception | None],
        on_error: Callable[[Exception], object],
    ) -> None:
        self.tls = TlsLayer(context)
        self._protocol = protocol
        self._handshake: asyncio.Future[Exception | None] | None = handshake
        self._on_error = on_error
        self._loop = handshake.get_loop()
        self._is_reading_paused = False  # by the protocol
        self._is_writing_paused = False
        self._is_turn_scheduled = False

    # The protocol of the event loop's transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._plain = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        tls = self.tls
        try:
            plaintext = tls.receive(data)
        except Exception as error:  # a lack of memory
            return self._fail(error)
        if plaintext:
            self._protocol.data_received(plaintext)
        if tls.has_news:
            self._handle_news()

    def _handle_news(self) -> None:
        tls = self.tls
        if output := tls.output():
            self._plain.write(output)
        if tls.error is not None:
            return self._fail(tls.error)
        if self._handshake is not None and tls.is_established:
            self._end_handshake(None)
            self._protocol.connection_made(self)
            if self._is_writing_paused:
                self._protocol.pause_writing()
        if tls.has_records:
            self._schedule_turn()
        elif tls.is_ended and not self._protocol.eof_received():
            self.close()

    def _fail(self, error: Exception) -> None:
        if self._handshake is not None:
            self._protocol = NO_PROTOCOL
            return self._end_handshake(error)
        if isinstance(error, ssl.SSLError):
            self._on_error(error)
        self.tls.error = error
        self._plain.close()  # after an alert

    def _end_handshake(self, error: Exception | None) -> None:
        if self._handshake is not None and not self._handshake.done():
            self._handshake.set_result(error)
        self._handshake = None

    def _schedule_turn(self) -> None:
        """Let other connections have their turn before the next records are processed."""
        if not self._is_turn_scheduled and self._can_read():
            self._is_turn_scheduled = True
            self._plain.pause_reading()
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._is_turn_scheduled = False
        if self._can_read():
            self.data_received(b"")
            if not self.tls.has_records:
                self._continue_reading()

    def _can_read(self) -> bool:
        return not (self._is_reading_paused or self._is_writing_paused or self._plain.is_closing())

    def _continue_reading(self) -> None:
        if self.tls.has_records:
            self._schedule_turn()
        elif self._can_read():
            self._plain.resume_reading()

    def eof_received(self) -> bool:
        if not self.tls.is_ended:
            self.tls.receive_eof()
            self._handle_news()
        return True  # it is closed here, not by the event loop

    def connection_lost(self, error: Exception | None) -> None:
        if self._handshake is not None:
            self._fail(error or ConnectionError("closed by the peer"))
        self._protocol.connection_lost(self.tls.error or error)
        self._protocol = NO_PROTOCOL  # which refers to this object

    def pause_writing(self) -> None:
        """Read nothing as well: TLS answers some records itself."""
        self._is_writing_paused = True
        self._plain.pause_reading()
        if self._handshake is None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        if self._handshake is None:
            self._protocol.resume_writing()
        self._continue_reading()

    # The transport of an engine's protocol.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._plain.write(self.tls.send(data))

    def get_write_buffer_size(self) -> int:
        return self._plain.get_write_buffer_size()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if close_notify := self.tls.close():
            self._plain.write(close_notify)
        self._plain.write_eof()

    def pause_reading(self) -> None:
        self._is_reading_paused = True
        self._plain.pause_reading()

    def resume_reading(self) -> None:
        self._is_reading_paused = False
        self._continue_reading()

    def is_closing(self) -> bool:
        return self._plain.is_closing()

    def close(self) -> None:
        self._plain.close()  # write_eof has sent the close_notify

    def abort(self) -> None:
        self._plain.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return ``tls``, which is the :class:`TlsLayer`, or what the transport beneath returns."""
        return self.tls if name == "tls" else self._plain.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol
