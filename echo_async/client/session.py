"""The choice of the connection for a message, and when a message may be sent again; without IO.

Servers are of two kinds, and a client detects which it is connected to:

- A server that closes after each reply: the connection ends before any byte of its second reply. That message is
  sent again on a new connection, which is safe, because an echo has no side effects. From then on, each message
  is sent on a connection of its own.
- A server that keeps connections open: it replied twice on one connection. From then on messages are pipelined,
  and a connection that ends with a message in flight raises :exc:`~echo_async.ReplyLost`.
"""

import enum
from typing import Generic, TypeVar

from ..errors import EchoError
from .verifier import ReplyVerifier

C = TypeVar("C", bound=ReplyVerifier)


class ServerBehavior(enum.Enum):
    """What the client knows about the server."""

    UNKNOWN = enum.auto()
    CLOSES_AFTER_REPLY = enum.auto()
    KEEPS_OPEN = enum.auto()


class Session(Generic[C]):
    """The state of one client: its current connection, and the behavior of its server, which has a ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connection: C | None = None
        self.is_closed = False
        self._server_behavior = ServerBehavior.UNKNOWN

    @property
    def keeps_open(self) -> bool:
        """Whether the server is known to reply to several messages on one connection."""
        return self._server_behavior is ServerBehavior.KEEPS_OPEN

    def usable_connection(self) -> C | None:
        """Return the current connection if it is open; raise if it received unexpected bytes, or is closed."""
        connection = self.connection
        if connection is not None and connection.unexpected is not None:
            error, connection.unexpected = connection.unexpected, None
            raise error
        if connection is not None and connection.is_open:
            return connection
        if self.is_closed:
            raise EchoError(f"cannot send to {self.name}: the client is closed; connect again")
        return None

    def can_resend(self, connection: C) -> bool:
        """Return whether the message lost on ``connection`` may be sent again, on a new one."""
        if self.keeps_open or connection.replies != 1 or connection.is_partial or self.is_closed:
            return False
        self._server_behavior = ServerBehavior.CLOSES_AFTER_REPLY
        return True

    def record_reply(self, connection: C) -> None:
        """Learn from a reply on ``connection``; close it if the server will not reply again."""
        if self._server_behavior is ServerBehavior.CLOSES_AFTER_REPLY:
            connection.close()
        elif connection.replies > 1:
            self._server_behavior = ServerBehavior.KEEPS_OPEN
