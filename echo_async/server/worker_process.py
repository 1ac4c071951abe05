"""A worker process, as the supervisor controls it: start, commands, reports, exit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Self

from ..compat import HANGUP_SIGNALS, STOP_SIGNALS
from ..errors import StartError
from ..stats import Stats
from .server import BaseServer

WORKER_START_TIMEOUT = 30.0  # seconds until a new worker must be ready
STATS_TIMEOUT = 1.0  # seconds until a worker must report its counters; otherwise its last report is used
MAX_REPORT_SIZE = 2**24  # bytes; a report has about 400 per listener
MAX_PENDING_REQUESTS = 8  # unanswered requests for the counters of one worker
BLOCKED_SIGNALS = {*STOP_SIGNALS, *HANGUP_SIGNALS}


class Worker:
    """One worker process, as the supervisor controls it.

    It uses :class:`subprocess.Popen`, since killing an asyncio subprocess that has just exited loses its exit code
    (https://github.com/python/cpython/issues/87744).
    """

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = process.pid
        self.stats: list[Stats] = []  # of each listener, as last reported
        self.is_ready = False
        self._requests: deque[asyncio.Future[bool]] = deque()  # for the counters, in order; True: answered
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, servers: Sequence[BaseServer], settings: dict[str, Any]) -> Self:
        """Start a worker, which inherits the sockets of ``servers`` under their numbers."""
        descriptors = [each.descriptors for each in servers]
        process, channel = _spawn([number for each in descriptors for number in each])
        self = cls(process, *await asyncio.open_connection(sock=channel, limit=MAX_REPORT_SIZE))
        listeners = [(asdict(each.config), numbers) for each, numbers in zip(servers, descriptors, strict=True)]
        self._writer.write(json.dumps({"listeners": listeners, **settings}).encode() + b"\n")
        return self

    def send_command(self, command: str) -> None:
        """Send ``stats``, ``stop``, ``abort`` or ``reload``; do nothing if the worker has exited."""
        if not self._writer.is_closing():  # asyncio logs a warning for writes after the connection is lost
            self._writer.write(json.dumps({"command": command}).encode() + b"\n")

    async def wait_ready(self) -> None:
        """Wait until the worker accepts connections; kill it and raise StartError if it does not."""
        try:
            async with asyncio.timeout(WORKER_START_TIMEOUT):
                self.is_ready = bool(await self._reader.readline())
        except (TimeoutError, ConnectionError):
            pass
        if not self.is_ready:
            self.kill()
            await self.wait_exited()
            self._writer.close()
            raise StartError("cannot start a worker: it exited or timed out; see the error above")

    async def fetch_stats(self) -> bool:
        """Update ``stats``; return False if the worker exits or does not respond in time."""
        if len(self._requests) < MAX_PENDING_REQUESTS:
            self._requests.append(asyncio.get_running_loop().create_future())
            self.send_command("stats")
        request = self._requests[-1]
        await asyncio.wait([request], timeout=STATS_TIMEOUT)
        return request.done() and request.result()

    async def run_until_exit(self) -> int:
        """Process the worker's reports until it exits; return its exit code."""
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                self.stats = [Stats(**each) for each in json.loads(line)["stats"]]
                if self._requests:
                    self._requests.popleft().set_result(True)
        self.is_ready = False
        while self._requests:
            self._requests.popleft().set_result(False)
        code = await self.wait_exited()
        self._writer.close()
        return code

    async def wait_exited(self) -> int:
        return await asyncio.to_thread(self._process.wait)

    def kill(self) -> None:
        self._process.kill()


def _spawn(descriptors: Sequence[int]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a worker process that inherits ``descriptors``; return it and the supervisor's end of the channel to it."""
    channel, worker_channel = socket.socketpair()
    with worker_channel, _blocked_signals():
        number = worker_channel.fileno()
        command = [sys.executable, "-m", "echo_async.server.worker", str(number)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[number, *descriptors]
        ), channel


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block signals, so that a worker started here is not killed before it can handle them."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
