"""A coroutine a client, on asyncio's streams: read ``chunk_size`` bytes at a time, answer, read on.

It reads like the conversation it carries, from top to bottom, which is what streams are for. What that
costs: some 0.5 to 1 microsecond of Python for every chunk, however small.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Unpack

from ..config import ServerConfig, ServerOptions
from ..logs import log
from ..proxy import Source
from .acceptor import ACCEPT_BATCH, HandshakeAcceptor, Listener, OnEstablished, Tls, start_accepting
from .connection import Connection
from .registry import Registry
from .sweeper import Sweeper

__all__ = ["StreamConnection", "handle_echo", "listen", "read_ahead"]

CHUNKS_PER_TURN = 50  # chunks that one client is served before the others get their turn
DRAIN_THRESHOLD = 16 * 1024  # bytes of replies that may wait before the next chunk is read
READ_AHEAD_TURNS = 3  # turns of the loop until what the kernel has is in the reader, where that has just been emptied
DISCARD_SIZE = 64 * 1024  # bytes asked for at each read whose input is discarded


def read_ahead(config: ServerConfig) -> int:
    """The ``limit`` for ``asyncio.start_server``: a stream reads ahead at most twice that, and one read more."""
    return max(config.chunk_size, 16 * 1024)


def handle_echo(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, **options: Unpack[ServerOptions]
) -> asyncio.Task[None]:
    """Echo to one client of a server of your own: ``asyncio.start_server(echo_async.handle_echo, ...)``.

    ``options`` are those of :func:`echo_async.serve` that concern one connection (``mode``, ``chunk_size``,
    the message limit, the time-outs); give them with :func:`functools.partial`. What it returns can be
    awaited: it is done when the connection is closed, and raises nothing but :exc:`asyncio.CancelledError`.

    (It is no coroutine function because Python 3.11 and 3.12 report a traceback for every handler of
    ``start_server`` that is cancelled with its loop.)
    """
    try:
        registry = Registry(ServerConfig(**options))
    except BaseException:
        writer.transport.abort()
        raise
    task = _serve(registry, reader, writer, asyncio.get_running_loop())
    sweeper = Sweeper(registry)
    sweeper.start()
    task.add_done_callback(sweeper.stop)
    return task


def _serve(
    registry: Registry,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    loop: asyncio.AbstractEventLoop,
    source: Source = None,
) -> asyncio.Task[None]:
    connection = StreamConnection(registry, reader, writer, source)
    registry.add(connection)
    return connection.start(loop)


async def listen(
    registry: Registry, loop: asyncio.AbstractEventLoop, listener: socket.socket, tls: Tls | None
) -> Listener:
    """Begin to accept clients on ``listener``, over TLS if there is a ``tls``."""
    limit = read_ahead(registry.config)

    # Plain functions, not coroutines: asyncio reports a cancelled handler of its own with a traceback.
    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if registry.refuse():
            return writer.transport.abort()
        _serve(registry, reader, writer, loop)

    if tls is None and not registry.expects_header:
        server = await asyncio.start_server(
            connected, sock=listener, limit=limit, backlog=ACCEPT_BATCH, start_serving=False
        )
        return await start_accepting(server, listener, registry)

    def make_protocol(source: Source, on_established: OnEstablished) -> asyncio.Protocol:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            on_established()
            _serve(registry, reader, writer, loop, source)

        return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit, loop), connected, loop)

    return HandshakeAcceptor(registry, loop, listener, tls, make_protocol)


class StreamConnection(Connection):
    """One client of the ``streams`` engine."""

    __slots__ = ("_reader", "_reading", "_stopping", "_task", "_transport", "_writer")

    def __init__(
        self,
        registry: Registry,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: Source = None,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._transport = writer.transport
        super().__init__(registry, source or self._transport.get_extra_info("peername"))
        self._reading = False  # the task is in a place where it may be woken by a cancellation
        self._stopping = False

    def start(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[None]:
        """Serve the client in a task, which is done when the connection is closed."""
        self._task = loop.create_task(self._run())  # kept here: an event loop has a weak reference only
        self._task.add_done_callback(self._on_done)
        return self._task

    async def _run(self) -> None:
        try:
            if not self._stopping:
                await self._echo()
            if self._stopping:
                await self._drain()
            await self._linger()
            is_sent = self._transport.can_write_eof() and not self.unsent()  # TLS has its close_notify to send
            self._transport.close()
            if not is_sent:
                await self._writer.wait_closed()
        except (OSError, RuntimeError) as error:
            # The connection broke. uvloop says RuntimeError where asyncio says ConnectionError.
            log.debug("%s broke off: %s", self.peer, error)
        except Exception as error:
            self.fail(error)

    def _on_done(self, _: object) -> None:
        """The task is done; it may have been cancelled before it ran at all."""
        self._close_socket()
        self.registry.remove(self)

    def _close_socket(self) -> None:
        """Abort the transport, if it is not closed already."""
        # asyncio's has no event loop any more, once it has sent the last of what it still had when it was closed.
        with contextlib.suppress(AttributeError):
            self._transport.abort()

    async def _echo(self) -> None:
        """Read a chunk, answer what it completed; until the conversation or the client's side ends, or we are woken."""
        conversation, transport = self.conversation, self._transport
        read, write, size = self._reader.read, transport.write, self.registry.config.chunk_size
        log_messages, log_chunks = self.registry.log_messages, self.registry.log_chunks
        chunks = 0
        self._reading = True
        try:
            while chunk := await read(size):
                reply = conversation.receive(chunk)
                if log_chunks:
                    self.log_chunk(chunk)
                if reply:
                    if transport.is_closing():  # the client is gone, and what it had sent is still being read
                        return
                    write(reply)
                    if log_messages:
                        await self._log(reply)
                    if transport.get_write_buffer_size() > DRAIN_THRESHOLD:
                        await self._writer.drain()
                if conversation.finished:
                    return
                chunks += 1
                if chunks == CHUNKS_PER_TURN:
                    chunks = 0
                    await asyncio.sleep(0)
            conversation.receive_eof()
        except asyncio.CancelledError:
            if self._reading or self._task.uncancel():  # it was not us who cancelled, or not us alone
                raise
        finally:
            self._reading = False

    async def _drain(self) -> None:
        """At a stop: answer what has arrived, and let a message that has begun be finished."""
        conversation = self.conversation
        try:
            while not conversation.finished:
                for _ in range(READ_AHEAD_TURNS):
                    await asyncio.sleep(0)
                async with asyncio.timeout(None if conversation.incomplete else 0):
                    chunk = await self._reader.read(DISCARD_SIZE)
                if not chunk:
                    return conversation.receive_eof()
                reply = conversation.receive(chunk)
                if self._transport.is_closing():
                    return
                self._transport.write(reply)
                if reply and self.registry.log_messages:
                    await self._log(reply)
                await self._writer.drain()
        except TimeoutError:
            conversation.finish()

    async def _log(self, reply: bytes) -> None:
        """The lines for one reply, in turns with the other clients; those that are left at once, if we are woken."""
        lines = self.log_reply(reply)
        try:
            for _ in lines:
                await asyncio.sleep(0)
        finally:
            for _ in lines:
                pass

    async def _linger(self) -> None:
        """Discard what still comes until the client ends its side. The sweep bounds the time."""
        if not self._reader.at_eof() and self._transport.can_write_eof():
            self._transport.write_eof()
            while chunk := await self._reader.read(DISCARD_SIZE):
                self.conversation.receive(chunk)

    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def finish(self) -> None:
        self.conversation.finish()
        self._wake()

    def stop(self) -> None:
        self._stopping = True
        self._wake()

    def abort(self) -> None:
        self.conversation.finish()  # what was read ahead is not answered any more
        self._close_socket()

    def _wake(self) -> None:
        if self._reading:
            self._reading = False
            self._task.cancel()
