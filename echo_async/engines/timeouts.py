"""The clock of one connection: what it waits for, and since when.

Timeouts need no timer per message: a periodic sweep calls :meth:`Timeouts.expired` with what the connection waits for,
and the counter that shows progress, which are compared with those of the sweep before. So the first sweep starts the
clock, and a timeout is late by two sweeps at most.
"""

from typing import Literal

from ..wire.conversation import Conversation

NEWLINE_DELAY = 5.0  # seconds after which the log tells that a message has no newline yet
NEW_CLIENT_GRACE = 0.5  # seconds that a new connection gets at a shutdown to begin its message
STALLED = -1  # no number of bytes received

TimeoutKind = Literal["idle", "message", "write", "linger"]


class Timeouts:
    """Which timeout runs, its progress, and when both were first seen: what ``Connection.observe`` returns."""

    __slots__ = ("_has_reported_incomplete", "_kind", "_progress", "_since")

    def __init__(self) -> None:
        self._kind: TimeoutKind | None = None
        self._progress = 0
        self._since = 0.0
        self._has_reported_incomplete = False

    def expired(self, now: float, kind: TimeoutKind | None, progress: int, seconds: float) -> TimeoutKind | None:
        """Return ``kind``, the timeout that runs, if ``progress`` has not changed for ``seconds``."""
        if kind != self._kind or progress != self._progress:
            self._kind, self._progress, self._since = kind, progress, now
        return kind if now - self._since >= seconds else None

    def must_report_incomplete(self, conversation: Conversation, now: float) -> bool:
        """Whether a message has been incomplete for ``NEWLINE_DELAY``, for the first time on this connection."""
        if self._has_reported_incomplete or self._kind != "message" or now - self._since < NEWLINE_DELAY:
            return False
        self._has_reported_incomplete = not conversation.finished
        return self._has_reported_incomplete

    def is_still_idle(self, conversation: Conversation, now: float, seconds: float) -> bool:
        """Whether nothing was received since :meth:`expired` found nothing to wait for but the next message.

        Then that method would return None, and this takes a fraction of its time. The threads engine sends outside of
        the event loop and does not use it.
        """
        return (
            self._kind == "idle"
            and conversation.received == self._progress
            and not conversation.finished
            and now - self._since < seconds
        )

    def is_new(self, conversation: Conversation, now: float) -> bool:
        """Whether the connection is new and silent: its first message may be on its way."""
        return not conversation.received and self._progress != STALLED and now - self._since < NEW_CLIENT_GRACE
