"""One connection of a load: opened without blocking, filled, read, compared; opened again when it broke.

In stream mode it stays open for message after message; in message mode each message gets a connection of
its own, and its time begins before that is opened. What is sent and expected is a place in the pattern
and a number of bytes, so that nothing is copied or cut for a message.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from selectors import EVENT_READ, EVENT_WRITE
from ssl import SSLContext, SSLSocket, SSLWantReadError, SSLWantWriteError
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import describe_error
from .pattern import MAX_IO_SIZE

if TYPE_CHECKING:
    from .generator import LoadGenerator

__all__ = ["Connection"]

BLOCKED = (BlockingIOError, SSLWantReadError, SSLWantWriteError)
PAUSE = 0.1  # seconds until a connection that broke is opened again
QUEUE_FULL = 0.002  # ... and until a Unix socket whose queue is full is tried again


class Connection:
    """Connection ``number`` of all, as one that a :class:`LoadGenerator` has."""

    def __init__(self, generator: LoadGenerator, number: int) -> None:
        plan = generator.plan
        self.number = number
        self.in_flight: deque[tuple[float, float, int]] = deque()
        """Due, sent and how many: of what was sent, or waits in ``_unsent``, and is not answered."""
        self.waiting: deque[float] = deque()
        """When the messages were due that no room was for yet."""
        self.usable = False
        """Whether messages can be queued."""
        self._generator = generator
        self._pattern = generator.pattern
        self._fits = generator.pattern.data.startswith
        self._size = plan.size
        self._length = generator.pattern.length
        self._view = generator.pattern.view
        self._add = generator.recorder.add
        self._room = generator.schedule.room
        self._reading = min(MAX_IO_SIZE, max(65536, plan.size * plan.pipeline)) if plan.mode == "stream" else 65536
        self._one_message = plan.mode == "message"
        self._send_at = self._receive_at = self._pattern.start(number)
        self._unsent = 0
        self._partial = 0  # bytes of the message that is being received
        self._answered = 0
        self._socket: socket.socket | None = None
        self._opened = False
        self._events = 0

    def send(self, due: float, sent: float, messages: int) -> None:
        """Send so many messages more, as far as the kernel takes them; in message mode, open the connection first."""
        self.in_flight.append((due, sent, messages))
        self._unsent += messages * self._size
        if self._opened:
            self._flush()
        elif self._socket is None:
            self.open()

    def _flush(self) -> None:
        at, unsent = self._send_at, self._unsent
        try:
            while unsent:
                taken = self._socket.send(self._view[at : at + (unsent if unsent < MAX_IO_SIZE else MAX_IO_SIZE)])  # type: ignore[union-attr]
                unsent -= taken
                at = (at + taken) % self._length
        except BLOCKED:
            pass
        except OSError as error:
            return self.fail(describe_error(error))
        self._send_at, self._unsent = at, unsent
        if unsent:
            self._watch(EVENT_READ | EVENT_WRITE)
        elif self._events != EVENT_READ:
            self._watch(EVENT_READ)

    def open(self) -> None:
        """Begin to connect. Once it is done, the schedule or :meth:`send` goes on."""
        try:
            self._socket = self._generator.new_socket(self.number)
            code = self._socket.connect_ex(self._generator.plan.address)
        except OSError as error:
            return self.fail(describe_error(error))
        if code == 0:
            self._connected()
        elif code == errno.EINPROGRESS and self._one_message and self._generator.tls is None:
            self._established()  # so it is on loopback; elsewhere sending waits until it is true, or fails
        elif code == errno.EAGAIN:  # a Unix socket: the server's queue is full
            self._close()
            self._generator.later(QUEUE_FULL, self.open)
        elif code == errno.EINPROGRESS:
            self._events = EVENT_WRITE
            self._generator.selector.register(self._socket, EVENT_WRITE, self._connecting)
        else:
            self.fail(describe_error(OSError(code, "")))

    def close(self) -> None:
        """End it, for good."""
        self.usable = False
        self._close()

    def fail(self, why: str) -> None:
        """It broke: what was in flight is lost; try again in a while."""
        lost = sum(messages for _, _, messages in self.in_flight)
        self._generator.lost(why, lost)
        self._again()

    def _again(self) -> None:
        self.in_flight.clear()
        self.close()
        self._unsent = self._partial = 0
        self._send_at = self._receive_at = self._pattern.start(self.number)
        self._generator.later(PAUSE, self._make_usable if self._one_message else self.open)

    def _close(self) -> None:
        if self._socket is not None:
            if self._events:
                self._generator.selector.unregister(self._socket)
                self._events = 0
            self._socket.close()
            self._socket = None
            self._opened = False

    def _connecting(self, _: int) -> None:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return self.fail(describe_error(OSError(code, "")))
        self._connected()

    def _connected(self) -> None:
        context = self._generator.tls
        if context is None:
            return self._established()
        self._wrap(context)
        self._shake_hands(0)

    def _wrap(self, context: SSLContext) -> None:
        assert self._socket is not None
        assert self._generator.plan.tls is not None
        if self._events:
            self._generator.selector.unregister(self._socket)
            self._events = 0
        name = self._generator.plan.tls["server_hostname"]
        self._socket = context.wrap_socket(self._socket, do_handshake_on_connect=False, server_hostname=name)

    def _shake_hands(self, _: int) -> None:
        assert isinstance(self._socket, SSLSocket)
        try:
            self._socket.do_handshake()
        except SSLWantReadError:
            self._watch(EVENT_READ, self._shake_hands)
        except SSLWantWriteError:
            self._watch(EVENT_WRITE, self._shake_hands)
        except OSError as error:
            self.fail(describe_error(error))
        else:
            self._watch(0)
            self._established()

    def _established(self) -> None:
        self._opened = True
        if self._one_message:
            self._flush()
        else:
            self._watch(EVENT_READ)
            self._make_usable()

    def _make_usable(self) -> None:
        self.usable = True
        self._generator.schedule.opened(self)

    def _watch(self, events: int, callback: object = None) -> None:
        """Be told of these events, with :meth:`_ready` unless it is another callback."""
        assert self._socket is not None
        selector = self._generator.selector
        if callback is None:
            callback = self._receive if events == EVENT_READ and self._generator.tls is None else self._ready
        if self._events and events:
            selector.modify(self._socket, events, callback)
        elif events:
            selector.register(self._socket, events, callback)
        elif self._events:
            selector.unregister(self._socket)
        self._events = events

    def _ready(self, events: int) -> None:
        if events & EVENT_READ:
            self._receive()
            while isinstance(self._socket, SSLSocket) and self._socket.pending():  # what no selector sees
                self._receive()
        if events & EVENT_WRITE and self._opened:
            self._flush()

    def _receive(self, _: int = EVENT_READ) -> None:
        try:
            data = self._socket.recv(self._reading)  # type: ignore[union-attr]
        except BLOCKED:
            return
        except OSError as error:
            return self.fail(describe_error(error))
        at = self._receive_at
        if not self._fits(data, at):
            return self._differs(data)
        received = len(data)
        if not received:
            return self._ended()
        self._receive_at = (at + received) % self._length
        self._partial += received
        if self._partial >= self._size:
            count, self._partial = divmod(self._partial, self._size)
            self._settle(count)

    def _settle(self, count: int) -> None:
        """So many messages more came back: take their times, and tell that there is room again."""
        now = perf_counter()
        in_flight, left = self.in_flight, count
        while left:
            if not in_flight:
                return self._generator.differs(self.number, self._answered + count, 0, "more than was sent")
            due, sent, messages = in_flight.popleft()
            if messages > left:
                in_flight.appendleft((due, sent, messages - left))
                messages = left
            left -= messages
            self._add(due, sent, now, messages)
        self._answered += count
        if self._one_message:
            self._close()
        self._room(self, count, now)

    def _ended(self) -> None:
        if self.in_flight:
            return self.fail(f"the server closed the connection {self._after()}")
        self._again()

    def _after(self) -> str:
        if self._partial:
            return "in mid-reply"
        return "before the reply" if self._one_message or not self._answered else "between replies"

    def _differs(self, data: bytes) -> None:
        same = self._pattern.difference(data, self._receive_at)
        message, offset = divmod(self._partial + same, self._size)
        expected = self._pattern.data[self._receive_at + same]
        what = f"sent 0x{expected:02x}, received 0x{data[same]:02x}"
        self._generator.differs(self.number, self._answered + message + 1, offset, what)
