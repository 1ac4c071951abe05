"""The connections of one client: which one a message is sent on, and when a new one is opened."""

import asyncio
from time import perf_counter
from typing import Self

from ..errors import ReplyLost
from .connection import ClientConnection
from .connector import open_connection
from .endpoint import Endpoint
from .session import Session


class AsyncioSession(Session[ClientConnection]):
    """Exchange messages with one server, reconnecting where necessary."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.name)
        self._endpoint = endpoint
        self._connections: set[ClientConnection] = set()  # those whose sockets are not closed yet
        self._lock = asyncio.Lock()  # held while connecting, and while only one message may be in flight

    @classmethod
    async def open(cls, endpoint: Endpoint) -> Self:
        session = cls(endpoint)
        await session.connect()
        return session

    def pipelined_connection(self) -> ClientConnection | None:
        """Return the connection on which a message can be sent immediately, if there is one."""
        connection = self.connection
        return connection if connection is not None and connection.is_open and self.keeps_open else None

    async def connect(self) -> ClientConnection:
        """Return an open connection, a new one if necessary."""
        async with self._lock:
            return await self._connect()

    async def exchange(self, data: bytes) -> float:
        """Send one encoded message; return the round-trip time in seconds."""
        async with self._lock:
            connection = await self._connect()
            if not self.keeps_open:
                return await self._exchange_alone(connection, data)
        return await _measure_round_trip(connection, data)

    async def receive_line(self, data: bytes, max_size: int) -> bytes:
        """Send one encoded message; return its reply, a line of at most ``max_size`` bytes."""
        async with self._lock:
            return await (await self._connect()).receive_line(data, max_size)

    async def _exchange_alone(self, connection: ClientConnection, data: bytes) -> float:
        try:
            seconds = await _measure_round_trip(connection, data)
        except ReplyLost:
            if not self.can_resend(connection):
                raise
            connection = await self._connect()
            seconds = await _measure_round_trip(connection, data)
        self.record_reply(connection)
        return seconds

    async def _connect(self) -> ClientConnection:
        connection = self.usable_connection()
        if connection is None:
            connection = await open_connection(self._endpoint)
            self._connections.add(connection)
            connection.closed.add_done_callback(lambda _: self._connections.discard(connection))
            self.connection = connection
            if self.is_closed:  # closed while connecting
                self.close()
                self.usable_connection()
        return connection

    def close(self) -> None:
        self.is_closed = True
        for connection in self._connections:
            connection.close()

    async def wait_closed(self) -> None:
        if self._connections:
            await asyncio.wait([connection.closed for connection in self._connections])


async def _measure_round_trip(connection: ClientConnection, data: bytes) -> float:
    started = perf_counter()
    await connection.echo(data)
    return perf_counter() - started
