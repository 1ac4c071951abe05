"""One connection on a nonblocking socket, with a timeout for each reply."""

import contextlib
import socket
from collections import deque
from selectors import EVENT_READ, EVENT_WRITE
from ssl import SSLSocket, SSLWantReadError, SSLWantWriteError
from time import monotonic, perf_counter

from ..client.endpoint import Endpoint, log
from ..client.verifier import Exchange, LineExchange, ReplyVerifier
from ..compat import PollSelector
from ..errors import describe_error

READ_SIZE = 65_536  # bytes of one read
MAX_WAIT = 2_000_000.0  # seconds; poll takes milliseconds as a 32-bit integer


class BlockingConnection(ReplyVerifier):
    """Send messages and verify their replies. Both are done while waiting: neither can block the other."""

    def __init__(self, endpoint: Endpoint, connected: socket.socket) -> None:
        super().__init__(endpoint.name)
        self.is_open = True
        self._socket = connected
        self._timeout = endpoint.config.timeout
        self._unsent: deque[memoryview] = deque()
        self._send_error: OSError | None = None
        self._selector = PollSelector()
        self._selector.register(connected, EVENT_READ)
        self._is_polling_writes = False

    def exchange(self, data: bytes) -> float:
        """Send one encoded message; return the round-trip time in seconds. Replies in flight are received first."""
        started = perf_counter()
        self._wait_for_reply(Exchange(data))
        return perf_counter() - started

    def receive_line(self, data: bytes, max_size: int) -> bytes:
        """Send one message; return its reply, a line of at most ``max_size`` bytes."""
        exchange = LineExchange(data, max_size)
        self._wait_for_reply(exchange)
        return exchange.result()

    def _wait_for_reply(self, exchange: Exchange) -> None:
        self.send(exchange)
        while exchange.error is None and exchange.received < len(exchange.data):
            self.wait()
        if exchange.error is not None:
            raise exchange.error

    def send(self, exchange: Exchange) -> None:
        """Send as much as the kernel accepts now; :meth:`wait` sends the rest."""
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
        self._poll_writes(bool(self._unsent))
        left = self._waiting_since + self._timeout - monotonic()
        events = self._selector.select(max(0.0, min(left, MAX_WAIT)))  # polls at least once
        if not events:
            if monotonic() >= self._waiting_since + self._timeout:
                self._fail_timeout(self._timeout)
            return
        if events[0][1] & EVENT_READ:
            self._receive()
        if self._unsent:
            self._flush()

    def receive_pending(self) -> None:
        """Receive everything that has arrived, and restart the timeout."""
        while self.is_open and self._receive():
            pass
        self.restart_timeout()

    def restart_timeout(self) -> None:
        """Restart the timeout of the first reply in flight."""
        self._waiting_since = monotonic()

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

    def _poll_writes(self, enable: bool) -> None:
        if enable is not self._is_polling_writes:
            self._is_polling_writes = enable
            self._selector.modify(self._socket, EVENT_READ | (EVENT_WRITE if enable else 0))
