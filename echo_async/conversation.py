"""The wire rules, without IO: bytes in, bytes out, end of input, finished.

This file imports nothing that reads, writes, waits or logs, and gives the same answer however its
input is split. An engine calls ``receive`` once for each read, sends what it returns, and looks at
``finished``; all engines use these classes, so all engines give the same answers.

How it stays fast. Every byte is searched for a newline once, with ``find``/``rfind``/``replace``,
which use ``memchr``; a message that arrives in pieces is gathered in a ``BytesIO``, which grows
without copying what it holds and hands the whole over without copying it either. What arrives whole,
between two messages, is answered with the very object that came in.
"""

from __future__ import annotations

from io import BytesIO

__all__ = ["Conversation", "MessageConversation", "RawConversation", "StreamConversation", "conversation"]

NEWLINE = 10  # ord("\n"), as data[-1] gives it; and looking for a number is what bytes do with the least ado
COPIED_FAST = 1000  # bytes: up to here a copy costs no more than the call that may find out that none is needed


class Conversation:
    """What one client said, and what it is answered. Use :func:`conversation` to make one.

    ``finished``: nothing that arrives from now on is answered; send what was returned, end the
    sending side, and discard the rest of the input.
    ``too_long``: it is finished because a message was over ``limit`` bytes.
    ``incomplete``: bytes of a message that has begun and has no newline yet.
    ``received``: bytes that came in. ``discarded``: those of them that will never be answered.
    ``messages``: complete messages that were answered.
    """

    __slots__ = (
        "_is_at_boundary",
        "_last",
        "_partial_message",
        "discarded",
        "finished",
        "incomplete",
        "limit",
        "messages",
        "received",
        "too_long",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.messages = 0
        self.received = 0
        self.discarded = 0
        self.incomplete = 0
        self.finished = False
        self.too_long = False
        self._is_at_boundary = True  # nothing begun and not finished: what comes next starts a message
        self._partial_message: BytesIO | None = None  # the unfinished message, where there is one
        self._last = False  # finish with the message that has begun

    @property
    def answered(self) -> int:
        """Bytes that were returned as replies."""
        return self.received - self.incomplete - self.discarded

    def receive(self, data: bytes) -> bytes:
        """Take what one read brought (at least one byte); return what to send now, perhaps nothing."""
        raise NotImplementedError

    def receive_eof(self) -> None:
        """The client ended its side: a message without a newline will not be answered."""
        self.finish()

    def stop(self) -> None:
        """Finish with the message that has begun, or at once where none has."""
        if self.incomplete:
            self._last = True
        else:
            self.finish()

    def finish(self) -> None:
        """Answer nothing from now on. ``incomplete`` still tells how much of a message was lost."""
        self.finished = True
        self._is_at_boundary = False
        self._partial_message = None

    def _reject_too_long(self) -> None:
        """The message that has begun is too long: its first ``limit`` bytes have no newline at their end."""
        self.discarded += self.incomplete - self.limit
        self.incomplete = self.limit
        self.too_long = True
        self.finish()

    def _discard(self, data: bytes) -> bytes:
        self.received += len(data)
        self.discarded += len(data)
        return b""

    def _keep(self, data: bytes) -> None:
        """Put by the beginning of a message, or more of it, up to ``limit``."""
        self.incomplete += len(data)
        if self.incomplete >= self.limit:  # its newline is still to come, and counts
            return self._reject_too_long()
        if self._partial_message is None:
            self._partial_message = BytesIO()
            self._is_at_boundary = False
        self._partial_message.write(data)

    def _receive_last(self, data: bytes) -> bytes:
        """One message, and no other after it."""
        if self.finished:
            return self._discard(data)
        self.received += len(data)
        if NEWLINE not in data:
            self._keep(data)
            return b""
        end = data.find(b"\n") + 1
        if self.incomplete + end > self.limit:
            self.incomplete += len(data)
            self._reject_too_long()
            return b""
        self.messages += 1
        self.discarded += len(data) - end
        reply = self._complete(data if end == len(data) else data[:end])
        self.finish()
        return reply

    def _complete(self, end: bytes) -> bytes:
        """The message that was put by, with the last of it."""
        begun = self._partial_message
        if begun is None:
            return end
        begun.write(end)
        self._partial_message = None
        self._is_at_boundary = True
        self.incomplete = 0
        return begun.getvalue()


class StreamConversation(Conversation):
    """``stream``: message after message, answered in order, until the client ends its side."""

    __slots__ = ()

    def receive(self, data: bytes) -> bytes:
        # The common case, in as few steps as it goes: only whole messages, none over the limit.
        if self._is_at_boundary and data[-1] == NEWLINE and (size := len(data)) <= self.limit:
            self.received += size
            if size > COPIED_FAST and size - data.find(b"\n") == 1:
                self.messages += 1
            else:  # counts by memchr; bytes.count looks at each byte in turn
                self.messages += size - len(data.replace(b"\n", b""))
            return data
        return self._receive_pieces(data)

    def _receive_pieces(self, data: bytes) -> bytes:
        if self.finished or self._last:
            return self._receive_last(data)
        self.received += len(data)
        if NEWLINE not in data:
            self._keep(data)
            return b""
        end = data.rfind(b"\n") + 1
        size = self.incomplete + end
        if size > self.limit and (allowed := self._allowed(data)) < end:
            reply = self._complete(data[:allowed]) if allowed else b""
            self.messages += allowed - len(data[:allowed].replace(b"\n", b""))
            self.incomplete += len(data) - allowed
            self._reject_too_long()
            return reply
        whole = data if end == len(data) else data[:end]
        self.messages += end - len(whole.replace(b"\n", b""))
        reply = self._complete(whole)
        if end < len(data):
            self._keep(data[end:])
        return reply

    def _allowed(self, data: bytes) -> int:
        """Where the last complete message ends before the first that is over the limit."""
        start, end = -self.incomplete, data.find(b"\n") + 1
        while end and end - start <= self.limit:
            start, end = end, data.find(b"\n", end) + 1
        return max(start, 0)


class MessageConversation(Conversation):
    """``message``: one message, one reply; what comes after the newline is discarded."""

    __slots__ = ()

    receive = Conversation._receive_last


class RawConversation(Conversation):
    """``raw``: RFC 862, every byte goes back as it arrives; there are no messages to count or limit."""

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
}


def conversation(mode: str, limit: int) -> Conversation:
    """Begin a conversation in ``mode`` whose messages have at most ``limit`` bytes, newline included."""
    return MODES[mode](limit)
