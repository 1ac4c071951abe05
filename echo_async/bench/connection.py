"""One connection of a load generator: connects without blocking, sends, receives, compares, and reconnects.

In stream mode it carries message after message. In message mode each message gets a connection of its own,
and the time of the message includes connecting. Positions in the pattern stand for the bytes that are sent
and expected, so that no message is copied.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from ssl import SSLSocket, SSLWantReadError, SSLWantWriteError
from time import perf_counter
from typing import Any

from ..client.endpoint import refuse_self_connection
from ..errors import describe_error
from .pattern import MAX_IO_SIZE, Batches, Pattern
from .plan import LoadPlan
from .poller import READ, WRITE, Callback, Poller
from .recorder import Recorder

BLOCKED = (BlockingIOError, SSLWantReadError, SSLWantWriteError)
RECONNECT_DELAY = 0.1  # seconds until a lost connection is opened again
QUEUE_FULL_DELAY = 0.002  # seconds until a Unix socket with a full accept queue is tried again
LOOPBACK_SOURCES = 32  # source addresses: one connection per message exhausts the ports of one
IP_BIND_ADDRESS_NO_PORT = 24  # Linux; the socket module does not define it


class SocketFactory:
    """Creates non-blocking sockets for the address of a plan, with several source addresses if there may be many."""

    def __init__(self, plan: LoadPlan, *, has_sources: bool) -> None:
        self._family = plan.family
        self._sockets = count()
        is_loopback = plan.family == socket.AF_INET and str(plan.address[0]).startswith("127.")
        has_sources = has_sources and is_loopback and sys.platform == "linux"
        sources = [f"127.0.1.{1 + number}" for number in range(LOOPBACK_SOURCES)] if has_sources else []
        self._sources = [each for each in sources if each != plan.address[0]]
        self.can_connect_to_itself = not sources and plan.family in (socket.AF_INET, socket.AF_INET6)

    def create(self, connection: int) -> socket.socket:
        created = socket.socket(self._family)
        created.setblocking(False)
        if self._family in (socket.AF_INET, socket.AF_INET6):
            created.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._sources:
            created.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            created.bind((self._sources[(connection + next(self._sockets)) % len(self._sources)], 0))
        return created


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """What all connections of a process share."""

    plan: LoadPlan
    pattern: Pattern
    batches: Batches
    buffer: memoryview
    """For what is received."""
    recorder: Recorder
    sockets: SocketFactory
    poller: Poller
    wrap_tls: Callable[..., SSLSocket] | None
    call_later: Callable[[float, Callable[[], None]], None]
    on_usable: Callable[[LoadConnection], None]
    on_replies: Callable[[LoadConnection, int, float], None]
    """Called with the number of complete replies and the time."""


class LoadConnection:
    """What the generator and its schedule know of a connection, or of a UDP socket."""

    in_flight: Collection[Any]
    """Has an entry for each send with unanswered messages."""

    def __init__(self, context: LoadContext, number: int) -> None:
        self._context = context
        self.number = number
        self.queued: deque[float] = deque()
        """The times at which the messages that wait for room in the pipeline were due."""
        self.is_usable = False
        """Whether messages can be sent."""
        self.is_looping = False
        """Whether the replies to all messages in flight are followed by as many messages at once."""

    @property
    def unanswered(self) -> int:
        """The number of messages in flight."""
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError

    def send(self, due: float, sent: float, messages: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _handle_usable(self) -> None:
        self.is_usable = True
        self._context.on_usable(self)


class TcpConnection(LoadConnection):
    """Connection ``number`` of the load, counted over all processes."""

    def __init__(self, context: LoadContext, number: int) -> None:
        super().__init__(context, number)
        plan = context.plan
        self.in_flight: deque[tuple[float, float, int]] = deque()
        """Time due, time sent and number of the unanswered messages."""
        self._pattern = context.pattern
        self._matches = context.pattern.data.startswith
        self._size = plan.size
        self._length = context.pattern.length
        self._view = context.pattern.view
        self._batch = plan.size * plan.pipeline if plan.mode == "stream" else -1  # bytes
        self._add_sample = context.recorder.add
        self._on_replies = context.on_replies
        self._buffer = context.buffer
        self._batch_buffer = context.buffer[: self._batch]
        self._service_times, self._counts = context.recorder.service_times, context.recorder.counts
        self._batches = context.batches
        self._is_message_mode = plan.mode == "message"
        self._send_offset = self._receive_offset = self._pattern.start_offset(number)
        self._unsent = 0  # bytes
        self._partial = 0  # bytes received of an incomplete reply
        self._answered = 0
        self._socket: socket.socket | None = None
        self._is_established = False
        self._events = 0

    @property
    def unanswered(self) -> int:
        return sum(messages for _, _, messages in self.in_flight)

    def send(self, due: float, sent: float, messages: int) -> None:
        """Send ``messages`` more, as far as the kernel accepts them; in message mode, connect first."""
        self.in_flight.append((due, sent, messages))
        self._unsent += messages * self._size
        if self._is_established:
            self._flush()
        elif self._socket is None:
            self.open()

    def _flush(self) -> None:
        offset, unsent = self._send_offset, self._unsent
        try:
            while unsent:
                size = unsent if unsent < MAX_IO_SIZE else MAX_IO_SIZE
                sent = self._socket.send(self._view[offset : offset + size])  # type: ignore[union-attr]
                unsent -= sent
                offset = (offset + sent) % self._length
        except BLOCKED:
            pass
        except OSError as error:
            return self._fail(describe_error(error))
        self._send_offset, self._unsent = offset, unsent
        if unsent:
            self._watch(READ | WRITE)
        elif self._events != READ:
            self._watch(READ)

    def open(self) -> None:
        """Start to connect."""
        try:
            self._socket = self._context.sockets.create(self.number)
            code = self._socket.connect_ex(self._context.plan.address)
        except OSError as error:
            return self._fail(describe_error(error))
        can_send_early = self._is_message_mode and self._context.wrap_tls is None
        if code == 0 or (code == errno.EINPROGRESS and can_send_early):
            self._handle_connected()  # on loopback; elsewhere the first send blocks until it is, or fails
        elif code == errno.EAGAIN:  # the accept queue of a Unix socket is full
            self._close_socket()
            self._context.call_later(QUEUE_FULL_DELAY, self.open)
        elif code == errno.EINPROGRESS:
            self._watch(WRITE, self._finish_connecting)
        else:
            self._fail(describe_error(OSError(code, "")))

    def close(self) -> None:
        self.is_usable = False
        self._close_socket()

    def _fail(self, reason: str) -> None:
        """Record the messages in flight as lost, and reconnect."""
        self._context.recorder.add_loss(reason, self.unanswered)
        self._reconnect()

    def _reconnect(self) -> None:
        self.in_flight.clear()
        self.close()
        self._unsent = self._partial = 0
        self._send_offset = self._receive_offset = self._pattern.start_offset(self.number)
        self._context.call_later(RECONNECT_DELAY, self._handle_usable if self._is_message_mode else self.open)

    def _close_socket(self) -> None:
        if self._socket is not None:
            self._watch(0)
            self._socket.close()
            self._socket = None
            self._is_established = False

    def _finish_connecting(self) -> None:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return self._fail(describe_error(OSError(code, "")))
        self._handle_connected()

    def _handle_connected(self) -> None:
        assert self._socket is not None
        if self._context.sockets.can_connect_to_itself:
            try:
                refuse_self_connection(self._socket, self._context.plan.address)
            except OSError as error:
                return self._fail(describe_error(error))
        if self._context.wrap_tls is None:
            return self._handle_established()
        self._watch(0)
        self._socket = self._context.wrap_tls(self._socket, do_handshake_on_connect=False)
        self._do_handshake()

    def _do_handshake(self) -> None:
        assert isinstance(self._socket, SSLSocket)
        try:
            self._socket.do_handshake()
        except SSLWantReadError:
            self._watch(READ, self._do_handshake)
        except SSLWantWriteError:
            self._watch(WRITE, self._do_handshake)
        except OSError as error:
            self._fail(describe_error(error))
        else:
            self._watch(0)
            self._handle_established()

    def _handle_established(self) -> None:
        self._is_established = True
        if self._is_message_mode:
            self._flush()
        else:
            self._watch(READ)
            self._handle_usable()

    def _watch(self, events: int, callback: Callback | None = None) -> None:
        """Register ``callback`` (default: receive and send) for ``events``; 0 unregisters the socket."""
        assert self._socket is not None
        poller, descriptor = self._context.poller, self._socket.fileno()
        if callback is None:
            is_plain_read = events == READ and self._context.wrap_tls is None
            callback = self._receive if is_plain_read else self._receive_and_send
        if self._events and events:
            poller.modify(descriptor, events, callback)
        elif events:
            poller.register(descriptor, events, callback)
        elif self._events:
            poller.unregister(descriptor)
        self._events = events

    def _receive_and_send(self) -> None:
        self._receive()
        while isinstance(self._socket, SSLSocket) and self._socket.pending():  # invisible to the poller
            self._receive()
        if self._unsent and self._is_established:
            self._flush()

    def _receive(self) -> None:
        try:
            received = self._socket.recv_into(self._buffer)  # type: ignore[union-attr]
        except BLOCKED:
            return
        except OSError as error:
            return self._fail(describe_error(error))
        if (
            received == self._batch
            and self.is_looping
            and len(self.in_flight) == 1
            and not self._partial
            and self._matches(self._batch_buffer, self._receive_offset)
        ):
            self._continue_loop()
        else:
            self._handle_data(self._buffer[:received])

    def _continue_loop(self) -> None:
        """Record that all messages in flight are answered, and send as many again.

        This does what the methods below do, in half of the steps: in a closed loop, they limit the rate.
        """
        now = perf_counter()
        _, sent, messages = self.in_flight[0]
        self._service_times.append(now - sent)
        self._counts.append(messages)
        self._answered += messages
        self.in_flight[0] = (now, now, messages)
        offset = self._receive_offset = self._send_offset
        try:
            size = self._socket.send(self._batches[offset])  # type: ignore[union-attr]
        except BLOCKED:
            size = 0
        except OSError as error:
            return self._fail(describe_error(error))
        self._send_offset = (offset + size) % self._length
        if size != self._batch:
            self._unsent = self._batch - size
            self._flush()

    def _handle_data(self, data: memoryview) -> None:
        offset = self._receive_offset
        if not self._matches(data, offset):
            return self._handle_mismatch(bytes(data))
        received = len(data)
        if not received:
            return self._handle_end_of_input()
        self._receive_offset = (offset + received) % self._length
        partial = self._partial + received
        count = partial // self._size
        self._partial = partial - count * self._size
        if count:
            self._handle_replies(count)

    def _handle_replies(self, count: int) -> None:
        """Record the times of ``count`` complete replies."""
        now = perf_counter()
        in_flight, left = self.in_flight, count
        while left:
            if not in_flight:
                message = self._answered + count
                return self._context.recorder.add_mismatch(
                    self.number, message, 0, "received more bytes than were sent"
                )
            due, sent, messages = in_flight.popleft()
            if messages > left:
                in_flight.appendleft((due, sent, messages - left))
                messages = left
            left -= messages
            self._add_sample(due, sent, now, messages)
        self._answered += count
        if self._is_message_mode:
            self._close_socket()
        self._on_replies(self, count, now)

    def _handle_end_of_input(self) -> None:
        if not self.in_flight:
            return self._reconnect()
        if self._partial:
            position = "in the middle of a reply"
        else:
            position = "before the reply" if self._is_message_mode or not self._answered else "between replies"
        self._fail(f"connection closed by the server {position}")

    def _handle_mismatch(self, data: bytes) -> None:
        same = self._pattern.matching_prefix_length(data, self._receive_offset)
        message, offset = divmod(self._partial + same, self._size)
        expected = self._pattern.data[self._receive_offset + same]
        details = f"received 0x{data[same]:02x}, expected 0x{expected:02x}"
        self._context.recorder.add_mismatch(self.number, self._answered + message + 1, offset, details)
