"""The public API of the asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, Unpack, cast

from ..awaitable import AwaitableContextManager
from ..config import HOST, PORT, ClientOptions
from .async_source import AsyncMessages
from .asyncio_session import AsyncioSession
from .batching import WINDOW_MESSAGES, M, Messages, check_stream, encode
from .endpoint import Endpoint
from .stream import send_batches

if TYPE_CHECKING:
    from ..wire.identity import Identity


class EchoClient:
    """A client of one echo server, created by :func:`connect`.

    Several tasks can use a client concurrently: their messages are pipelined on one connection. After a connection
    was lost, the next message opens a new one.
    """

    def __init__(self, session: AsyncioSession) -> None:
        self._session = session

    @property
    def name(self) -> str:
        """The address of the server in error messages: ``host:port``, or the path of a Unix socket."""
        return self._session.name

    async def echo(self, message: M) -> M:
        r"""Send a message and return its reply.

        Args:
            message: One line. A newline at its end is optional: if there is none, it is added for sending and
                removed from the reply.

        Returns:
            The reply, verified byte by byte, in the type of ``message``.

        Raises:
            MessageError: The message has a newline before its end, or is not valid Unicode. Nothing was sent.
            ReplyLost, ReplyLate, ReplyDifferent: The reply was not received completely, not within ``timeout``
                seconds, or does not match the message.
            ConnectError: The connection had been lost, and a new one failed.
            EchoError: The client is closed.
        """
        data = encode(message)
        connection = self._session.pipelined_connection()
        if connection is not None:
            await connection.echo(data)
        else:
            await self._session.exchange(data)
        return message  # equal to the reply: every byte was compared

    def stream(
        self, messages: Iterable[M] | AsyncIterable[M], *, window: int = WINDOW_MESSAGES
    ) -> AsyncGenerator[M, None]:
        """Send many messages and yield their replies in order.

        Messages are pipelined if the server keeps connections open, and sent one at a time otherwise. Both a slow
        server and a slow consumer of the replies delay taking more messages. To stop early, close the generator
        (:func:`contextlib.aclosing`).

        Args:
            messages: An iterable or asynchronous iterable of messages, each as for :meth:`echo`.
            window: Maximum number of messages in flight, 1 or more. At most 256 KiB are in flight as well; only the
                last message can exceed that.

        Returns:
            An asynchronous generator of the replies, each in the type of its message.

        Raises:
            ConfigError: ``window`` is less than 1.
            MessageError, ReplyLost, ReplyLate, ReplyDifferent, ConnectError, EchoError: As for :meth:`echo`; raised
                by the generator after the replies before the failed one. So is an exception of ``messages``.
        """
        check_stream(messages, window)
        return self._stream(messages, window)

    async def _stream(self, messages: Iterable[M] | AsyncIterable[M], window: int) -> AsyncGenerator[M, None]:
        source = AsyncMessages(messages, window) if isinstance(messages, AsyncIterable) else Messages(messages)
        async with aclosing(send_batches(self._session, source, window, asyncio.Event())) as results:
            async for batch, start, end, _, error in results:
                for reply in batch.replies(start, end):
                    yield cast(M, reply)
                if error is not None:
                    raise error

    async def ping(self) -> float:
        """Send a message of 5 bytes and measure its round trip.

        Returns:
            The round-trip time in seconds, without the time for connecting.

        Raises:
            ReplyLost, ReplyLate, ReplyDifferent, ConnectError, EchoError: As for :meth:`echo`.
        """
        return await self._session.exchange(b"ping\n")

    async def identify(self, message: str | bytes) -> Identity:
        """Send a message to a server in ``identify`` mode.

        Args:
            message: As for :meth:`echo`.

        Returns:
            What the server reports of itself, the connection and the message, which was compared with ``message``.

        Raises:
            MessageError, ReplyLost, ReplyLate, ConnectError, EchoError: As for :meth:`echo`.
            ReplyDifferent: It is not a reply of ``identify`` mode, or reports another message.
        """
        from ..wire.identity import check_reply, max_reply_size  # which imports json

        data = encode(message)
        return check_reply(await self._session.receive_line(data, max_reply_size(data)), data, self.name)

    def close(self) -> None:
        """Close the connection. Replies in flight raise :exc:`ReplyLost`. Closing twice is harmless."""
        self._session.close()

    async def wait_closed(self) -> None:
        """Wait until every socket of this client is closed."""
        await self._session.wait_closed()


def connect(
    host: str = HOST, port: int = PORT, **options: Unpack[ClientOptions]
) -> AwaitableContextManager[EchoClient]:
    """Connect to an echo server: ``async with connect() as client``, or ``client = await connect()``.

    Args:
        host: Host name or address of the server.
        port: TCP port of the server, 1 to 65535.
        uds: Path of a Unix socket, instead of ``host`` and ``port``.
        timeout: Seconds for each reply, greater than 0 (default 10).
        connect_timeout: Seconds for each connection including TLS, greater than 0 (default 10).
        retry: Seconds during which a failed connection is tried again, 0 or more (default 0).
        ssl: A context, or True for TLS with the certificate authorities of the system.
        server_hostname: Name in the certificate of the server, if it is not ``host``. Requires ``ssl``.

    Returns:
        An object that connects when it is awaited or entered, and gives an :class:`EchoClient`.

    Raises:
        ConfigError: An argument is invalid.
        ConnectError: The connection failed. Raised by ``await`` and ``async with``.
        ConnectTimeout: The connection was not established in time. Raised likewise.
    """
    endpoint = Endpoint(host, port, **options)

    async def open() -> EchoClient:
        session = AsyncioSession(endpoint)
        await session.connect()
        return EchoClient(session)

    return AwaitableContextManager(open, "connect")


async def echo(message: M, host: str = HOST, port: int = PORT, **options: Unpack[ClientOptions]) -> M:
    """Send one message on a connection of its own and return its reply.

    Args:
        message: As for :meth:`EchoClient.echo`.
        host, port, options: As for :func:`connect`.

    Returns:
        The reply, in the type of ``message``.

    Raises:
        ConfigError, ConnectError, ConnectTimeout: As for :func:`connect`.
        MessageError, ReplyLost, ReplyLate, ReplyDifferent: As for :meth:`EchoClient.echo`.
    """
    async with connect(host, port, **options) as client:
        return await client.echo(message)
