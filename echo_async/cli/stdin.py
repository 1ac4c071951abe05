"""The lines to send: those of the command line, and those of stdin, read when they arrive and never collected.

A thread reads stdin: only a blocking read works for terminals, pipes and files alike without blocking the event loop
or changing a descriptor that other processes share. The thread reads a few blocks ahead. It is a daemon, so that
a blocked read does not keep the process alive.
"""

import asyncio
import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Sequence

from ..client.batching import Batch, Source
from ..errors import EchoError, describe_error

READ_SIZE = 65_536  # bytes
MAX_QUEUED_BLOCKS = 4  # blocks that wait to be sent; the thread then waits
MAX_LINE_SIZE = 67_108_864  # bytes


def has_stdin_lines() -> bool:
    """Return whether stdin is a pipe, a socket or a file: not a terminal, a device like /dev/null, or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


class LineSource(Source[bytes]):
    """A source of batches: each of ``parts`` is a number of complete lines, or None for the lines of stdin.

    Without any line, ``default`` is sent, if there is one.
    """

    def __init__(self, parts: Sequence[bytes | None], default: bytes = b"") -> None:
        super().__init__()
        self._parts = parts
        self._default = default
        self._has_lines = False
        self._offset = 0  # in the first block
        self._is_stopped = False
        self._free_blocks = threading.Semaphore(MAX_QUEUED_BLOCKS)

    def start(self, notify: Callable[[], object]) -> None:
        self._notify = notify
        if None in self._parts:
            self._loop = asyncio.get_running_loop()
            try:
                threading.Thread(target=self._read_parts, name="stdin", daemon=True).start()
            except RuntimeError as error:  # "can't start new thread"
                self._end_input(_stdin_error(error))
        else:
            self.waiting.extend(part for part in self._parts if part)
            self.is_done = True

    async def stop(self) -> None:
        self._is_stopped = True
        self._free_blocks.release()

    def take(self, count: int) -> Batch | None:
        """Return one line if ``count`` is 1, else the rest of a block."""
        if not self.waiting:
            return None
        block, start = self.waiting[0], self._offset
        end = block.find(b"\n", start) + 1 if count == 1 else len(block)
        self._offset = end
        if end == len(block):
            self.waiting.popleft()
            self._free_blocks.release()
            self._offset = 0
        return Batch(block[start:end])

    # In the thread

    def _read_parts(self) -> None:
        failure: Exception | None = None
        try:
            for part in self._parts:
                if part is None:
                    self._read_stdin()
                else:
                    self._enqueue(part)
            if not self._has_lines:
                self._enqueue(self._default)
        except (OSError, ValueError) as error:
            failure = _stdin_error(error)
        self._call_in_loop(self._end_input, failure)

    def _read_stdin(self) -> None:
        if sys.stdin is None:
            raise ValueError("it is closed")
        descriptor = sys.stdin.fileno()
        incomplete: list[bytes] = []  # of the last line
        size = 0
        while not self._is_stopped and (data := _read(descriptor)):
            end = data.rfind(b"\n") + 1
            if end:
                self._enqueue(b"".join([*incomplete, data[:end]]))
                incomplete, size = [], 0
            incomplete.append(data[end:])
            size += len(data) - end
            if size > MAX_LINE_SIZE:
                raise ValueError(f"line too long: over {MAX_LINE_SIZE} bytes")
        if size:
            self._enqueue(b"".join([*incomplete, b"\n"]))

    def _enqueue(self, block: bytes) -> None:
        self._has_lines = True
        self._free_blocks.acquire()
        if not self._is_stopped:
            self._call_in_loop(self._receive, block)

    def _call_in_loop(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the event loop is closed
            self._is_stopped = True

    # In the event loop

    def _receive(self, block: bytes) -> None:
        if block:
            self.waiting.append(block)
            self._notify()

    def _end_input(self, failure: Exception | None) -> None:
        self.is_done, self.failure = True, failure
        self._notify()


def _stdin_error(error: Exception) -> EchoError:
    return EchoError(f"cannot read stdin: {describe_error(error)}")


def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, READ_SIZE)
        except BlockingIOError:  # another process that shares stdin made it non-blocking
            select.select([descriptor], [], [])
