"""One UDP socket of a load generator: sends numbered datagrams, compares the replies, counts what is lost."""

from __future__ import annotations

import socket
from time import perf_counter

from ..client.datagram_tracker import DatagramFormat, DatagramTracker
from ..client.endpoint import refuse_self_connection
from ..errors import describe_error
from .connection import RECONNECT_DELAY, LoadConnection, LoadContext
from .poller import READ

READ_SIZE = 65_536  # bytes: no datagram is larger


class DatagramConnection(LoadConnection):
    """Socket ``number`` of the load, counted over all processes. Replies to other sockets do not match its datagrams.

    Sending waits while the send buffer is full. Without a reply within the timeout of the plan, a datagram is lost.
    """

    def __init__(self, context: LoadContext, number: int) -> None:
        super().__init__(context, number)
        self.in_flight: dict[int, float] = {}
        """Time due of the unanswered datagrams, by their numbers."""
        self._timeout = context.plan.timeout
        self._tracker = DatagramTracker(DatagramFormat(context.plan.size, salt=number + 1), self._timeout)
        self._socket: socket.socket | None = None
        self._has_timer = False

    @property
    def unanswered(self) -> int:
        return len(self.in_flight)

    def open(self) -> None:
        """Create the socket; try again later if the system refuses it."""
        self.close()
        try:
            self._socket = socket.socket(self._context.plan.family, socket.SOCK_DGRAM)
            self._socket.connect(self._context.plan.address)
            refuse_self_connection(self._socket)
        except OSError as error:
            self.close()
            self._context.recorder.add_loss(describe_error(error), 0)
            return self._context.call_later(RECONNECT_DELAY, self.open)
        self._context.poller.register(self._socket.fileno(), READ, self._receive)
        self._handle_usable()

    def send(self, due: float, sent: float, messages: int) -> None:
        for _ in range(messages):
            datagram = self._tracker.next_datagram()
            self._tracker.record_sent(sent)
            self.in_flight[self._tracker.sent] = due
            try:
                self._socket.send(datagram)  # type: ignore[union-attr]
            except OSError as error:
                return self._fail(describe_error(error))
        if not self._has_timer:
            self._has_timer = True
            self._context.call_later(self._timeout, self._expire)

    def close(self) -> None:
        if self._socket is not None:
            self._context.recorder.duplicated += self._tracker.duplicated
            self._socket.close()

    def _receive(self) -> None:
        for _ in range(len(self.in_flight) or 1):
            try:
                data = self._socket.recv(READ_SIZE, socket.MSG_DONTWAIT)  # type: ignore[union-attr]
            except BlockingIOError:
                return
            except OSError as error:
                return self._fail(describe_error(error))
            now = perf_counter()
            reply = self._tracker.receive(data, now)
            if reply is None:
                details = f"received {len(data)} bytes that were not sent"
                return self._context.recorder.add_mismatch(self.number, self._tracker.received + 1, 0, details)
            due = self.in_flight.pop(reply.number, None)
            if due is not None and reply.seconds is not None:  # else it is a duplicate, or counts as lost
                self._context.recorder.add(due, now - reply.seconds, now, 1)
                self._context.on_replies(self, 1, now)

    def _expire(self) -> None:
        """Count the datagrams that timed out as lost, and send others in their place."""
        now = perf_counter()
        expired = self._tracker.expire(now)
        for number in expired:
            del self.in_flight[number]
        deadline = self._tracker.deadline
        self._has_timer = deadline is not None
        if deadline is not None:
            self._context.call_later(deadline - now, self._expire)
        if expired:
            self._context.recorder.add_loss(f"reply timeout: no reply within {self._timeout:g} s", len(expired))
            self._context.on_replies(self, len(expired), now)

    def _fail(self, reason: str) -> None:
        """Record the datagrams in flight as lost, and pause.

        One error can be reported several times: once for each datagram that was refused.
        """
        self._context.recorder.add_loss(reason, len(self.in_flight))
        self.in_flight.clear()
        while self._tracker.give_up_oldest() is not None:
            pass
        if self.is_usable:
            self.is_usable = False
            self._context.call_later(RECONNECT_DELAY, self._handle_usable)
