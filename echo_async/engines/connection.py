"""The part of a connection that does not depend on its engine: timeouts, log lines, counters.

Nothing here does IO. An engine's connection derives from :class:`Connection`, and adds how bytes are
read and sent and how a connection is ended.
"""

from collections.abc import Iterator
from typing import Literal

from ..errors import describe_error
from ..logs import access_log, excerpt, log
from ..net import format_address
from ..server.counters import Exchange
from ..wire.proxy import ProxyHeader
from .context import ConnectionContext

LINES_PER_TURN = 100  # access log lines of one connection before others get their turn
NEW_CLIENT_GRACE = 0.5  # seconds that a new connection gets at a shutdown to begin its message

TimeoutKind = Literal["idle", "message", "write", "linger"]
TIMEOUT_DETAILS = {"idle": "", "message": ": incomplete message", "write": ": peer is not reading"}


class Connection:
    """One connection of any engine.

    Timeouts need no timer per message: a periodic sweep calls :meth:`expired_timeout`, which compares the
    conversation's counters with their previous values. So a timeout is late by one sweep at most.
    """

    __slots__ = (
        "_header",
        "_idle_since",
        "_is_idle",
        "_lingering_since",
        "_message_started_at",
        "_messages",
        "_peername",
        "_received",
        "_sent",
        "_sent_at",
        "context",
        "conversation",
    )

    has_pending_reply = False
    """Whether a fault delays replies."""
    is_held_open = False
    """Whether a fault leaves it to the client to close the connection."""

    def __init__(self, context: ConnectionContext, peername: object, header: ProxyHeader | None = None) -> None:
        self.context = context
        self.conversation = context.make_conversation()
        self._peername = peername
        self._header = header
        now = context.now()
        self._received = 0
        self._idle_since = now
        self._is_idle = False  # at the last check
        self._sent = 0
        self._sent_at = now
        self._messages = 0
        self._message_started_at: float | None = None
        self._lingering_since: float | None = None

    @property
    def peer(self) -> str:
        """The peer's address, formatted for the log."""
        return format_address(self._peername)

    @property
    def answered(self) -> int:
        """Bytes of replies, sent or in the write buffer."""
        return self.conversation.answered

    @property
    def exchange(self) -> Exchange:
        """What the counters add up."""
        return self.conversation, self.answered

    # Provided by the engine.

    def unsent(self) -> int:
        """Return the bytes of replies that the operating system has not taken yet."""
        raise NotImplementedError

    def finish(self) -> None:
        """Answer nothing more: flush replies, close the sending side, discard input until the client closes its side.

        Closing with unread input would send a reset, which can overtake the last reply (RFC 1122 section 4.2.2.13).
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Answer what was received, wait for the rest of an incomplete message, then :meth:`finish`."""
        raise NotImplementedError

    def abort(self) -> None:
        """Close at once; what is not sent yet is lost."""
        raise NotImplementedError

    # Used by every engine.

    def expired_timeout(self, now: float) -> TimeoutKind | None:
        """Return the timeout that this connection has exceeded, if any."""
        conversation, config = self.conversation, self.context.config
        self._is_idle = False
        unsent = self.unsent()
        sent = self.answered - unsent
        if not unsent or sent != self._sent:
            self._sent, self._sent_at = sent, now
        elif now - self._sent_at >= config.timeout_write:
            return "write"
        if unsent or self.has_pending_reply:  # the client has to read, or to wait: the other clocks stand still
            self._idle_since = now
            self._message_started_at = self._message_started_at and now
            self._lingering_since = self._lingering_since and now
        elif conversation.finished and not self.is_held_open:
            if self._lingering_since is None:
                self._lingering_since = now
            elif now - self._lingering_since >= self.context.linger_timeout:
                return "linger"
        elif conversation.incomplete:
            if self._message_started_at is None or conversation.messages != self._messages:
                self._message_started_at, self._messages = now, conversation.messages
            elif now - self._message_started_at >= config.timeout_message:
                return "message"
        else:
            self._message_started_at = None
            if conversation.received != self._received:
                self._received, self._idle_since = conversation.received, now
            elif now - self._idle_since >= config.timeout_idle:
                return "idle"
            self._is_idle = True
        return None

    def is_still_idle(self, now: float) -> bool:
        """Whether nothing was received since :meth:`expired_timeout` found nothing to wait for but the next message.

        Then that method would return None, and this takes a fraction of its time. The threads engine sends outside of
        the event loop and does not use it.
        """
        conversation = self.conversation
        if not self._is_idle or conversation.received != self._received or conversation.finished:
            return False
        self._sent_at = now
        return now - self._idle_since < self.context.config.timeout_idle

    def is_new(self, now: float) -> bool:
        """Whether the connection is new and silent: its first message may be on its way."""
        return not self.conversation.received and now - self._idle_since < NEW_CLIENT_GRACE

    def fail(self, error: Exception) -> None:
        """End this connection alone after an internal error, which is counted and logged."""
        self.context.fail(self.peer, error)
        self.abort()

    def log_lost(self, error: Exception) -> None:
        log.debug("%s connection lost: %s", self.peer, describe_error(error))

    def log_established(self) -> None:
        log.debug("%s connection established", self.peer)

    def log_chunk(self, chunk: bytes) -> None:
        log.debug("%s chunk received: %d bytes: %s", self.peer, len(chunk), excerpt(chunk))

    def log_reply(self, reply: bytes) -> Iterator[None]:
        """Log a line for each message in ``reply``; yield every ``LINES_PER_TURN`` lines.

        A reply can hold many messages. The engine gives other connections their turn at each yield.
        """
        peer, listener = self.peer, self.context.listener
        if self.context.config.mode == "raw":
            return _log_message(peer, listener, reply)
        start = lines = 0
        while end := reply.find(b"\n", start) + 1:
            _log_message(peer, listener, reply[start:end])
            start, lines = end, lines + 1
            if lines % LINES_PER_TURN == 0:
                yield
        return None

    def finish_log(self, lines: Iterator[None]) -> None:
        """Log the rest of a reply at once."""
        try:
            for _ in lines:
                pass
        except Exception as error:  # of a logging filter, for instance
            self.context.fail(self.peer, error)

    def log_timeout(self, kind: TimeoutKind) -> None:
        seconds = getattr(self.context.config, f"timeout_{kind}")
        log.info("%s %s timeout (%g s)%s", self.peer, kind, seconds, TIMEOUT_DETAILS[kind])

    def log_closed(self) -> None:
        conversation = self.conversation
        if conversation.too_long:
            log.warning("%s message too long: over %d bytes", self.peer, conversation.max_message_size)
        elif conversation.incomplete:
            log.warning(
                "%s incomplete message: connection closed after %d bytes without a newline",
                self.peer,
                conversation.incomplete,
            )
        if self.context.log_chunks:
            log.debug(
                "%s connection closed: %d messages, %d bytes received, %d bytes sent",
                self.peer,
                conversation.messages,
                conversation.received,
                self.answered,
            )


def _log_message(peer: str, listener: str | None, message: bytes) -> None:
    text = excerpt(message)
    facts = {"client": peer, "listener": listener, "bytes": len(message), "text": text}
    access_log.info("%s %d bytes: %s", peer, len(message), text, extra={"facts": facts})
