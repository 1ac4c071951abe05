"""Lines to send: those of the command line, and those of stdin, read as they come and never collected.

stdin is read by a thread, because nothing else reads a terminal, a pipe and a file alike without
holding up the event loop, or changing the descriptor for others who have it. The thread hands over a
few blocks and then waits; being a daemon in ``os.read``, it never keeps the process from ending.
"""

from __future__ import annotations

import asyncio
import os
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ..client.stream import Batch
from ..errors import EchoError, describe_error

__all__ = ["Lines", "stdin_has_lines"]

BLOCK = 65_536  # bytes of one read
BLOCKS = 4  # that wait to be sent, before the thread waits
LINE_LIMIT = 67_108_864  # bytes of one line: what is longer is not a message but a mistake


def stdin_has_lines() -> bool:
    """Whether stdin is a pipe, a socket or a file: not a terminal, a device like /dev/null, or closed."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind) or stat.S_ISSOCK(kind)


class Lines:
    """A source for ``flow``: each of ``parts`` is whole lines, or None for those of stdin."""

    def __init__(self, parts: Sequence[bytes | None]) -> None:
        self._parts = parts
        self._blocks: deque[bytes] = deque()
        self._at = 0  # in the first of them
        self._done = self._stopped = False
        self._room = threading.Semaphore(BLOCKS)
        self.failure: BaseException | None = None

    @property
    def ended(self) -> bool:
        return self._done and not self._blocks

    def start(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        if None in self._parts:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._read_parts, name="stdin", daemon=True).start()
        else:
            self._blocks.extend(part for part in self._parts if part)
            self._done = True

    async def stop(self) -> None:
        self._stopped = True
        self._room.release()

    def take(self, count: int, size: int) -> Batch | None:
        """One line if ``count`` is 1, else the block that was read."""
        if not self._blocks:
            return None
        block, at = self._blocks[0], self._at
        end = block.find(b"\n", at) + 1 if count == 1 else len(block)
        if end == len(block):
            self._blocks.popleft()
            self._room.release()
            end = 0
        self._at = end
        return Batch(block[at : end or len(block)])

    # In the thread

    def _read_parts(self) -> None:
        failure: Exception | None = None
        try:
            for part in self._parts:
                if part is None:
                    self._read_lines()
                else:
                    self._enqueue(part)
        except OSError as error:
            failure = EchoError(f"cannot read stdin: {describe_error(error)}")
        except EchoError as error:
            failure = error
        self._call(self._end, failure)

    def _read_lines(self) -> None:
        if sys.stdin is None:
            raise EchoError("cannot read stdin: it is closed")
        descriptor = sys.stdin.fileno()
        begun: list[bytes] = []  # a line that has not ended yet
        size = 0
        while not self._stopped and (data := _read(descriptor)):
            end = data.rfind(b"\n") + 1
            if end:
                self._enqueue(b"".join([*begun, data[:end]]))
                begun, size = [], 0
            begun.append(data[end:])
            size += len(data) - end
            if size > LINE_LIMIT:
                raise EchoError(f"stdin has a line of more than {LINE_LIMIT >> 20} MiB: it was not sent")
        if size:
            self._enqueue(b"".join([*begun, b"\n"]))

    def _enqueue(self, block: bytes) -> None:
        self._room.acquire()
        if not self._stopped:
            self._call(self._receive, block)

    def _call(self, function: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the event loop is closed: nobody wants more
            self._stopped = True

    # In the event loop

    def _receive(self, block: bytes) -> None:
        if block:
            self._blocks.append(block)
            self._notify()

    def _end(self, failure: Exception | None) -> None:
        self._done, self.failure = True, failure
        self._notify()


def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, BLOCK)
        except BlockingIOError:  # somebody else who has it made it so
            select.select([descriptor], [], [])
