"""One client, as every engine sees it: who it is, what was said, and whether its time is up.

Nothing here does IO. An engine's connection derives from :class:`Connection`, and adds how bytes are
read and sent and how a connection is ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from ..logs import excerpt, log
from ..net import format_address

if TYPE_CHECKING:
    from .registry import Registry

LINES_PER_TURN = 250  # log lines that one client is given before the others get their turn
NEW_CLIENT_GRACE = 0.5  # seconds that a client which has just connected gets at a stop to begin its message

__all__ = ["Connection", "TimeoutKind"]

TimeoutKind = Literal["idle", "message", "write", "linger"]


class Connection:
    """The part of a connection that does not depend on its engine.

    Time is kept without a timer a message: a sweep calls :meth:`overdue` now and then, which compares
    the conversation's counters with what they were. So a limit is kept to within one sweep.
    """

    __slots__ = (
        "_idle_since",
        "_lingering_since",
        "_message_started_at",
        "_messages",
        "_peername",
        "_received",
        "_sent",
        "_sent_at",
        "conversation",
        "registry",
    )

    def __init__(self, registry: Registry, peername: object) -> None:
        self.registry = registry
        self.conversation = registry.conversation()
        self._peername = peername
        now = registry.now()
        self._received = 0
        self._idle_since = now
        self._sent = 0
        self._sent_at = now
        self._messages = 0
        self._message_started_at: float | None = None  # since when a message has been unfinished
        self._lingering_since: float | None = None  # since when only the client's end is waited for

    @property
    def peer(self) -> str:
        """The client's address, for people."""
        return format_address(self._peername)

    # What an engine provides.

    def unsent(self) -> int:
        """Bytes of replies that the operating system has not taken yet."""
        raise NotImplementedError

    def finish(self) -> None:
        """Answer nothing more: deliver what is due, end the sending side, discard input until the client ends its.

        Closing with unread input would send a reset, which can overtake the last reply (RFC 1122 4.2.2.13).
        """
        raise NotImplementedError

    def stop(self) -> None:
        """The server stops: answer what was received, let a message that has begun be finished, then :meth:`finish`."""
        raise NotImplementedError

    def abort(self) -> None:
        """End at once, whatever is not delivered."""
        raise NotImplementedError

    # What every engine uses.

    def expired_timeout(self, now: float) -> TimeoutKind | None:
        """The time limit that this connection has overrun, if it has."""
        said, config = self.conversation, self.registry.config
        unsent = self.unsent()
        sent = said.answered - unsent
        if not unsent or sent != self._sent:
            self._sent, self._sent_at = sent, now
        elif now - self._sent_at >= config.timeout_write:
            return "write"
        if unsent:  # it has to read first: the other clocks stand still
            self._idle_since = now
            self._message_started_at = self._message_started_at and now
            self._lingering_since = self._lingering_since and now
        elif said.finished:
            if self._lingering_since is None:
                self._lingering_since = now
            elif now - self._lingering_since >= self.registry.linger:
                return "linger"
        elif said.incomplete:
            if self._message_started_at is None or said.messages != self._messages:
                self._message_started_at, self._messages = now, said.messages
            elif now - self._message_started_at >= config.timeout_message:
                return "message"
        else:
            self._message_started_at = None
            if said.received != self._received:
                self._received, self._idle_since = said.received, now
            elif now - self._idle_since >= config.timeout_idle:
                return "idle"
        return None

    def is_new(self, now: float) -> bool:
        """Whether it has connected just now and said nothing yet: its message may be on its way."""
        return not self.conversation.received and now - self._idle_since < NEW_CLIENT_GRACE

    def log_established(self) -> None:
        log.debug("%s connected", self.peer)

    def log_chunk(self, chunk: bytes) -> None:
        log.debug("%s sent a chunk of %d bytes: %s", self.peer, len(chunk), excerpt(chunk))

    def log_reply(self, reply: bytes) -> Iterator[None]:
        """A line for each message in ``reply``, as the project's first server showed on its console.

        Yields after every so many lines: one reply can hold very many messages, and the other clients are
        to have their turn in between.
        """
        peer, info = self.peer, self.registry.access_info
        if self.registry.config.mode == "raw":
            return info(peer, reply)
        start = lines = 0
        while end := reply.find(b"\n", start) + 1:
            info(peer, reply[start:end])
            start, lines = end, lines + 1
            if lines % LINES_PER_TURN == 0:
                yield
        return None

    def fail(self, error: Exception) -> None:
        """An error of the server's own: it ends this connection only, and is counted and logged."""
        self.registry.count("failed")
        log.error("%s closed for an error of the server's: %r", self.peer, error)
        self.abort()

    def log_closed(self) -> None:
        """Say how it ended, where that is worth a line."""
        said = self.conversation
        if said.too_long:
            log.warning("%s closed: its message is over the limit of %d bytes", self.peer, said.limit)
        elif said.incomplete:
            log.warning("%s lost in mid-message, after %d bytes without a newline", self.peer, said.incomplete)
        if self.registry.log_chunks:
            log.debug(
                "%s closed: %d messages, %d bytes in, %d out", self.peer, said.messages, said.received, said.answered
            )
