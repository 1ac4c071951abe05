"""Verify that the bytes received on a connection are the bytes that were sent; without IO.

Nothing received is stored: each byte is compared with the data in flight. So memory is bounded by what was sent,
however the replies are split and whatever else a server sends.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic, perf_counter

from ..errors import ReplyDifferent, ReplyError, ReplyLate, ReplyLost
from ..wire.text import escape

LARGE_MESSAGE = 65_536  # bytes; above it, the error of a lost reply mentions the limit of the server
MAX_QUOTED = 40  # bytes of a reply that an error quotes


class Exchange:
    """Complete messages sent in one write, and how many bytes of their replies were received.

    ``notify`` is called when more replies are complete or ``error`` was set. It must not raise.
    """

    __slots__ = ("data", "error", "notify", "received")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.received = 0
        self.error: ReplyError | None = None
        self.notify: Callable[[], object] | None = None

    def on_progress(self) -> None:
        if self.notify is not None:
            self.notify()

    def pending_message(self) -> tuple[int, int]:
        """Return the start and the end in ``data`` of the first message whose reply is not complete."""
        data, received = self.data, min(self.received, len(self.data) - 1)
        return data.rfind(b"\n", 0, received) + 1, data.find(b"\n", received) + 1


class LineExchange(Exchange):
    """One message whose reply is a line of any content, of which at most ``max_size`` bytes are stored."""

    __slots__ = ("line", "max_size")

    def __init__(self, data: bytes, max_size: int) -> None:
        super().__init__(data)
        self.line = bytearray()
        self.max_size = max_size

    def collect(self, data: bytes, position: int) -> int:
        """Store the part of ``data`` that belongs to the line; return its end."""
        end = data.find(b"\n", position) + 1
        self.line += data[position : end or None]
        if end:
            self.received = len(self.data)
        return end or len(data)

    def result(self) -> bytes:
        """Return the line, or raise the error. A connection that compares before it collects stores no echo."""
        if self.error is not None:
            raise self.error
        return bytes(self.line) or self.data


class ReplyVerifier:
    """The receiving side of a connection that must return the bytes that were sent, in order, and no others.

    Attributes:
        is_open: Whether more can be sent.
        replies: Number of exchanges whose replies were received completely.
        is_partial: Whether the connection was lost in the middle of a reply.
        unexpected: The error of bytes received with nothing in flight; the next use of the connection raises it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._in_flight: deque[Exchange] = deque()
        self._waiting_since = 0.0  # when the first exchange in flight was sent or became the first
        self.is_open = False
        self.replies = 0
        self.is_partial = False
        self.unexpected: ReplyDifferent | None = None

    def close(self) -> None:
        """Close the connection; replies in flight are lost. Closing twice is harmless."""
        raise NotImplementedError

    def _close_socket(self) -> None:
        raise NotImplementedError

    def send(self, exchange: Exchange) -> None:
        """Send what the kernel accepts now; the rest, and the replies, need a wait."""
        raise NotImplementedError

    def receive_pending(self) -> None:
        """Receive everything that has arrived, unless an event loop does that."""

    async def wait_for(self, exchange: Exchange) -> None:
        """Send a message and wait for its reply, or for an error."""
        raise NotImplementedError

    def echo(self, data: bytes) -> Awaitable[None]:
        """Send one message, and wait until its reply is received; raise its error."""
        raise NotImplementedError

    async def exchange(self, data: bytes) -> float:
        """Send one message; return the round-trip time in seconds."""
        started = perf_counter()
        await self.echo(data)
        return perf_counter() - started

    async def receive_line(self, data: bytes, max_size: int) -> bytes:
        """Send one message; return its reply, a line of at most ``max_size`` bytes."""
        exchange = LineExchange(data, max_size)
        await self.wait_for(exchange)
        return exchange.result()

    def _verify(self, data: bytes) -> None:
        in_flight, position = self._in_flight, 0
        completed: list[Exchange] = []
        while in_flight and position < len(data):
            exchange, start = in_flight[0], position
            if isinstance(exchange, LineExchange):
                position = exchange.collect(data, position)
                if len(exchange.line) > exchange.max_size:
                    details = f"over {exchange.max_size} bytes without a newline"
                    exchange.error = ReplyDifferent(f"reply of {self._name} too long: {details}", 0)
                    self._notify(completed)
                    return self._fail_in_flight("an earlier reply was too long")
            else:
                size = min(len(exchange.data) - exchange.received, len(data) - position)
                expected = exchange.data[exchange.received : exchange.received + size]  # a copy, unless it is all
                if not data.startswith(expected, position):
                    self._notify(completed)
                    return self._fail_mismatch(exchange, data[position:])
                position += size
                exchange.received += size
            if exchange.received < len(exchange.data):
                if data.find(b"\n", start) >= 0:
                    self._waiting_since = monotonic()
                    exchange.on_progress()
                break
            completed.append(in_flight.popleft())
            self.replies += 1
            self._waiting_since = monotonic()
        if position < len(data):
            self._fail_unexpected(completed, data[position:])
        self._notify(completed)

    def _notify(self, completed: list[Exchange]) -> None:
        for exchange in completed:
            exchange.on_progress()

    def _fail_mismatch(self, exchange: Exchange, data: bytes) -> None:
        """Fail ``exchange``: ``data`` is not the next part of its replies."""
        sent = exchange.data
        equal = common_prefix(data, sent[exchange.received :])
        exchange.received += equal
        start, end = exchange.pending_message()
        context = sent[max(start, exchange.received - MAX_QUOTED // 2) : exchange.received]
        received = b"".join(data[equal:].partition(b"\n")[:2])
        details = f"received {_quote(context + received)}, expected {_quote(context + sent[exchange.received : end])}"
        exchange.error = self._describe_mismatch(exchange.received - start, details)
        self._fail_in_flight("an earlier reply did not match")

    def _fail_unexpected(self, completed: list[Exchange], data: bytes) -> None:
        """Fail the exchange that ``data`` was received with, or else the next one."""
        details = f"received {len(data)} unexpected bytes {_quote(data)}"
        if completed:
            last = completed[-1]
            last.error = self._describe_mismatch(len(last.data) - (last.data.rfind(b"\n", 0, -1) + 1), details)
        else:
            self.unexpected = self._describe_mismatch(0, details)
        self._fail_in_flight("unexpected bytes received")

    def _describe_mismatch(self, offset: int, details: str) -> ReplyDifferent:
        text = f"reply mismatch at byte {offset}: {details}; is {self._name} an echo server?"
        return ReplyDifferent(text, offset)

    def _fail_timeout(self, seconds: float) -> None:
        """Fail the first exchange in flight: its reply was not received in time."""
        self._in_flight[0].error = ReplyLate(f"reply timeout: no reply from {self._name} within {seconds:g} s")
        self._fail_in_flight("an earlier reply timed out")

    def _fail_in_flight(self, reason: str, cause: Exception | None = None) -> None:
        """Close the socket, and fail all exchanges in flight that have no error yet."""
        in_flight = self._in_flight
        if self.is_open:
            self.is_open = False
            self.is_partial = bool(in_flight and in_flight[0].received)
            self._close_socket()
        while in_flight:
            exchange = in_flight.popleft()
            if exchange.error is None:
                start, end = exchange.pending_message()
                size, received = end - start, exchange.received - start
                when = f"after {received} of {size} bytes of" if received else "before"
                advice = f"; does the server accept messages of {size} bytes?" if size > LARGE_MESSAGE else ""
                exchange.error = ReplyLost(f"connection to {self._name} lost {when} the reply: {reason}{advice}")
                exchange.error.__cause__ = cause
            exchange.on_progress()


def common_prefix(one: bytes, other: bytes) -> int:
    different = (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(different, min(len(one), len(other)))


def _quote(data: bytes) -> str:
    return f'"{escape_bytes(data[:MAX_QUOTED])}"' + ("..." if len(data) > MAX_QUOTED else "")


def escape_bytes(data: bytes) -> str:
    r"""Decode ``data`` for a terminal: bytes that are not UTF-8, and control characters, become ``\xNN``."""
    text = data.decode("utf-8", "surrogateescape")
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else escape(c) for c in text)
