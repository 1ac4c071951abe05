"""The connections of one client: which one a message is sent on, and when a new one is opened; without IO.

Servers are of two kinds, and a client detects which it is connected to:

- A server that closes after each reply: the connection ends before any byte of its second reply. That message is
  sent again on a new connection, which is safe, because an echo has no side effects. From then on, each message
  is sent on a connection of its own.
- A server that keeps connections open: it replied twice on one connection. From then on messages are pipelined,
  and a connection that ends with a message in flight raises :exc:`~echo_async.ReplyLost`.
"""

from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

from ..errors import EchoError, ReplyLost
from .verifier import ReplyVerifier

C = TypeVar("C", bound=ReplyVerifier)


class Session(Generic[C]):
    """Exchange messages with one server, reconnecting where necessary.

    The server has a ``name``. ``lock`` is held while connecting, and while only one message may be in flight.
    """

    keeps_open: bool | None = None
    """Whether the server replies to several messages on one connection; None until that is known."""

    def __init__(self, name: str, lock: AbstractAsyncContextManager[Any]) -> None:
        self.name = name
        self.connection: C | None = None
        self._is_closed = False
        self._lock = lock

    def pipelined_connection(self) -> C | None:
        """Return the connection on which a message can be sent immediately, if there is one."""
        connection = self.connection
        return connection if connection is not None and connection.is_open and self.keeps_open else None

    async def connect(self) -> C:
        """Return an open connection, a new one if necessary."""
        async with self._lock:
            return await self._connect()

    async def exchange(self, data: bytes) -> float:
        """Send one encoded message; return the round-trip time in seconds."""
        if self.connection is not None:
            self.connection.receive_pending()
        connection = self.pipelined_connection()
        if connection is None:
            async with self._lock:
                connection = await self._connect()
                if not self.keeps_open:
                    return await self._exchange_alone(connection, data)
        return await connection.exchange(data)

    async def receive_line(self, data: bytes, max_size: int) -> bytes:
        """Send one encoded message; return its reply, a line of at most ``max_size`` bytes."""
        async with self._lock:
            return await (await self._connect()).receive_line(data, max_size)

    def close(self) -> None:
        self._is_closed = True
        if self.connection is not None:
            self.connection.close()

    async def _open(self) -> C:
        raise NotImplementedError

    async def _connect(self) -> C:
        connection = self._usable_connection()
        if connection is None:
            connection = self.connection = await self._open()
            if self._is_closed:  # closed while connecting
                self.close()
                self._usable_connection()
        return connection

    def _usable_connection(self) -> C | None:
        """Return the current connection if it is open; raise if it received unexpected bytes, or is closed."""
        if (connection := self.connection) is not None:
            connection.receive_pending()
            if connection.unexpected is not None:
                error, connection.unexpected = connection.unexpected, None
                raise error
            if connection.is_open:
                return connection
        if self._is_closed:
            raise EchoError(f"cannot send to {self.name}: the client is closed; connect again")
        return None

    async def _exchange_alone(self, connection: C, data: bytes) -> float:
        try:
            seconds = await connection.exchange(data)
        except ReplyLost:
            if self.keeps_open or connection.replies != 1 or connection.is_partial or self._is_closed:
                raise
            self.keeps_open = False
            connection = await self._connect()
            seconds = await connection.exchange(data)
        if self.keeps_open is False:
            connection.close()
        elif connection.replies > 1:
            self.keeps_open = True
        return seconds
