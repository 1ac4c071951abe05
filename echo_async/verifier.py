"""What came back compared with what was sent, without IO: the part of a connection that both clients share.

Nothing that arrives is stored. Every byte is compared, as it comes, with the bytes that are out; so
memory is bounded by what was sent, however the replies are split and whatever else a server sends.
"""

from __future__ import annotations

from collections import deque
from time import monotonic

from .errors import ReplyDifferent, ReplyError, ReplyLate, ReplyLost
from .messages import readable

__all__ = ["Exchange", "ReplyVerifier"]

LARGE = 65_536  # bytes of a message that a server may not take
SHOWN = 40  # bytes of a wrong reply that an error shows


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


class ReplyVerifier:
    """The bytes that were sent must come back, in order, and no others.

    ``open``: more can be sent. ``replies``: exchanges that came back whole. ``partial``: it was lost
    in the middle of a reply. ``unexpected``: the error of bytes that came when nothing was out; it belongs
    to whoever uses the connection next.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._in_flight: deque[Exchange] = deque()
        self._since = 0.0  # when the first of them was sent, or came to be the first
        self.open = False
        self.replies = 0
        self.partial = False
        self.unexpected: ReplyDifferent | None = None

    def _close_socket(self) -> None:
        """Close the socket at once."""
        raise NotImplementedError

    # ReplyVerifier

    def _compare(self, data: bytes) -> None:
        """``data`` in any pieces: the end of one reply, several replies, the start of another."""
        out, at = self._in_flight, 0
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
            self.unexpected = ReplyDifferent(text, 0)
        self._drop("bytes came that nobody asked for")

    # Losing

    def _late(self, seconds: float) -> ReplyLate:
        return ReplyLate(
            f"{self._name} did not send the reply within {seconds:g} s; "
            "is it an echo server, or does it need a longer timeout?"
        )

    def _drop(self, why: str) -> None:
        self._lose(f"the connection to {self._name} was dropped ({why})")

    def _lose(self, why: str) -> None:
        """Nothing more can be matched here: tell all who wait, and let go of the socket at once."""
        out = self._in_flight
        if self.open:
            self.open = False
            self.partial = bool(out and out[0].returned)
            self._close_socket()
        while out:
            exchange = out.popleft()
            if exchange.error is None:
                start, end = exchange.current_message()
                part = exchange.returned - start
                when = f"after {part} of the {end - start} bytes of" if part else "before"
                advice = f"; does it take messages of {end - start} bytes?" if end - start > LARGE else ""
                exchange.error = ReplyLost(f"{why} {when} the reply{advice}")
            exchange.progress()


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
