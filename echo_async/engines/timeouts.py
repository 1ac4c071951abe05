"""The clock of one connection, without IO: what it waits for, and since when.

Timeouts need no timer per message: a periodic sweep calls :meth:`Timeouts.expired`, which compares what the connection
waits for, and the counter that shows progress, with those of the sweep before. So the first sweep starts the clock, and
a timeout is late by two sweeps at most.
"""

import math
from typing import Literal, Protocol

from ..wire.conversation import Conversation
from .context import ServerContext

NEWLINE_DELAY = 5.0  # seconds after which the log tells that a message has no newline yet
NEW_CLIENT_GRACE = 0.5  # seconds that a new connection gets at a shutdown to begin its message
STALLED = -1  # no number of bytes received

TimeoutKind = Literal["idle", "message", "write", "linger"]


class Observed(Protocol):
    """What the clock looks at: a :class:`~echo_async.engines.connection.Connection`."""

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
    """Which timeout runs, its progress, and when both were first seen. A connection waits for one thing at a time."""

    __slots__ = ("_has_reported_incomplete", "_kind", "_progress", "_since")

    def __init__(self) -> None:
        self._kind: TimeoutKind | None = None
        self._progress = 0
        self._since = 0.0
        self._has_reported_incomplete = False

    def expired(self, connection: Observed, now: float) -> TimeoutKind | None:
        """Return the timeout that the connection has exceeded, if any."""
        kind, progress, seconds = _observe(connection)
        if kind != self._kind or progress != self._progress:
            self._kind, self._progress, self._since = kind, progress, now
        return kind if now - self._since >= seconds else None

    def must_report_incomplete(self, connection: Observed, now: float) -> bool:
        """Whether a message has been incomplete for ``NEWLINE_DELAY``, for the first time on this connection."""
        if self._has_reported_incomplete or self._kind != "message" or now - self._since < NEWLINE_DELAY:
            return False
        self._has_reported_incomplete = not connection.conversation.finished
        return self._has_reported_incomplete

    def is_still_idle(self, connection: Observed, now: float) -> bool:
        """Whether nothing was received since :meth:`expired` found nothing to wait for but the next message.

        Then that method would return None, and this takes a fraction of its time. The threads engine sends outside of
        the event loop and does not use it.
        """
        conversation = connection.conversation
        return (
            self._kind == "idle"
            and conversation.received == self._progress
            and not conversation.finished
            and now - self._since < connection.context.config.timeout_idle
        )

    def is_new(self, connection: Observed, now: float) -> bool:
        """Whether the connection is new and silent: its first message may be on its way."""
        is_silent = not connection.conversation.received and not connection.is_stalled
        return is_silent and now - self._since < NEW_CLIENT_GRACE


def _observe(connection: Observed) -> tuple[TimeoutKind | None, int, float]:
    """Return the timeout that runs, what changes with progress, and the seconds without any after which it expires."""
    conversation, config = connection.conversation, connection.context.config
    if connection.is_stalled:
        return "idle", STALLED, config.timeout_idle
    if unsent := connection.unsent():
        return "write", connection.answered - unsent, config.timeout_write
    if connection.is_delayed:  # the client has to wait
        return None, 0, math.inf
    if conversation.finished and not connection.is_held_open:
        return "linger", 0, connection.context.linger_timeout
    if conversation.incomplete:
        return "message", conversation.messages, config.timeout_message
    return "idle", conversation.received, config.timeout_idle
