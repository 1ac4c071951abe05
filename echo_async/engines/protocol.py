"""Callbacks on asyncio's transports: no task per connection, one call into the conversation and one write per read.

It takes what the kernel has, whatever ``chunk_size`` is, and saves a coroutine's turn per read. It writes only
``bytes``: a transport keeps what it could not send without copying it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, cast

from ..compat import is_readable
from ..wire.conversation import Conversation
from ..wire.script import Script, Wait
from .asyncio_runner import AsyncioRunner
from .connection import Connection
from .context import ServerContext, Slot
from .loop_internals import ACCEPT_BATCH, TRANSPORT_ERRORS, abort_transport, reset_transport, write_buffer_size

LARGE_READ = 200_000  # bytes; after a read of less, the kernel has no more: event loops read 256,000 at a time
LARGE_READS_PER_TURN = 4  # without a reply, before other connections get their turn; one with a reply ends the turn


async def create_server(context: ServerContext, slot: Slot, listener: socket.socket) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(
        partial(ProtocolConnection, context, slot), sock=listener, backlog=ACCEPT_BATCH, start_serving=False
    )


def create_protocol(context: ServerContext, slot: Slot) -> asyncio.Protocol:
    return ProtocolConnection(context, slot)


class ProtocolConnection(Connection, asyncio.Protocol):
    """One connection of the ``protocol`` engine.

    While a task runs the actions of a script, or logs many messages in turns, nothing is read.
    """

    __slots__ = (
        "_drain_target",
        "_is_working",
        "_is_writing_paused",
        "_large_reads",
        "_lines",
        "_task",
        "_transport",
        "_writable",
        "_write",
    )

    _transport: asyncio.Transport
    _write: Callable[[bytes], object]
    runner: AsyncioRunner | None

    def __init__(self, context: ServerContext, slot: Slot) -> None:
        super().__init__(context, slot)
        self._is_writing_paused = False
        self._large_reads = 0
        self._drain_target: int | None = None  # bytes that may have been sent to us when the shutdown began
        self._is_working = False
        self._task: asyncio.Task[None] | None = None  # the last one; an event loop has a weak reference only
        self._lines: Iterator[Wait] | None = None  # that the task has to log
        self._writable: asyncio.Future[None] | None = None  # done when the write buffer has room again

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._write = self._transport.write
        try:
            if not self.slot.claim():
                return self._transport.abort()
            self.establish()
            if self.slot.make_script is not None:
                self._start_script(self.slot.make_script(self))
            elif self.context.log_messages:
                self._write = self._write_and_log
            else:
                self.conversation.has_parts = True
        except Exception as error:  # an event loop would keep the connection open
            self.fail(error)

    @property
    def peer(self) -> str:
        """The peer's address. Without a handshake it is looked up on demand, until the connection is lost."""
        if self._peername is None:
            self._peername = self._transport.get_extra_info("peername")
        return super().peer

    @property
    def is_delayed(self) -> bool:
        """Whether a task still answers or logs. It ends the connection then, if that is finished."""
        return self._is_working

    def get_extra_info(self, name: str) -> Any:
        return self._transport.get_extra_info(name)

    def data_received(self, data: bytes) -> None:
        conversation = self.conversation
        try:
            if self.context.log_chunks:
                self.log_chunk(data)
            reply = conversation.receive(data)
            if reply:
                if conversation.parts:
                    self._write_parts(conversation)
                write = self._write  # a local: calling through a slot is slower in CPython
                write(reply)
            if conversation.finished and self.timeouts.lingering_since is None:
                self._linger_if_answered()
            elif len(data) > LARGE_READ:
                self._count_large_read(reply)
        except Exception as error:
            self.fail(error)

    def _write_parts(self, conversation: Conversation) -> None:
        for part in conversation.parts:
            self._write(part)
        conversation.parts = ()

    def _linger_if_answered(self) -> None:
        """Linger, unless a task still answers, or a script leaves it to the client to close the connection."""
        if not self._is_working and not self.is_held_open:
            self.linger()

    def _count_large_read(self, reply: bytes) -> None:
        """End the turn if it was long enough: libuv reads 32 times in a row (src/unix/stream.c, uv__read)."""
        self._large_reads += 1
        if not reply and self._large_reads % LARGE_READS_PER_TURN:
            return
        if self._can_read() and not self._transport.is_closing():
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._resume_reading)

    def eof_received(self) -> bool:
        if not self.conversation.finished:
            self.conversation.end_input()
        if self.timeouts.lingering_since is None:
            with contextlib.suppress(*TRANSPORT_ERRORS):  # the client has reset the connection
                self._transport.write_eof()  # closing is no end if a child process has a duplicate of the socket
        return False  # the transport sends what is left and closes

    def connection_lost(self, error: Exception | None) -> None:
        """Count as open until the task has ended, and so all messages are logged."""
        if error is not None:
            self.log_lost(error)
        self.end_script()
        if self._is_working and self._task is not None:
            self._wake_writer()
            self._task.add_done_callback(lambda _: self.context.remove(self))
        else:
            self.context.remove(self)

    def pause_writing(self) -> None:
        """Apply backpressure: the client does not read, so nothing is read from it."""
        self._is_writing_paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        self._wake_writer()
        self._resume_reading()

    def _can_read(self) -> bool:
        return not self._is_writing_paused and not self._is_working and not self.is_stalled

    def _buffered(self) -> int:
        """Return the most bytes that can wait to be read: in TLS, and in the kernel up to the size of its buffer."""
        if self._transport.is_closing():
            return 0
        tls, connected = map(self._transport.get_extra_info, ("tls", "socket"))
        size: int = 0 if tls is None else tls.unprocessed
        if is_readable([connected]):
            size += connected.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return size

    def _resume_reading(self) -> None:
        if self._can_read() and not self._transport.is_closing():
            self._transport.resume_reading()

    def unsent(self) -> int:
        return write_buffer_size(self._transport)

    def linger(self) -> None:
        self.end_script()
        if not self.conversation.finished:
            self.conversation.end_input()
        self.timeouts.lingering_since = self.context.now()
        try:
            self._transport.write_eof()
        except TRANSPORT_ERRORS:  # the client has reset the connection
            self._transport.abort()

    def drain(self) -> None:
        self.end_script()
        conversation = self.conversation
        if self._drain_target is None:
            self._drain_target = conversation.received + self._buffered()
        # Later sweeps call this again until all of that is read. What arrives after it is not answered.
        if not self._can_read() or (conversation.received < self._drain_target and self._buffered()):
            return
        conversation.drain()
        if conversation.finished and self.timeouts.lingering_since is None:
            self.linger()

    def abort(self) -> None:
        self.end_script()
        if self._lines is not None:  # a shutdown does not wait longer
            self.finish_log(self._lines)
        abort_transport(self._transport)

    def reset(self) -> None:
        self.end_script()
        reset_transport(self._transport)

    # A script, and access log lines in turns.

    def _start_script(self, script: Script) -> None:
        self.runner = AsyncioRunner(self, script, self._transport, self._wait_writable)
        self._write = self._submit
        self._start_task(self.runner.run())

    def _submit(self, reply: bytes) -> None:
        assert self.runner is not None
        self.runner.submit(reply)
        if not self._is_working:
            self._start_task(self.runner.run())

    def _write_and_log(self, reply: bytes) -> None:
        self._transport.write(reply)
        lines = self.log_reply(reply)
        if next(lines, None) is not None:
            self._lines = lines
            self._start_task(self._log_rest(lines))

    async def _log_rest(self, lines: Iterator[Wait]) -> None:
        for _ in lines:
            await asyncio.sleep(0)
        self._lines = None

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        self._is_working = True
        self._transport.pause_reading()
        self._task = asyncio.get_running_loop().create_task(self._work(work))

    async def _work(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            self._transport.pause_reading()  # uvloop starts reading after connection_made, whatever that does
            await work
        except TRANSPORT_ERRORS as error:  # the client has reset the connection
            self.log_lost(error)
            self.abort()
        except Exception as error:
            self.fail(error)
        finally:
            self._is_working = False
        if self.conversation.finished and self.timeouts.lingering_since is None and not self._transport.is_closing():
            self._linger_if_answered()
        self._resume_reading()

    async def _wait_writable(self) -> None:
        """Wait until the write buffer has room, or the connection is lost."""
        if self._is_writing_paused and not self._transport.is_closing():
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable

    def _wake_writer(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
