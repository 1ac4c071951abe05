"""The wire protocol, without IO: bytes in, bytes out, end of input, finished.

This module imports nothing that reads, writes, waits or logs. However the input is split, the replies are the
same. An engine calls ``receive`` once per read, sends the result and checks ``finished``. All engines use these
classes, so all engines give the same replies.

Performance: each byte is searched for a newline once, with ``find``, ``rfind`` or ``replace``, which use
``memchr``. An incomplete message is collected in a ``BytesIO``, which appends and returns its content without
copying it. A chunk that consists of complete messages is returned as it is, without a copy, and so is a large chunk of
an incomplete message if the engine takes a reply in parts.
"""

from collections.abc import Sequence
from io import BytesIO

NEWLINE = 10  # ord("\n"), to compare with data[-1]; bytes also search for an integer faster than for bytes
SHORT_LINE = 50  # bytes; newlines that are closer are counted faster by ``count``, on CPython 3.11 to 3.15
LARGE_MESSAGE = 4096  # bytes; from this size on, newlines are found one by one as fast as counted
LARGE_CHUNK = 64 * 1024  # bytes; from this size on, a write of its own takes less time than a copy


class Conversation:
    """The state of one connection's message exchange. ``MODES`` has the class of each mode."""

    __slots__ = (
        "_collected",
        "_is_at_boundary",
        "_is_draining",
        "_parts",
        "discarded",
        "finished",
        "has_parts",
        "incomplete",
        "max_message_size",
        "messages",
        "parts",
        "received",
        "too_long",
    )

    def __init__(self, max_message_size: int) -> None:
        self.max_message_size = max_message_size  # bytes, including the newline
        self.messages = 0  # complete ones that were answered
        self.received = 0  # bytes
        self.discarded = 0  # bytes received that are never answered
        self.incomplete = 0  # bytes of a message whose newline has not been received
        self.finished = False  # answer no further input: send the replies so far, close the sending side, discard input
        self.too_long = False  # finished because a message was longer than ``max_message_size``
        self.has_parts = False  # whether a large reply is returned in parts, which takes less time than to join them
        self.parts: Sequence[bytes] = ()  # of a reply, before the one that ``receive`` returned
        self._is_at_boundary = True  # no message is incomplete: the next byte starts one
        self._is_draining = False  # finish after the incomplete message
        self._parts: list[bytes] | None = None  # the incomplete message, up to its last large chunk
        self._collected: BytesIO | None = None  # the rest of it

    @property
    def answered(self) -> int:
        """Bytes returned as replies."""
        return self.received - self.incomplete - self.discarded

    def receive(self, data: bytes) -> bytes:
        """Process one chunk of at least one byte; return the bytes to send now, possibly none."""
        raise NotImplementedError

    def drain(self) -> None:
        """Finish after the incomplete message, or at once if there is none."""
        if self.incomplete:
            self._is_draining = True
        else:
            self.end_input()

    def end_input(self) -> None:
        """Answer no further input. ``incomplete`` keeps the size of a message that was cut off."""
        self.finished = True
        self._is_at_boundary = False
        self._parts = self._collected = None

    def _reject_too_long(self) -> None:
        """Finish because the current message is too long: its first ``max_message_size`` bytes have no newline."""
        self.discarded += self.incomplete - self.max_message_size
        self.incomplete = self.max_message_size
        self.too_long = True
        self.end_input()

    def _discard(self, data: bytes) -> bytes:
        self.received += len(data)
        self.discarded += len(data)
        return b""

    def _store_partial(self, data: bytes) -> None:
        """Append ``data`` to the incomplete message, unless that makes it too long."""
        size = len(data)
        self.incomplete += size
        if self.incomplete >= self.max_message_size:  # the newline is still missing, and counts
            self._reject_too_long()
        elif size >= LARGE_CHUNK and self.has_parts:
            self._is_at_boundary = False
            self._parts = self._take_parts()
            self._parts.append(data)
        else:
            if self._collected is None:
                self._is_at_boundary = False
                self._collected = BytesIO()
            self._collected.write(data)

    def _take_parts(self) -> list[bytes]:
        parts = self._parts or []
        if self._collected is not None:
            parts.append(self._collected.getvalue())
        self._parts = self._collected = None
        return parts

    def _complete_partial(self, end: bytes) -> bytes:
        """Return the incomplete message with ``end`` appended, or only ``end`` if the rest is in ``parts``."""
        if self._is_at_boundary:
            return end
        self._is_at_boundary = True
        self.incomplete = 0
        if self.has_parts and (self._parts or len(end) >= LARGE_CHUNK):
            self.parts = self._take_parts()
            return end
        collected = self._collected
        assert collected is not None
        collected.write(end)
        self._collected = None
        return collected.getvalue()

    def _receive_single(self, data: bytes) -> bytes:
        if self.finished:
            return self._discard(data)
        size, end = len(data), data.find(b"\n") + 1
        self.received += size
        if end == size <= self.max_message_size and self._is_at_boundary:  # the whole message, as usual
            self.messages += 1
            self.finished = True
            self._is_at_boundary = False
            return data
        if not end:
            self._store_partial(data)
            return b""
        if self.incomplete + end > self.max_message_size:
            self.incomplete += size
            self._reject_too_long()
            return b""
        self.messages += 1
        self.discarded += size - end
        reply = self._complete_partial(data[:end])
        self.end_input()
        return reply


class StreamConversation(Conversation):
    """Mode ``stream``: every message is answered, in order, until the end of input."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        # Fast path: complete messages only, and none can be over the limit.
        if self._is_at_boundary and data[-1] == NEWLINE and (size := len(data)) <= self.max_message_size:
            self.received += size
            if size <= SHORT_LINE or (end := data.find(NEWLINE) + 1) <= SHORT_LINE:
                self.messages += data.count(NEWLINE)
            elif end == size:
                self.messages += 1
            elif size < LARGE_CHUNK:  # bytes.count does not use memchr
                self.messages += size - len(data.replace(b"\n", b""))
            else:
                self.messages += _count_newlines(data)
            return data
        if self._collected is not None and NEWLINE not in data:  # one more part of a message
            self.received += len(data)
            self._store_partial(data)
            return b""
        return self._receive_split(data)

    def _receive_split(self, data: bytes) -> bytes:
        """Process a chunk that starts or ends within a message, or may hold one that is too long."""
        if self.finished or self._is_draining:
            return self._receive_single(data)
        self.received += len(data)
        if NEWLINE not in data:
            self._store_partial(data)
            return b""
        end = data.rfind(b"\n") + 1
        if self.incomplete + end > self.max_message_size and (valid_end := self._find_valid_end(data)) < end:
            reply = self._complete_partial(data[:valid_end]) if valid_end else b""
            self.messages += _count_newlines(data[:valid_end])
            self.incomplete += len(data) - valid_end
            self._reject_too_long()
            return reply
        complete = data if end == len(data) else data[:end]
        self.messages += _count_newlines(complete)
        reply = self._complete_partial(complete)
        if end < len(data):
            self._store_partial(data[end:])
        return reply

    def _find_valid_end(self, data: bytes) -> int:
        """Return the end of the last message before the first one that is too long."""
        start, end = -self.incomplete, data.find(b"\n") + 1
        while end and end - start <= self.max_message_size:
            start, end = end, data.find(b"\n", end) + 1
        return max(start, 0)


def _count_newlines(data: bytes) -> int:
    """Count newlines with ``find`` in large messages, and ``replace``; ``bytes.count`` does not use ``memchr``."""
    count = start = 0
    while end := data.find(b"\n", start) + 1:
        if end - start < LARGE_MESSAGE:
            rest = data[start:]
            return count + len(rest) - len(rest.replace(b"\n", b""))
        count, start = count + 1, end
    return count


class MessageConversation(Conversation):
    """Mode ``message``: one message, one reply. Bytes after the newline are discarded."""

    __slots__ = ()

    receive = Conversation._receive_single


class RawConversation(Conversation):
    """Mode ``raw`` (RFC 862): every byte is returned as it arrives. There are no messages to count or limit."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        if self.finished:
            return self._discard(data)
        self.received += len(data)
        return data


MODES: dict[str, type[Conversation]] = {
    "message": MessageConversation,
    "stream": StreamConversation,
    "raw": RawConversation,
    "identify": StreamConversation,  # what each reply consists of is not a matter of the conversation
}
