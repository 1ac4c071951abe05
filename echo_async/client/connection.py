"""One connection on an asyncio transport, with a timeout for each reply."""

import asyncio
import contextlib
import logging
import socket
from time import monotonic
from typing import cast

from ..errors import describe_error
from .endpoint import Endpoint, log
from .verifier import Exchange, ReplyVerifier

READ_SIZE = 65_536  # bytes of one read after the connection was lost
STALL_THRESHOLD = 0.1  # seconds; a timer later than this shows that the event loop was blocked


class _Echo(Exchange):
    """One message, and the future of its reply."""

    __slots__ = ("future",)

    def __init__(self, data: bytes, future: asyncio.Future[None]) -> None:
        self.data = data
        self.received = 0
        self.error = None
        self.future = future

    def on_progress(self) -> None:
        future = self.future
        if future.done():  # canceled: its reply is received all the same
            return
        if self.error is not None:
            future.set_exception(self.error)
        elif self.received == len(self.data):
            future.set_result(None)


class ClientConnection(ReplyVerifier, asyncio.Protocol):
    """Send messages and verify their replies. ``closed`` is done when the socket is closed."""

    _transport: asyncio.Transport
    _is_tls: bool

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.name)
        self._loop = asyncio.get_running_loop()
        self._timeout = endpoint.config.timeout
        self._timer: asyncio.TimerHandle | None = None
        self._is_overdue = False
        self._is_logging = log.isEnabledFor(logging.DEBUG)
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # Sending

    def echo(self, data: bytes) -> asyncio.Future[None]:
        future = self._loop.create_future()
        self.send(_Echo(data, future))
        return future

    async def wait_for(self, exchange: Exchange) -> None:
        done = asyncio.Event()
        exchange.notify = done.set
        self.send(exchange)
        await done.wait()

    def send(self, exchange: Exchange) -> None:
        in_flight = self._in_flight
        if not in_flight:
            self._waiting_since = monotonic()
            if self._timer is None:
                self._timer = self._loop.call_later(self._timeout, self._check_timeout)
        in_flight.append(exchange)
        if self._is_logging:
            log.debug("sending %d bytes", len(exchange.data))
        try:
            self._transport.write(exchange.data)
        except RuntimeError as error:  # uvloop: "the handler is closed"
            self._fail_in_flight(describe_error(error))

    def close(self) -> None:
        if self._in_flight:
            self._fail_in_flight("closed by this client")
        else:
            self.is_open = False
            self._transport.close()

    def _close_socket(self) -> None:
        self._transport.abort()

    # Callbacks of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        # A closed TLS transport of asyncio no longer has this information.
        self._is_tls = transport.get_extra_info("ssl_object") is not None
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        in_flight = self._in_flight
        if in_flight and not (exchange := in_flight[0]).received and data == exchange.data:  # the common case
            in_flight.popleft()
            exchange.received = len(data)
            self.replies += 1
            if in_flight:
                self._waiting_since = monotonic()
            exchange.on_progress()
        elif self.is_open:
            self._verify(data)

    def eof_received(self) -> None:
        self._fail_in_flight("closed by the server")

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._read_kernel_buffer()
        self._fail_in_flight("closed by the server" if error is None else describe_error(error), error)
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def _read_kernel_buffer(self) -> None:
        """Read replies that the kernel received before a write failed: the transport does not."""
        if self._is_tls:
            return
        with contextlib.suppress(OSError):
            connected = socket.socket(fileno=self._transport.get_extra_info("socket").fileno())
            try:
                connected.setblocking(False)
                while self._in_flight and (data := connected.recv(READ_SIZE)):
                    self.data_received(data)
            finally:
                connected.detach()

    # Timeout

    def _check_timeout(self) -> None:
        """The only timer of a connection, set for the first reply in flight."""
        self._timer = None
        if not self._in_flight:
            self._is_overdue = False
            return
        now = monotonic()
        left = self._waiting_since + self._timeout - now
        if left < -STALL_THRESHOLD:  # the loop was blocked and read nothing: restart the timeout
            self._waiting_since, left = now, self._timeout
        if left > 0:
            self._is_overdue = False
            self._timer = self._loop.call_later(left, self._check_timeout)
        elif not self._is_overdue:  # uvloop runs timers before it reads sockets: wait one more iteration
            self._is_overdue = True
            self._timer = self._loop.call_later(0, self._check_timeout)
        else:
            self._fail_timeout(self._timeout)
