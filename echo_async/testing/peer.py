"""What the handler of a test has of a connection."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Any

from ..awaitable import run
from ..wire.script import Action, End, Send
from .recorder import record_of

if TYPE_CHECKING:
    from ..engines.threads import ThreadConnection

READ_SIZE = 64 * 1024  # bytes
HANDSHAKE_TIMEOUT = 10.0  # seconds


class ClientEnded(ConnectionError):
    """The connection has ended before what a handler waits for; no failure of the handler."""


class Peer:
    """One connection, in the thread of the handler that serves it. Its methods block.

    Attributes:
        number: 1 for the first connection of the server.
        peer: The address of the client, as ``getpeername`` returns it.

    Each method raises a :exc:`ConnectionError` if the connection has ended. Unless the handler catches it, the handler
    ends, and the test does not fail by it. With a timeout of the socket, each can raise a :exc:`TimeoutError` as well.
    """

    def __init__(self, connection: ThreadConnection) -> None:
        record = record_of(connection)
        assert connection.runner is not None
        self._runner = connection.runner
        self.number: int = record.number
        self.peer: Any = record.peer
        self._connection = connection
        self._received = bytearray()  # and not returned

    @property
    def socket(self) -> socket.socket:
        """The socket, beneath TLS: for options, and for bytes that are not encrypted. What it receives is not noted."""
        plain: socket.socket = self._connection.get_extra_info("socket")
        return plain

    def receive(self, size: int) -> bytes:
        """Return exactly ``size`` bytes."""
        while len(self._received) < size:
            self._receive_more(f"after {len(self._received)} of {size} bytes")
        return self._take(size)

    def receive_some(self) -> bytes:
        """Return what has arrived, as soon as there is something; no bytes at the end of input."""
        if not self._received:
            return self._read()
        return self._take(len(self._received))

    def receive_line(self) -> bytes:
        """Return the bytes up to the next newline, and the newline."""
        searched = 0
        while not (size := self._received.find(b"\n", searched) + 1):
            searched = len(self._received)
            self._receive_more(f"within a line, after {searched} bytes")
        return self._take(size)

    def send(self, data: bytes) -> None:
        """Send ``data``."""
        self._perform(Send(data))

    def end(self) -> None:
        """Close the sending side. The client can still send."""
        self._perform(End.HALF_CLOSE)

    def close(self) -> None:
        """Close the connection, as the end of the handler does: all that was sent arrives, later input is discarded."""
        self.end()

    def reset(self) -> None:
        """Reset the connection, as soon as all that was sent is on the wire."""
        try:
            self._perform(End.RESET)
        except ClientEnded:
            self.socket.close()

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Do the TLS handshake of a server. What follows is encrypted.

        What was received and not returned belongs to the handshake: some clients begin it without waiting.

        Raises:
            ssl.SSLError: The handshake fails.
            TimeoutError: It takes more than 10 s.
        """
        try:
            self._connection.start_tls(context, HANDSHAKE_TIMEOUT, self._take(len(self._received)))
        except (ConnectionError, ssl.SSLEOFError) as error:
            raise ClientEnded(f"connection {self.number} ended within the TLS handshake") from error

    def _take(self, size: int) -> bytes:
        data = bytes(self._received[:size])
        del self._received[:size]  # which moves nothing
        return data

    def _receive_more(self, progress: str) -> None:
        data = self._read()
        if not data:
            raise ClientEnded(f"connection {self.number} ended by the client {progress}")
        self._received += data

    def _read(self) -> bytes:
        try:
            data = self._connection.receive(READ_SIZE)
        except TimeoutError:
            raise
        except OSError as error:
            raise ClientEnded(f"connection {self.number} lost: {error}") from error
        self._check_end()
        return data

    def _check_end(self) -> None:
        if self._runner.is_ending:
            raise ClientEnded(f"connection {self.number} ended by the server")

    def _perform(self, action: Action) -> None:
        self._check_end()
        try:
            run(self._runner.perform(action))
        except TimeoutError:
            raise
        except OSError as error:
            raise ClientEnded(f"connection {self.number} lost: {error}") from error
