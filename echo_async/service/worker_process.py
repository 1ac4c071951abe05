"""A worker process, as the supervisor controls it: start, commands, reports, exit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Self

from ..children import blocked_signals, start_child
from ..compat import HANGUP_SIGNALS, STOP_SIGNALS, read_cpu_time
from ..errors import StartError
from ..logs import log
from ..server.listeners import ListenerConfig
from ..stats import Stats

WORKER_START_TIMEOUT = 30.0  # seconds until a new worker must be ready
STATS_TIMEOUT = 1.0  # seconds until a worker must report its counters; otherwise its last report is used
HEARTBEAT_INTERVAL = 0.5  # seconds from a report until the next is requested, and until one is missed
MAX_MISSED, MAX_MISSED_BUSY = 4, 60  # consecutive missed reports of a worker that is killed: 2 s and 30 s
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
        self._reports = 0  # received
        self._requests: deque[asyncio.Future[bool]] = deque()  # for the counters, in order; True: answered
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, listeners: Sequence[ListenerConfig], settings: dict[str, Any]) -> Self:
        """Start a worker, which inherits the descriptors of ``listeners`` under their numbers."""
        inherited = [number for each in listeners for number in each.descriptors]
        with blocked_signals(BLOCKED_SIGNALS):
            process, channel = start_child("echo_async.service.worker", descriptors=inherited)
        self = cls(process, *await asyncio.open_connection(sock=channel, limit=MAX_REPORT_SIZE))
        configs = [(asdict(config), descriptors) for config, descriptors in listeners]
        self._writer.write(json.dumps({"listeners": configs, **settings}).encode() + b"\n")
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
            raise StartError("cannot start a worker: it exited or timed out; see the error above")

    async def fetch_stats(self) -> bool:
        """Update ``stats``; return False if the worker exits or does not respond in time."""
        request = self.request_stats()
        await asyncio.wait([request], timeout=STATS_TIMEOUT)
        return request.done() and request.result()

    def request_stats(self) -> asyncio.Future[bool]:
        """Request a report of the counters; return whether there will be one."""
        if len(self._requests) < MAX_PENDING_REQUESTS:
            self._requests.append(asyncio.get_running_loop().create_future())
            self.send_command("stats")
        return self._requests[-1]

    async def run_until_exit(self, on_report: Callable[[], object]) -> int:
        """Process the worker's reports until it exits, and kill it if there are none; return its exit code."""
        watch = asyncio.create_task(self._kill_if_unresponsive())
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                self.stats = [Stats(**each) for each in json.loads(line)["stats"]]
                self._reports += 1
                if self._requests:
                    self._requests.popleft().set_result(True)
                on_report()
        watch.cancel()
        self.is_ready = False
        while self._requests:
            self._requests.popleft().set_result(False)
        return await self.wait_exited()

    async def _kill_if_unresponsive(self) -> None:
        """Kill the worker after ``MAX_MISSED`` missed reports, or ``MAX_MISSED_BUSY`` if it has used the CPU meanwhile.

        They are counted instead of the time, since the supervisor may have been stopped as well.
        """
        missed = missed_idle = 0
        while missed_idle < MAX_MISSED and missed < MAX_MISSED_BUSY:
            reports, cpu_time = self._reports, read_cpu_time(self.pid)
            await asyncio.wait([self.request_stats()], timeout=HEARTBEAT_INTERVAL)
            if self._reports > reports:
                missed = missed_idle = 0
                await asyncio.sleep(HEARTBEAT_INTERVAL)
                continue
            missed += 1
            is_idle = cpu_time is not None and cpu_time == read_cpu_time(self.pid)
            missed_idle = missed_idle + 1 if is_idle else 0
            if missed == MAX_MISSED - 1:  # before it is killed: a log that blocks both blocks the supervisor here
                log.warning("worker %d not responding", self.pid)
        log.error("worker %d did not respond in time, killed", self.pid)
        self.kill()

    async def wait_exited(self) -> int:
        """Close the channel, for which the worker waits after its last report; return the exit code."""
        self._writer.close()
        return await asyncio.to_thread(self._process.wait)

    def kill(self) -> None:
        self._process.kill()
