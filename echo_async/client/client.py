"""The client: ``connect`` gives an :class:`EchoClient`, ``echo`` sends one message and closes.

A client connects again by itself when the server closed between two messages. Servers are of two
kinds, and the client finds out which it talks to:

- one that closes after a reply: the connection ends before any byte of its second reply. That message
  is sent again on a new connection, which harms nothing (an echo changes nothing), and from then on
  every message gets a connection of its own;
- one that keeps connections open: it answered twice on one. From then on messages are pipelined, and
  a connection that ends with a message on its way is :exc:`~echo_async.ReplyLost`, never hidden.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from ssl import SSLContext
from time import perf_counter
from typing import TypedDict, TypeVar, Unpack

from ..awaitable import AwaitableContextManager
from ..config import CONNECT_TIMEOUT, HOST, PORT, REPLY_TIMEOUT, check_seconds
from ..errors import ConfigError, EchoError, ReplyLost
from ..messages import encode
from .connection import Connection
from .connector import Connector
from .stream import WINDOW, stream

__all__ = ["ClientOptions", "EchoClient", "connect", "echo"]

M = TypeVar("M", str, bytes)


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of ``connect`` and ``echo``, each of them optional."""

    uds: str | os.PathLike[str] | None
    timeout: float
    connect_timeout: float
    retry: float
    ssl: SSLContext | bool | None
    server_hostname: str | None


class ServerBehavior(enum.Enum):
    """What the client knows of its server."""

    UNKNOWN = enum.auto()
    CLOSES_AFTER_REPLY = enum.auto()
    KEEPS_OPEN = enum.auto()


class EchoClient:
    """A client of one server. ``name`` is the server's address as errors show it.

    Any number of tasks may use it at once: their messages are pipelined on one connection.
    """

    def __init__(self, target: Connector, timeout: float) -> None:
        self.name = target.name
        self._target = target
        self._timeout = timeout
        self._server = ServerBehavior.UNKNOWN
        self._connection: Connection | None = None
        self._connections: set[Connection] = set()  # those that have not let go of their sockets yet
        self._one_by_one = asyncio.Lock()  # held while the server is not known to keep connections open
        self._closed = False

    async def echo(self, message: M) -> M:
        """Send ``message``, and return the reply once it is all there: str for str, bytes for bytes.

        A newline is added on the way if ``message`` has none at its end; the reply has it only if
        ``message`` had. One inside is a :exc:`MessageError`. :exc:`ReplyLost`, :exc:`ReplyLate` and
        :exc:`ReplyDifferent` say what became of a reply; the next message gets a new connection then.
        """
        data = encode(message)
        if self.pipelines:
            assert self._connection is not None
            await self._connection.echo(data)
        else:
            await self.exchange(data)
        return message  # every byte of the reply was compared with it

    def stream(self, messages: Iterable[M] | AsyncIterable[M], *, window: int = WINDOW) -> AsyncGenerator[M, None]:
        """Send ``messages`` and yield the replies, in order: ``async for reply in client.stream(messages)``.

        At most ``window`` messages are on their way at a time (and 256 KiB, unless one message is
        larger): a slow server, and a slow reader of the replies, hold up the taking of more messages,
        and nothing piles up. With a server that closes after each reply, one is on its way at a time.

        The first reply that is lost, late or different raises its error, after the replies before it;
        so does an error of ``messages`` itself. To leave early, ``aclose()`` the generator
        (``contextlib.aclosing`` does): nothing is left running.
        """
        if isinstance(messages, str | bytes):
            raise TypeError("stream takes an iterable of messages, not one message; echo sends one")
        if window < 1:
            raise ConfigError(f"window {window} makes no sense: give messages, 1 or more")
        return stream(self, messages, window)

    async def ping(self) -> float:
        """Send a small message; return the seconds until it is back, without those for connecting."""
        return await self.exchange(b"ping\n")

    def close(self) -> None:
        """Close the connection; messages on their way are lost. To call it twice does no harm."""
        self._closed = True
        for connection in self._connections:
            connection.close()

    async def wait_closed(self) -> None:
        """Wait until every connection of this client has let go of its socket."""
        if self._connections:
            await asyncio.wait([connection.closed for connection in self._connections])

    @property
    def keeps_open(self) -> bool:
        """Whether the server is known to answer message after message on one connection."""
        return self._server is ServerBehavior.KEEPS_OPEN

    @property
    def pipelines(self) -> bool:
        """Whether a message can be sent now, without connecting and without waiting for the replies before it."""
        connection = self._connection
        return self._server is ServerBehavior.KEEPS_OPEN and connection is not None and connection.open

    async def exchange(self, data: bytes) -> float:
        """Send one message, as ``encode`` makes it; return the seconds until it is back."""
        async with self._one_by_one:
            connection = await self._connected()
            if self._server is not ServerBehavior.KEEPS_OPEN:
                return await self._exchange_alone(connection, data)
        return await _timed(connection, data)

    async def ready(self) -> Connection:
        """The connection to pipeline on, made anew if need be."""
        async with self._one_by_one:
            return await self._connected()

    async def _exchange_alone(self, connection: Connection, data: bytes) -> float:
        """One message with no other on the way, and what its end tells of the server."""
        try:
            seconds = await _timed(connection, data)
        except ReplyLost:
            if connection.replies != 1 or connection.partial or self._closed:
                raise
            self._server = ServerBehavior.CLOSES_AFTER_REPLY
            connection = await self._connected()
            seconds = await _timed(connection, data)
        if self._server is ServerBehavior.CLOSES_AFTER_REPLY:
            connection.close()
        elif connection.replies > 1:
            self._server = ServerBehavior.KEEPS_OPEN
        return seconds

    async def _connected(self) -> Connection:
        connection = self._connection
        if connection is not None and connection.unexpected is not None:
            error, connection.unexpected = connection.unexpected, None
            raise error
        if connection is None or not connection.open:
            connection = self._connection = await self._connect()
        return connection

    async def _connect(self) -> Connection:
        if not self._closed:
            connection = await self._target.open(lambda: Connection(self.name, self._timeout))
            self._connections.add(connection)
            connection.closed.add_done_callback(lambda _: self._connections.discard(connection))
        if self._closed:  # perhaps while connecting
            self.close()
            raise EchoError(f"this client of {self.name} is closed; connect again")
        return connection


async def _timed(connection: Connection, data: bytes) -> float:
    started = perf_counter()
    await connection.echo(data)
    return perf_counter() - started


def connect(
    host: str = HOST,
    port: int = PORT,
    *,
    uds: str | os.PathLike[str] | None = None,
    timeout: float = REPLY_TIMEOUT,
    connect_timeout: float = CONNECT_TIMEOUT,
    retry: float = 0.0,
    ssl: SSLContext | bool | None = None,
    server_hostname: str | None = None,
) -> AwaitableContextManager[EchoClient]:
    """Connect to an echo server: ``async with connect(...) as client``, or ``client = await connect(...)``.

    ``uds`` is the path of a Unix socket, instead of ``host`` and ``port``. ``timeout`` is for each
    reply, ``connect_timeout`` for each connection, all in seconds; ``retry`` keeps trying to connect
    that long, for a server that is still starting. ``ssl`` is True, for TLS with the certificates that
    the system trusts, or a context. :exc:`ConnectError` if there is no connection in the end.
    """

    async def open() -> EchoClient:
        client = EchoClient(target, timeout)
        await client._connected()
        return client

    check_seconds("timeout", timeout)
    target = Connector(
        host,
        port,
        uds=uds,
        connect_timeout=connect_timeout,
        retry=retry,
        ssl=ssl,
        server_hostname=server_hostname,
    )
    return AwaitableContextManager(open)


async def echo(message: M, host: str = HOST, port: int = PORT, **options: Unpack[ClientOptions]) -> M:
    """One connection, one message: send it, return the reply. ``options`` are those of :func:`connect`."""
    async with connect(host, port, **options) as client:
        return await client.echo(message)
