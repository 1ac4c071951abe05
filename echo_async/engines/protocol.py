"""Callbacks on asyncio's transports: no task per connection, one call into the conversation and one write per read.

It takes what the kernel has, whatever ``chunk_size`` is, and saves a coroutine's turn per read. It writes only
``bytes``: a transport keeps what it could not send without copying it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from ..compat import is_ready
from .asyncio_runner import AsyncioRunner, log_in_turns
from .connection import Connection
from .context import ServerContext, Slot
from .loop_internals import TRANSPORT_ERRORS, abort_transport, write_buffer_size
from .runner import LOST_CHECK_INTERVAL

LARGE_READ = 200_000  # bytes; after a read of less, the kernel has no more: event loops read 256,000 at a time
LARGE_READS_PER_TURN = 4  # without a reply, before other connections get their turn; one with a reply ends the turn


def protocol_factory(context: ServerContext, slot: Slot) -> Callable[[], asyncio.Protocol]:
    return partial(ProtocolConnection, context, slot)


class ProtocolConnection(Connection, asyncio.Protocol):
    """One connection of the ``protocol`` engine.

    While a task runs the actions of a script, or logs many messages in turns, nothing is read.
    """

    __slots__ = ("_drain_target", "_is_lingering", "_is_writing_paused", "_large_reads", "_transport", "_work")

    _transport: asyncio.Transport
    runner: AsyncioRunner | None

    def __init__(self, context: ServerContext, slot: Slot) -> None:
        Connection.__init__(self, context, slot)  # super() would take twice the time on 3.11
        self._is_writing_paused = False
        self._is_lingering = False
        self._large_reads = 0
        self._drain_target: int | None = None  # bytes that may have been sent to us when the shutdown began
        self._work: Work | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        try:
            if not self.slot.claim():
                return self._transport.abort()
            self.establish()
            if self.slot.make_script is not None:
                script = self.slot.make_script(self)
                self.runner = AsyncioRunner(self, script, self._transport, self._wait_writable)
                self._start_work(self.runner.run())
            else:
                self.conversation.has_parts = not self.context.log_messages
        except Exception as error:  # an event loop would keep the connection open
            self.fail(error)

    @property
    def is_delayed(self) -> bool:
        """Whether a task still answers or logs. It ends the connection then, if that is finished."""
        return self._work is not None

    def get_extra_info(self, name: str) -> Any:
        return self._transport.get_extra_info(name)

    def data_received(self, data: bytes) -> None:
        conversation = self.conversation
        try:
            reply = self.log_and_receive(data) if self.context.log_chunks else conversation.receive(data)
            if reply:
                if conversation.parts:
                    for part in conversation.parts:
                        self._transport.write(part)
                    conversation.parts = ()
                if conversation.has_parts:
                    self._transport.write(reply)
                else:
                    self._run_script_or_log(reply)
            if conversation.finished:
                self._end_if_answered()
            if len(data) > LARGE_READ:
                self._count_large_read(reply)
        except Exception as error:
            self.fail(error)

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
        if self._work is not None:  # TLS has read the message and the end of input at once
            self._work.is_input_ended = True
            return True
        if not self._is_lingering:
            with contextlib.suppress(*TRANSPORT_ERRORS):  # the client has reset the connection
                self._transport.write_eof()  # closing is no end if a child process has a duplicate of the socket
        return False  # the transport sends what is left and closes

    def connection_lost(self, error: Exception | None) -> None:
        """Count as open until the task has ended, and so all messages are logged."""
        if error is not None:
            self.log_lost(error)
        if self.runner is not None:
            self.runner.end()
        if self._work is not None and self._work.task is not None:
            self._work.task.add_done_callback(lambda _: self.context.remove(self))
        else:
            self.context.remove(self)

    def pause_writing(self) -> None:
        """Apply backpressure: the client does not read, so nothing is read from it."""
        self._is_writing_paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        if self.runner is not None:
            self.runner.wake()
        self._resume_reading()

    def _can_read(self) -> bool:
        return not self._is_writing_paused and self._work is None and not self.is_stalled

    def _buffered(self) -> int:
        """Return the most bytes that can wait to be read: in TLS, and in the kernel up to the size of its buffer."""
        if self._transport.is_closing():
            return 0
        tls, connected = map(self._transport.get_extra_info, ("tls", "socket"))
        size: int = 0 if tls is None else tls.unprocessed
        if is_ready([connected]):
            size += connected.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return size

    def _resume_reading(self) -> None:
        if self._can_read() and not self._transport.is_closing():
            self._transport.resume_reading()

    def unsent(self) -> int:
        return write_buffer_size(self._transport)

    def drain(self) -> None:
        self.end_script()
        conversation = self.conversation
        if self._drain_target is None:
            self._drain_target = conversation.received + self._buffered()
        # Later sweeps call this again until all of that is read. What arrives after it is not answered.
        if self._can_read() and (conversation.received >= self._drain_target or not self._buffered()):
            conversation.drain()
        if conversation.finished:
            self._end_if_answered()

    def _end_if_answered(self) -> None:
        """Close the sending side, once, unless a task still answers or a script leaves the end to the client."""
        if self._is_lingering or self._work is not None or self.is_held_open:
            return
        self._is_lingering = True
        try:
            self._transport.write_eof()
        except TRANSPORT_ERRORS:  # the client has reset the connection
            self._transport.abort()

    def abort(self, *, reset: bool = False) -> None:
        self.is_aborted = True
        self.end_script()
        abort_transport(self._transport, reset=reset)

    # A script, and access log lines in turns.

    def _run_script_or_log(self, reply: bytes) -> None:
        if self.runner is not None:
            self.runner.submit(reply)
            if self._work is None:
                self._start_work(self.runner.run())
            return
        self.note_peername()
        self._transport.write(reply)
        lines = self.log_reply(reply)
        if next(lines, None) is not None:
            self._start_work(log_in_turns(lines, self))

    def _start_work(self, steps: Coroutine[Any, Any, None]) -> None:
        work = self._work = Work()
        self._transport.pause_reading()
        work.task = asyncio.get_running_loop().create_task(self._run(work, steps))  # which may be done at once

    async def _run(self, work: Work, steps: Coroutine[Any, Any, None]) -> None:
        try:
            self._transport.pause_reading()  # uvloop starts reading after connection_made, whatever that does
            await steps
        except TRANSPORT_ERRORS as error:  # the client has reset the connection
            self.log_lost(error)
            self.abort()
        except Exception as error:
            self.fail(error)
        finally:
            self._work = None
        if self.conversation.finished and not self._transport.is_closing():
            self._end_if_answered()
        if work.is_input_ended and not self.is_held_open:
            self._transport.close()
        self._resume_reading()

    async def _wait_writable(self) -> None:
        while self._is_writing_paused and self.runner is not None and not self._transport.is_closing():
            await self.runner.sleep(LOST_CHECK_INTERVAL)


class Work:
    """What a connection does in a task: it runs a script, or logs."""

    __slots__ = ("is_input_ended", "task")

    def __init__(self) -> None:
        self.is_input_ended = False  # meanwhile
        self.task: asyncio.Task[None] | None = None  # an event loop has a weak reference only
