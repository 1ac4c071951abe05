"""The lines to send: those of the command line, and those of stdin, read when they arrive and never collected.

A thread reads stdin: only a blocking read works for terminals, pipes and files alike without blocking the event loop
or changing a descriptor that other processes share. A few blocks are read ahead. A blocked read does not keep the
process alive.
"""

import asyncio
import os
import select
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial

from ..background import call_in_thread
from ..client.async_source import AsyncSource
from ..client.batching import Batch
from ..errors import EchoError, describe_error

READ_SIZE = 65_536  # bytes
MAX_WAITING_BLOCKS = 4  # blocks that wait to be sent; nothing is read meanwhile
MAX_LINE_SIZE = 67_108_864  # bytes


def has_stdin_lines() -> bool:
    """Return whether stdin is a pipe, a socket or a file: not a terminal, a device like /dev/null, or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


class LineSource(AsyncSource[bytes]):
    """A source of batches: each of ``parts`` is a number of complete lines, or None for the lines of stdin.

    Without any line, ``default`` is sent, if there is one.
    """

    def __init__(self, parts: Sequence[bytes | None], default: bytes = b"") -> None:
        super().__init__(_read_parts(parts, default), MAX_WAITING_BLOCKS)
        self._offset = 0  # in the first block

    def take(self, count: int) -> Batch | None:
        """Return one line if ``count`` is 1, else the rest of a block."""
        if not self.waiting:
            return None
        block, start = self.waiting[0], self._offset
        end = block.find(b"\n", start) + 1 if count == 1 else len(block)
        self._offset = end
        if end == len(block):
            self._pop()
            self._offset = 0
        return Batch(block[start:end])


async def _read_parts(parts: Sequence[bytes | None], default: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        if part is not None:
            yield part
            continue
        try:
            async for block in _read_stdin():
                default = b""
                yield block
        except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError: "can't start new thread"
            raise EchoError(f"cannot read stdin: {describe_error(error)}") from error
    if default:
        yield default


async def _read_stdin() -> AsyncIterator[bytes]:
    if sys.stdin is None:
        raise ValueError("it is closed")
    read = partial(_read, sys.stdin.fileno())
    incomplete: list[bytes] = []  # of the last line
    size = 0
    while data := await asyncio.wrap_future(call_in_thread(read, "echo-async stdin")):
        end = data.rfind(b"\n") + 1
        if end:
            yield b"".join([*incomplete, data[:end]])
            incomplete, size = [], 0
        incomplete.append(data[end:])
        size += len(data) - end
        if size > MAX_LINE_SIZE:
            raise ValueError(f"line too long: over {MAX_LINE_SIZE} bytes")
    if size:
        yield b"".join([*incomplete, b"\n"])


def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, READ_SIZE)
        except BlockingIOError:  # another process that shares stdin made it non-blocking
            select.select([descriptor], [], [])
