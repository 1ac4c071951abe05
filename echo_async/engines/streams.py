"""One coroutine per connection, on asyncio's streams: take ``chunk_size`` bytes at a time, answer, read on.

The code runs in the order of the conversation, which is what streams are for. The price is some 0.5 to 1
microsecond of Python per chunk, however small.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from ..config import ServerConfig
from ..net import format_address
from .asyncio_runner import AsyncioRunner, log_in_turns
from .chunk_reader import ChunkReader
from .connection import CHUNKS_PER_TURN, MIN_WRITE, Connection
from .context import ServerContext, Slot
from .loop_internals import READ_AHEAD_TURNS, TRANSPORT_ERRORS, abort_transport, run_turns, write_buffer_size

DRAIN_THRESHOLD = 16 * 1024  # bytes of unsent replies above which no chunk is read
DISCARD_SIZE = 64 * 1024  # bytes per read of input that is discarded

Reader = ChunkReader | asyncio.StreamReader


def read_ahead(config: ServerConfig) -> int:
    """Return the bytes of input that are buffered before reading is paused; one read more at most."""
    return 2 * max(config.chunk_size, 16 * 1024)


def protocol_factory(context: ServerContext, slot: Slot) -> Callable[[], asyncio.Protocol]:
    """Return what makes the protocol of each connection, as ``start_server`` does."""
    loop = asyncio.get_running_loop()
    max_size = read_ahead(context.config)

    # Not a coroutine: asyncio logs a traceback if its own task is canceled.
    def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if slot.claim():
                transport = cast(asyncio.Transport, writer.transport)
                chunks = ChunkReader(transport, max_size, loop)  # nothing is buffered yet
                connection = StreamConnection(context, slot, chunks, writer)
                connection.establish()
                if slot.make_script is not None:  # else the first input starts it
                    connection.start()
            else:
                writer.transport.abort()
        except Exception as error:  # an event loop would keep the connection open
            context.fail(format_address(slot.peername or writer.get_extra_info("peername")), error)
            writer.transport.abort()

    return lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(loop=loop), handle, loop)


class StreamConnection(Connection):
    """One connection of the ``streams`` engine."""

    __slots__ = ("_is_draining", "_is_lost", "_is_reading", "_reader", "_task", "_transport", "_writer")

    runner: AsyncioRunner | None

    def __init__(self, context: ServerContext, slot: Slot, reader: Reader, writer: asyncio.StreamWriter) -> None:
        super().__init__(context, slot)
        self._reader = reader
        self._writer = writer
        self._transport = writer.transport
        self._task: asyncio.Task[None] | None = None  # an event loop has a weak reference
        self._is_lost = not isinstance(reader, ChunkReader)  # which would tell
        self._is_reading = False  # the task may be woken by a cancellation
        self._is_draining = False

        if isinstance(reader, ChunkReader):
            reader.notify(self)
        if slot.make_script is not None:
            self.runner = AsyncioRunner(
                self, slot.make_script(self), cast(asyncio.Transport, self._transport), self._wait_writable
            )

    def start(self) -> None:
        """Serve the connection in a task, once."""
        if self._task is None:
            self.serve(is_awaited=False)

    def serve(self, *, is_awaited: bool = True) -> asyncio.Task[None]:
        """Serve the connection in a task, which is done when the connection is closed if it ``is_awaited``."""
        task = self._task = asyncio.get_running_loop().create_task(self._run(is_awaited))
        task.add_done_callback(self._on_done)
        return task

    async def _run(self, is_awaited: bool) -> None:
        try:
            if not self._is_draining:
                await self._echo()
            if self._is_draining:
                await self._drain_input()
            if isinstance(self._reader, ChunkReader) and self._transport.can_write_eof():
                try:  # noqa: SIM105 (suppress would take 2 % more instructions per connection)
                    self._transport.write_eof()  # closing is no end if a child process has a duplicate of the socket
                except TRANSPORT_ERRORS:  # the client is gone, which is no error after its end
                    pass
                self._reader.discard(self.conversation.receive)
            else:
                await self._discard_input()
            if is_awaited:
                await self._writer.wait_closed()
        except TRANSPORT_ERRORS as error:
            self.log_lost(error)
            self.abort()
            error.with_traceback(None)  # which refers to the reader, which has the error
        except Exception as error:
            self.fail(error)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # maybe before it ran
            abort_transport(self._transport)
        self.end_script()
        if self._is_lost:
            self.context.remove(self)

    def on_lost(self, error: Exception | None) -> None:
        """Count as open until the task has ended, and so all messages are logged."""
        self._is_lost = True
        if self._task is None or self._task.done():
            if error is not None:
                self.log_lost(error)
            self.context.remove(self)

    async def _echo(self) -> None:
        """Take chunks, send the replies they complete; until the conversation or the input ends, or :meth:`_wake`.

        Replies to chunks that arrived together are sent together: a packet for each would take most of the time.
        """
        conversation, transport = self.conversation, self._transport
        read, write, size = self._reader.read, transport.write, self.context.config.chunk_size
        receive = self.log_and_receive if self.context.log_chunks else conversation.receive
        runner, is_sent_as_is = self.runner, self.runner is None and not self.context.log_messages
        min_write = MIN_WRITE if is_sent_as_is else 1
        data, reply, end, chunks = b"", b"", 0, 0
        try:
            # Before the start a timeout may have ended the conversation.
            if not (await self._run_script(runner) if runner is not None else not conversation.finished):
                return
            self._is_reading = True
            while data := await read(size):
                for end in range(size, len(data) + size, size):
                    if part := receive(data[end - size : end]):
                        reply += part
                    chunks += 1
                    if reply and (
                        end >= len(data)
                        or chunks == CHUNKS_PER_TURN
                        or len(reply) >= min_write
                        or conversation.finished
                    ):
                        part, reply = reply, b""
                        if transport.is_closing():  # the client is gone; its input is still buffered
                            return
                        if is_sent_as_is:
                            write(part)
                        elif not await self._answer(part):
                            return
                        if transport.get_write_buffer_size() > DRAIN_THRESHOLD:
                            await self._writer.drain()
                    if conversation.finished and (
                        runner is None or not runner.is_held_open or not await self._run_script(runner)
                    ):
                        return
                    if chunks == CHUNKS_PER_TURN:
                        chunks = 0
                        await asyncio.sleep(0)
                data = part = b""  # an idle connection keeps no message
                if self._peername is None:
                    self.note_peername()
            conversation.end_input()
        except asyncio.CancelledError:
            # Not canceled by _wake, or not by it alone
            if self._is_reading or cast(asyncio.Task[None], self._task).uncancel():
                raise
        finally:
            self._is_reading = False
            if end < len(data):  # more than a StreamReader would return
                cast(ChunkReader, self._reader).unread(data[end:])

    async def _answer(self, reply: bytes) -> bool:
        """Send and log ``reply``, or do what takes its place; return whether to read on."""
        if self.runner is not None:
            self.runner.submit(reply)
            return await self._run_script(self.runner) and not self._transport.is_closing()
        self.note_peername()
        self._transport.write(reply)
        if self.context.log_messages:
            await log_in_turns(self.log_reply(reply), self)
        return not self._transport.is_closing()  # what has arrived since then is not answered

    async def _run_script(self, runner: AsyncioRunner) -> bool:
        """Run what was submitted, and wait while the script has stalled the connection; return whether to read on.

        :meth:`_wake` does not interrupt it.
        """
        is_reading, self._is_reading = self._is_reading, False
        try:
            await runner.run()
        finally:
            self._is_reading = is_reading
        return not self._is_draining and (not self.conversation.finished or self.is_held_open)

    async def _wait_writable(self) -> None:
        if self.unsent() > DRAIN_THRESHOLD:
            await self._writer.drain()

    async def _drain_input(self) -> None:
        """Shut down: answer what has arrived, and wait for the rest of an incomplete message."""
        conversation = self.conversation
        try:
            while not conversation.finished:
                if isinstance(self._reader, ChunkReader):
                    self._reader.receive_more()
                await run_turns(READ_AHEAD_TURNS)
                async with asyncio.timeout(None if conversation.incomplete else 0):
                    chunk = await self._reader.read(DISCARD_SIZE)
                if not chunk:
                    return conversation.end_input()
                reply = conversation.receive(chunk)
                if self._transport.is_closing():
                    return
                if reply:
                    await self._answer(reply)
                await self._writer.drain()
        except TimeoutError:
            conversation.end_input()

    async def _discard_input(self) -> None:
        """Discard input until the client closes its side, then close: for readers that cannot do it themselves."""
        if self._transport.can_write_eof():
            self._transport.write_eof()
            while chunk := await self._reader.read(DISCARD_SIZE):
                self.conversation.receive(chunk)
        self._transport.close()

    def get_extra_info(self, name: str) -> Any:
        return self._transport.get_extra_info(name)

    def unsent(self) -> int:
        return write_buffer_size(self._transport)

    def drain(self) -> None:
        self.end_script()
        self._is_draining = True
        self._wake()

    def abort(self, *, reset: bool = False) -> None:
        self.is_aborted = True
        self.end_script()
        self.conversation.end_input()  # input that is buffered is not answered
        abort_transport(self._transport, reset=reset)

    def _wake(self) -> None:
        self.start()
        if self._is_reading and self._task is not None:
            self._is_reading = False
            self._task.cancel()
