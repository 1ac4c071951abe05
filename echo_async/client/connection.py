"""One connection: the bytes that were sent must come back, in order, and no others.

Nothing that arrives is stored. Every byte is compared, as it comes, with the bytes that are out; so
memory is bounded by what was sent, however the replies are split and whatever else a server sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from time import monotonic
from typing import cast

from ..errors import ReplyDifferent, ReplyError, ReplyLate, ReplyLost
from ..reasons import reason
from .messages import readable

__all__ = ["Connection", "Exchange"]

log = logging.getLogger("echo_async.client")

REST = 65_536  # bytes of one read after a connection broke
LARGE = 65_536  # bytes of a message that a server may not take
SHOWN = 40  # bytes of a wrong reply that an error shows
STALLED = 0.1  # seconds: a timer that is later than this tells that the loop stood still, not the server


class Exchange:
    """Whole messages that were sent in one write, and how much of them came back.

    ``progress`` is called, from the event loop, when more whole messages are back, all are, or
    ``error`` was set; it must not raise.
    """

    __slots__ = ("data", "error", "returned")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.returned = 0
        self.error: ReplyError | None = None

    def progress(self) -> None:
        raise NotImplementedError

    def current_message(self) -> tuple[int, int]:
        """Where the first message that is not back yet starts and ends in ``data``."""
        data, returned = self.data, min(self.returned, len(self.data) - 1)
        return data.rfind(b"\n", 0, returned) + 1, data.find(b"\n", returned) + 1


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


class Connection(asyncio.Protocol):
    """Sends, and compares what comes back.

    ``open``: more can be sent. ``replies``: exchanges that came back whole. ``partial``: it was lost
    in the middle of a reply. ``stray``: the error of bytes that came when nothing was out; it belongs
    to whoever uses the connection next. ``closed`` is done once the socket was let go.
    """

    _transport: asyncio.Transport

    def __init__(self, name: str, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._timeout = timeout
        self._out: deque[Exchange] = deque()
        self._since = 0.0  # when the first of them was sent, or came to be the first
        self._timer: asyncio.TimerHandle | None = None
        self._overdue = False
        self._logs = log.isEnabledFor(logging.DEBUG)
        self.open = False
        self.replies = 0
        self.partial = False
        self.stray: ReplyDifferent | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # Sending

    def echo(self, data: bytes) -> asyncio.Future[None]:
        """Send one message; the future is done when it is back."""
        future = self._loop.create_future()
        self.send(_Echo(data, future))
        return future

    def send(self, exchange: Exchange) -> None:
        out = self._out
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
            self._lose(f"the connection to {self._name} broke ({reason(error)})")

    def close(self) -> None:
        """Close; what is still out is lost. To call it twice does no harm."""
        if self._out:
            self._lose(f"the connection to {self._name} was closed by this client")
        else:
            self.open = False
            self._transport.close()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it
        self.open = True

    def data_received(self, data: bytes) -> None:
        out = self._out
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
            self._lose(f"the connection to {self._name} broke ({reason(error)})")
        if self._timer is not None:
            self._timer.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def _read_what_came_before(self) -> None:
        """A write that fails ends a transport at once, with replies unread that had come before."""
        if self._transport.get_extra_info("ssl_object") is not None:
            return
        with contextlib.suppress(OSError):
            descriptor = self._transport.get_extra_info("socket").fileno()
            while self._out and (data := os.read(descriptor, REST)):
                self.data_received(data)

    # Comparing

    def _compare(self, data: bytes) -> None:
        """``data`` in any pieces: the end of one reply, several replies, the start of another."""
        out, at = self._out, 0
        back: list[Exchange] = []
        while out and at < len(data):
            exchange = out[0]
            size = min(len(exchange.data) - exchange.returned, len(data) - at)
            if not _same(exchange.data, exchange.returned, data, at, size):
                self._tell(back)
                return self._differ(exchange, data, at)
            at += size
            exchange.returned += size
            if exchange.returned < len(exchange.data):
                if data.find(b"\n", at - size) >= 0:
                    self._since = monotonic()
                    exchange.progress()
                break
            back.append(out.popleft())
            self.replies += 1
            self._since = monotonic()
        if at < len(data):
            self._too_much(back, data[at:])
        self._tell(back)

    def _tell(self, exchanges: list[Exchange]) -> None:
        for exchange in exchanges:
            exchange.progress()

    def _differ(self, exchange: Exchange, data: bytes, at: int) -> None:
        expected = exchange.data
        same = _common(data[at:], expected[exchange.returned :])
        exchange.returned += same
        start, end = exchange.current_message()
        offset = exchange.returned - start
        shared = expected[max(start, exchange.returned - SHOWN // 2) : exchange.returned]
        came, _, more = data[at + same :].partition(b"\n")
        came += b"\n" if more or data.endswith(b"\n") else b""
        wanted = expected[exchange.returned : end]
        exchange.error = ReplyDifferent(
            f"{self._name} answered something else: byte {offset} of the reply differs, "
            f"came {_shown(shared + came)}, expected {_shown(shared + wanted)}; is it an echo server?",
            offset,
        )
        self._drop("a reply before it was different")

    def _too_much(self, back: list[Exchange], more: bytes) -> None:
        """Bytes that nobody asked for: they spoil the reply they came with, or else the next one."""
        text = f"{self._name} sent {len(more)} bytes more than it was sent: {_shown(more)}"
        if back:
            last = back[-1]
            offset = len(last.data) - (last.data.rfind(b"\n", 0, -1) + 1)
            last.error = ReplyDifferent(text, offset)
        else:
            self.stray = ReplyDifferent(text, 0)
        self._drop("bytes came that nobody asked for")

    # Losing

    def _drop(self, why: str) -> None:
        self._lose(f"the connection to {self._name} was dropped ({why})")

    def _lose(self, why: str) -> None:
        """Nothing more can be matched here: tell all who wait, and let go of the socket at once."""
        out = self._out
        if self.open:
            self.open = False
            self.partial = bool(out and out[0].returned)
            self._transport.abort()
        while out:
            exchange = out.popleft()
            if exchange.error is None:
                start, end = exchange.current_message()
                part = exchange.returned - start
                when = f"after {part} of the {end - start} bytes of" if part else "before"
                advice = f"; does it take messages of {end - start} bytes?" if end - start > LARGE else ""
                exchange.error = ReplyLost(f"{why} {when} the reply{advice}")
            exchange.progress()

    def _look_at_time(self) -> None:
        """The one timer of a connection, set for the reply that has to come next."""
        self._timer = None
        if not self._out:
            self._overdue = False
            return
        now = monotonic()
        left = self._since + self._timeout - now
        if left < -STALLED:  # the loop stood still: nobody looked at the socket, so the reply gets its time anew
            self._since, left = now, self._timeout
        if left > 0:
            self._overdue = False
            self._timer = self._loop.call_later(left, self._look_at_time)
        elif not self._overdue:  # uvloop looks at timers before sockets: one more round before we blame the server
            self._overdue = True
            self._timer = self._loop.call_later(0, self._look_at_time)
        else:
            self._out[0].error = ReplyLate(
                f"{self._name} did not send the reply within {self._timeout:g} s; "
                "is it an echo server, or does it need a longer timeout?"
            )
            self._drop("a reply before it was late")


def _same(expected: bytes, start: int, data: bytes, at: int, size: int) -> bool:
    """Whether ``size`` bytes of both are equal; without a copy where one of them is taken whole."""
    if size == len(data):
        return expected.startswith(data, start)
    if size == len(expected):
        return data.startswith(expected, at)
    return expected[start : start + size] == data[at : at + size]


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with, by comparing halves of halves."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shown(data: bytes) -> str:
    return f'"{readable(data[:SHOWN])}"' + ("..." if len(data) > SHOWN else "")
