"""Numbered datagrams, and what became of each of them; without IO.

A datagram of 8 bytes or more begins with its number (32 bits, big-endian) and the CRC-32 of all its other bytes; the
rest is the same text in each. A smaller one has no CRC. One of less than 4 bytes has only the last bytes of its number.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple
from zlib import crc32

NUMBER_SIZE = 4  # bytes
HEADER_SIZE = 8  # bytes of number and CRC-32
MAX_PAYLOAD = 65_527  # bytes: 65,535 of the IPv6 payload less the UDP header (RFC 768, RFC 8200)
MAX_PAYLOAD_IPV4 = 65_507  # bytes: 65,535 of the packet less the IP and UDP headers (RFC 768, RFC 791)

MAX_IN_FLIGHT = 64  # datagrams; with the limit in bytes, they fit into the receive buffers of all systems
MAX_BYTES_IN_FLIGHT = 32_768
MAX_UNANSWERED = 100_000  # numbers of datagrams without a reply that are remembered after their timeout

_TEXT = bytes(range(33, 127))


class DatagramFormat:
    """Datagrams of ``size`` bytes, from 0 to MAX_PAYLOAD. ``salt`` is where the CRC begins; others do not match."""

    def __init__(self, size: int, salt: int = 0) -> None:
        self.size = size
        self._salt = salt
        self._width = min(size, NUMBER_SIZE)
        self.numbers = 1 << 8 * self._width
        """After this many datagrams, the numbers in them repeat."""
        self._has_crc = size >= HEADER_SIZE
        length = size - (HEADER_SIZE if self._has_crc else self._width)
        self._text = (_TEXT * (length // len(_TEXT) + 1))[:length]

    def encode(self, number: int) -> bytes:
        """Return the datagram with a number from 1."""
        head = (number % self.numbers).to_bytes(self._width, "big")
        if not self._has_crc:
            return head + self._text
        crc = crc32(self._text, crc32(head, self._salt))
        return b"".join((head, crc.to_bytes(4, "big"), self._text))

    def decode(self, data: bytes, last: int) -> int | None:
        """Return the number of a datagram, at most ``last``; None if ``data`` is not one of datagrams 1 to ``last``."""
        if len(data) != self.size:
            return None
        number = last - (last - int.from_bytes(data[: self._width], "big")) % self.numbers
        return number if number > 0 and data == self.encode(number) else None


class Reply(NamedTuple):
    """A datagram that came back unchanged.

    ``seconds`` is None for a duplicate. It is reordered if a reply with a higher number came first (RFC 4737).
    """

    number: int
    seconds: float | None
    is_late: bool = False
    is_reordered: bool = False


class DatagramTracker:
    """Datagrams that are sent to a server, and their replies. A reply is late after ``timeout`` seconds.

    Attributes:
        size: Bytes per datagram.
        sent: Number of datagrams sent. The first is number 1.
        received: Datagrams with a reply, also a late one.
        late: Replies after the timeout.
        duplicated: Further replies to a datagram that has one.
        reordered: Replies that came after one with a higher number, without duplicates.
        corrupted: Received datagrams that are none of those sent.
    """

    def __init__(self, format: DatagramFormat, timeout: float) -> None:
        self.sent = self.received = self.late = self.duplicated = self.reordered = self.corrupted = 0
        self.size = format.size
        self._format = format
        self._timeout = timeout
        window = min(MAX_IN_FLIGHT, MAX_BYTES_IN_FLIGHT // max(1, format.size), format.numbers)
        self._window = max(1, window)
        self._in_flight: dict[int, float] = {}  # times of sending by number, in this order
        self._unanswered: dict[int, float] = {}  # the same, after the timeout
        self._highest = 0  # number of a reply
        self._last_settled = 0  # highest number that was answered or timed out

    @property
    def lost(self) -> int:
        """Datagrams without a reply, without those in flight."""
        return self.sent - self.received - len(self._in_flight)

    @property
    def in_flight(self) -> int:
        """Datagrams without a reply whose timeout has not expired."""
        return len(self._in_flight)

    @property
    def can_send(self) -> bool:
        """Whether one more fits into the buffers on the way, even if nobody reads them.

        Datagrams before one that was answered are no longer in a buffer, except if they were reordered.
        """
        return self.sent - self._last_settled < self._window

    @property
    def deadline(self) -> float | None:
        """The time at which the next timeout expires."""
        return next(iter(self._in_flight.values())) + self._timeout if self._in_flight else None

    def next_datagram(self) -> bytes:
        return self._format.encode(self.sent + 1)

    def record_sent(self, now: float) -> None:
        self.sent += 1
        self._in_flight[self.sent] = now

    def receive(self, data: bytes, now: float) -> Reply | None:
        """Count what was received at ``now``; return None if it is corrupted."""
        number = self._format.decode(data, self.sent)
        if number is None:
            self.corrupted += 1
            return None
        pending = self._in_flight if number in self._in_flight else self._unanswered
        if number not in pending:
            self.duplicated += 1
            return Reply(number, None)
        sent = pending.pop(number)
        reply = Reply(number, now - sent, now >= sent + self._timeout, number < self._highest)
        self.received += 1
        self.late += reply.is_late
        self.reordered += reply.is_reordered
        self._highest = max(self._highest, number)
        self._last_settled = max(self._last_settled, number)
        return reply

    def expire(self, now: float) -> Sequence[int]:
        """Give up the datagrams whose timeout has expired at ``now``; return their numbers."""
        expired = list(takewhile(lambda number: now >= self._in_flight[number] + self._timeout, self._in_flight))
        for number in expired:
            self._give_up(number)
        return expired

    def give_up_oldest(self) -> int | None:
        """Give up the oldest datagram in flight because of an error; return its number."""
        number = next(iter(self._in_flight), None)
        if number is not None:
            self._give_up(number)
        return number

    def _give_up(self, number: int) -> None:
        self._unanswered[number] = self._in_flight.pop(number)
        self._last_settled = max(self._last_settled, number)
        if len(self._unanswered) > MAX_UNANSWERED:
            del self._unanswered[next(iter(self._unanswered))]
