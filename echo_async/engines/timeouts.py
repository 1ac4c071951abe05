"""The clocks of one connection, without IO: what it waits for, and since when.

Timeouts need no timer per message: a periodic sweep calls :meth:`Timeouts.expired`, which compares the counters of the
conversation with their previous values. So a timeout is late by one sweep at most.
"""

from typing import Literal, Protocol

from ..wire.conversation import Conversation
from .context import ServerContext

NEWLINE_DELAY = 5.0  # seconds after which the log tells that a message has no newline yet
NEW_CLIENT_GRACE = 0.5  # seconds that a new connection gets at a shutdown to begin its message

TimeoutKind = Literal["idle", "message", "write", "linger"]


class Observed(Protocol):
    """What the clocks look at: a :class:`~echo_async.engines.connection.Connection`."""

    context: ServerContext
    conversation: Conversation

    @property
    def answered(self) -> int: ...
    @property
    def is_delayed(self) -> bool: ...
    @property
    def is_stalled(self) -> bool: ...
    @property
    def is_held_open(self) -> bool: ...
    def unsent(self) -> int: ...


class Timeouts:
    """``lingering_since`` is the time since when nothing more is answered, None before."""

    __slots__ = (
        "_has_reported_incomplete",
        "_idle_since",
        "_is_idle",
        "_message_started_at",
        "_messages",
        "_received",
        "_sent",
        "_sent_at",
        "lingering_since",
    )

    def __init__(self, now: float) -> None:
        self._received = 0
        self._idle_since = now
        self._is_idle = False  # at the last check
        self._sent = 0
        self._sent_at = now
        self._messages = 0
        self._message_started_at: float | None = None
        self._has_reported_incomplete = False
        self.lingering_since: float | None = None

    def expired(self, connection: Observed, now: float) -> TimeoutKind | None:
        """Return the timeout that the connection has exceeded, if any."""
        config = connection.context.config
        self._is_idle = False
        if connection.is_stalled:
            return "idle" if now - self._idle_since >= config.timeout_idle else None
        unsent = connection.unsent()
        sent = connection.answered - unsent
        if not unsent or sent != self._sent:
            self._sent, self._sent_at = sent, now
        elif now - self._sent_at >= config.timeout_write:
            return "write"
        if unsent or connection.is_delayed:  # the client has to read, or to wait: the other clocks stand still
            self._idle_since = now
            self._message_started_at = self._message_started_at and now
            self.lingering_since = self.lingering_since and now
            return None
        return self._expired_input(connection, now)

    def _expired_input(self, connection: Observed, now: float) -> TimeoutKind | None:
        """Return the timeout of what the client has to send next: the end of input, or of a message, or a message."""
        conversation, config = connection.conversation, connection.context.config
        if conversation.finished and not connection.is_held_open:
            if self.lingering_since is None:
                self.lingering_since = now
            elif now - self.lingering_since >= connection.context.linger_timeout:
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

    def must_report_incomplete(self, connection: Observed, now: float) -> bool:
        """Whether a message has been incomplete for ``NEWLINE_DELAY``, for the first time on this connection."""
        since = self._message_started_at
        if self._has_reported_incomplete or since is None or now - since < NEWLINE_DELAY:
            return False
        conversation = connection.conversation
        self._has_reported_incomplete = conversation.incomplete > 0 and not conversation.finished
        return self._has_reported_incomplete

    def is_still_idle(self, connection: Observed, now: float) -> bool:
        """Whether nothing was received since :meth:`expired` found nothing to wait for but the next message.

        Then that method would return None, and this takes a fraction of its time. The threads engine sends outside of
        the event loop and does not use it.
        """
        conversation = connection.conversation
        if not self._is_idle or conversation.received != self._received or conversation.finished:
            return False
        self._sent_at = now
        return now - self._idle_since < connection.context.config.timeout_idle

    def is_new(self, connection: Observed, now: float) -> bool:
        """Whether the connection is new and silent: its first message may be on its way."""
        is_silent = not connection.conversation.received and not connection.is_stalled
        return is_silent and now - self._idle_since < NEW_CLIENT_GRACE

    def restart_idle(self, now: float) -> None:
        """Restart the idle timeout."""
        self._idle_since = now
