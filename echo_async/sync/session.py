"""The connections of one client: which one a message is sent on, and when a new one is opened."""

from collections.abc import Generator
from time import monotonic
from typing import cast

from ..client.batching import Message, MessageBatch, Messages, Window
from ..client.endpoint import Endpoint
from ..client.session import Session
from ..errors import ReplyLost
from .connection import BlockingConnection
from .connector import open_connection

IMMEDIATE = 0.005  # seconds within which taking messages and returning replies counts as not waiting


class BlockingSession(Session[BlockingConnection]):
    """Exchange messages with one server, reconnecting where necessary."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.name)
        self._endpoint = endpoint
        self.connect()

    def connect(self) -> BlockingConnection:
        """Return an open connection, a new one if necessary."""
        if self.connection is not None:
            self.connection.receive_pending()
        connection = self.usable_connection()
        if connection is None:
            connection = self.connection = open_connection(self._endpoint)
        return connection

    def exchange(self, data: bytes) -> float:
        """Send one encoded message; return the round-trip time in seconds."""
        connection = self.connect()
        try:
            seconds = connection.exchange(data)
        except ReplyLost:
            if not self.can_resend(connection):
                raise
            connection = self.connect()
            seconds = connection.exchange(data)
        self.record_reply(connection)
        return seconds

    def receive_line(self, data: bytes, max_size: int) -> bytes:
        """Send one encoded message; return its reply, a line of at most ``max_size`` bytes."""
        return self.connect().receive_line(data, max_size)

    def close(self) -> None:
        self.is_closed = True
        if self.connection is not None:
            self.connection.close()

    def stream(self, source: Messages, window: int) -> Generator[Message, None, None]:
        """Send the messages of ``source`` and yield their replies in order; raise the error of the first that fails."""
        in_flight = Window(window)
        batch_size = 1  # doubled as long as the source does not block
        while True:
            started = monotonic()
            for batch, start, end, _, error in in_flight.results():
                yield from cast(MessageBatch, batch).replies(start, end)
                if error is not None:
                    raise error
            while (capacity := self._capacity(in_flight)) and not source.is_exhausted:
                taking = monotonic()
                taken = source.take(min(capacity, batch_size))
                batch_size = min(2 * batch_size, window) if monotonic() - taking < IMMEDIATE else 1
                if taken is None:
                    break
                if self.keeps_open:
                    self._send(taken, in_flight)
                else:
                    batch_size = 1
                    self.exchange(taken.data)
                    yield from taken.replies(0, len(taken.data))
            if in_flight.batches:
                assert self.connection is not None
                if monotonic() - started > IMMEDIATE:  # nothing was received meanwhile: do not blame the server
                    self.connection.restart_timeout()
                self.connection.wait()
            elif source.is_exhausted:
                break
        if source.failure is not None:
            raise source.failure

    def _send(self, batch: MessageBatch, in_flight: Window) -> None:
        connection = self.connection if in_flight.batches else self.connect()
        assert connection is not None
        in_flight.add(batch)
        connection.send(batch)

    def _capacity(self, in_flight: Window) -> int:
        """Return the size of the next batch: 0 until the results of a lost connection were yielded."""
        if in_flight.batches and (self.connection is None or not self.connection.is_open):
            return 0
        return in_flight.capacity()
