"""One connection on a nonblocking socket, with a timeout for each reply."""

import contextlib
import logging
import socket
from collections import deque
from selectors import EVENT_READ, EVENT_WRITE
from ssl import SSLSocket, SSLWantReadError, SSLWantWriteError
from time import monotonic

from ..client.connector import MAX_WAIT
from ..client.endpoint import Endpoint, log
from ..client.verifier import Exchange, ReplyVerifier
from ..compat import PollSelector
from ..errors import describe_error

READ_SIZE = 65_536  # bytes of one read
IMMEDIATE = 0.005  # seconds between two waits that do not count as a pause


class BlockingConnection(ReplyVerifier):
    """Send messages and verify their replies. Both are done while waiting: neither can block the other."""

    def __init__(self, endpoint: Endpoint, connected: socket.socket) -> None:
        super().__init__(endpoint.name)
        self.is_open = True
        self._socket = connected
        self._timeout = endpoint.config.timeout
        self._is_logging = log.isEnabledFor(logging.DEBUG)
        self._unsent: deque[memoryview] = deque()
        self._send_error: OSError | None = None
        self._selector = PollSelector()
        self._watched = EVENT_READ
        self._selector.register(connected, EVENT_READ)
        self._waited_until = 0.0  # the end of the last wait

    async def echo(self, data: bytes) -> None:
        exchange = Exchange(data)
        await self.wait_for(exchange)
        if exchange.error is not None:
            raise exchange.error

    async def wait_for(self, exchange: Exchange) -> None:
        self.send(exchange)
        while exchange.error is None and exchange.received < len(exchange.data):  # replies in flight are first
            self.wait()

    def send(self, exchange: Exchange) -> None:
        if self._is_logging:
            log.debug("sending %d bytes", len(exchange.data))
        if not self._in_flight:
            self._waiting_since = monotonic()
        self._in_flight.append(exchange)
        self._unsent.append(memoryview(exchange.data))
        self._flush()

    def wait(self) -> None:
        """Wait until data can be received or sent, or the first reply in flight times out.

        Return immediately if nothing is in flight: the consumer of a stream may have used the client meanwhile.
        """
        if not self.is_open or not self._in_flight:
            return
        watched = EVENT_READ | EVENT_WRITE if self._unsent else EVENT_READ
        if watched != self._watched:
            self._watched = watched
            self._selector.modify(self._socket, watched)
        now = monotonic()
        if now - self._waited_until > IMMEDIATE:  # nothing was received meanwhile: do not blame the server
            self._waiting_since = now
        left = self._waiting_since + self._timeout - now
        events = self._selector.select(max(0.0, min(left, MAX_WAIT)))  # polls at least once
        self._waited_until = monotonic()
        if not events:
            if self._waited_until >= self._waiting_since + self._timeout:
                self._fail_timeout(self._timeout)
            return
        if events[0][1] & EVENT_READ:
            self._receive()
        if self._unsent:
            self._flush()

    def receive_pending(self) -> None:
        while self.is_open and self._receive():
            pass

    def close(self) -> None:
        if self.is_open and isinstance(self._socket, SSLSocket):
            with contextlib.suppress(OSError, ValueError):  # send close_notify, without waiting for that of the server
                self._socket.unwrap()
        self._fail_in_flight("closed by this client")

    def _close_socket(self) -> None:
        self._unsent.clear()
        self._selector.close()
        self._socket.close()

    def _flush(self) -> None:
        """Send what the kernel accepts now. After an error, replies can still be received."""
        unsent = self._unsent
        try:
            while unsent:
                sent = self._socket.send(unsent[0])
                if sent == len(unsent[0]):
                    unsent.popleft()
                else:
                    unsent[0] = unsent[0][sent:]
        except (BlockingIOError, SSLWantReadError, SSLWantWriteError):
            pass
        except OSError as error:
            self._send_error = self._send_error or error
            unsent.clear()

    def _receive(self) -> bool:
        """Read once and verify; return False if nothing has arrived."""
        try:
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, SSLWantReadError, SSLWantWriteError):
            return False
        except OSError as error:
            data, self._send_error = b"", self._send_error or error
        if data:
            self._verify(data)
        elif self._send_error is not None:
            self._fail_in_flight(describe_error(self._send_error), self._send_error)
        else:
            self._fail_in_flight("closed by the server")
        return True
