"""One connection: the bytes that were sent must come back, in order, and no others.

How they are compared is in ``comparing``; here they are carried by an asyncio transport, and timed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from time import monotonic
from typing import cast

from ..errors import describe_error
from ..verifier import Exchange, ReplyVerifier

__all__ = ["Connection"]

log = logging.getLogger("echo_async.client")

READ_SIZE = 65_536  # bytes of one read after a connection broke
STALL_THRESHOLD = 0.1  # seconds: a timer that is later than this tells that the loop stood still, not the server


class _Echo(Exchange):
    """One message, and the caller who waits for it."""

    __slots__ = ("future",)

    def __init__(self, data: bytes, future: asyncio.Future[None]) -> None:
        self.data = data
        self.returned = 0
        self.error = None
        self.future = future

    def progress(self) -> None:
        future = self.future
        if future.done():  # cancelled: the reply still had to come, for those after it
            return
        if self.error is not None:
            future.set_exception(self.error)
        elif self.returned == len(self.data):
            future.set_result(None)


class Connection(ReplyVerifier, asyncio.Protocol):
    """Sends, and compares what comes back. ``closed`` is done once the socket was let go."""

    _transport: asyncio.Transport
    _is_tls: bool

    def __init__(self, name: str, timeout: float) -> None:
        super().__init__(name)
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._timer: asyncio.TimerHandle | None = None
        self._overdue = False
        self._logs = log.isEnabledFor(logging.DEBUG)
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # Sending

    def echo(self, data: bytes) -> asyncio.Future[None]:
        """Send one message; the future is done when it is back."""
        future = self._loop.create_future()
        self.send(_Echo(data, future))
        return future

    def send(self, exchange: Exchange) -> None:
        out = self._in_flight
        if not out:
            self._since = monotonic()
            if self._timer is None:
                self._timer = self._loop.call_later(self._timeout, self._look_at_time)
        out.append(exchange)
        if self._logs:
            log.debug("sending %d bytes", len(exchange.data))
        try:
            self._transport.write(exchange.data)
        except RuntimeError as error:  # uvloop: "the handler is closed"
            self._lose(f"the connection to {self._name} broke ({describe_error(error)})")

    def close(self) -> None:
        """Close; what is still out is lost. To call it twice does no harm."""
        if self._in_flight:
            self._lose(f"the connection to {self._name} was closed by this client")
        else:
            self.open = False
            self._transport.close()

    def _close_socket(self) -> None:
        self._transport.abort()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        # Asked now: asyncio's TLS transport cannot be asked any more once it is closed.
        self._is_tls = transport.get_extra_info("ssl_object") is not None
        self.open = True

    def data_received(self, data: bytes) -> None:
        out = self._in_flight
        if out and not (exchange := out[0]).returned and data == exchange.data:  # the common case
            out.popleft()
            exchange.returned = len(data)
            self.replies += 1
            if out:
                self._since = monotonic()
            exchange.progress()
        elif self.open:
            self._compare(data)

    def eof_received(self) -> None:
        self._lose(f"{self._name} closed the connection")

    def connection_lost(self, error: Exception | None) -> None:
        if error is None:
            self._lose(f"{self._name} closed the connection")
        else:
            self._read_what_came_before()
            self._lose(f"the connection to {self._name} broke ({describe_error(error)})")
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def _read_what_came_before(self) -> None:
        """A write that fails ends a transport at once, with replies unread that had come before."""
        if self._is_tls:
            return
        with contextlib.suppress(OSError):
            descriptor = self._transport.get_extra_info("socket").fileno()
            while self._in_flight and (data := os.read(descriptor, READ_SIZE)):
                self.data_received(data)

    # Time

    def _look_at_time(self) -> None:
        """The one timer of a connection, set for the reply that has to come next."""
        self._timer = None
        if not self._in_flight:
            self._overdue = False
            return
        now = monotonic()
        left = self._since + self._timeout - now
        if (
            left < -STALL_THRESHOLD
        ):  # the loop stood still: nobody looked at the socket, so the reply gets its time anew
            self._since, left = now, self._timeout
        if left > 0:
            self._overdue = False
            self._timer = self._loop.call_later(left, self._look_at_time)
        elif not self._overdue:  # uvloop looks at timers before sockets: one more round before we blame the server
            self._overdue = True
            self._timer = self._loop.call_later(0, self._look_at_time)
        else:
            self._in_flight[0].error = self._late(self._timeout)
            self._drop("a reply before it was late")
