"""Several processes that serve one listening socket: opened once by the parent, inherited by each worker.

The parent serves nobody. It starts the workers, replaces one that dies, passes a stop on, and adds their
counters up. A socket that is shared (not one for each worker, with SO_REUSEPORT) keeps the clients that wait
in its queue when a worker ends. Parent and worker talk over a socket pair, a JSON object a line; when the
parent dies the worker reads its end, and ends too.
"""

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
from dataclasses import asdict, dataclass, replace
from typing import Self

from ..config import ServerConfig
from ..errors import StartError
from ..listeners import Listeners
from ..logs import LogFormat, LogLevel, log
from ..loops import LoopName
from ..stats import Stats
from .server import BaseServer

__all__ = ["Supervisor", "WorkerSettings"]

WORKER_START_TIMEOUT = 30.0  # seconds for a new worker to be ready
MAX_RESTARTS = 5  # times in a row that a replacement may fail to start before the service ends
MIN_UPTIME = 1.0  # seconds: a worker that ends sooner is replaced after a pause
MAX_RETRY_DELAY = 10.0  # seconds; the first is 0.1, and each is twice the one before
BLOCKED_SIGNALS = {signal.SIGINT, signal.SIGTERM}
STATS_TIMEOUT = 1.0  # seconds for a worker to tell its counters; else those that it told last are taken
MAX_PENDING_REQUESTS = 8  # times that a worker is asked before it has answered
KILL_DELAY = 2.0  # seconds over the graceful stop, or after an abort, until a worker that has not ended is killed


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker has to know besides the server's configuration."""

    loop: LoopName
    log_level: LogLevel
    log_format: LogFormat


class Supervisor(BaseServer):
    """A server of ``workers`` processes; the same object to start, stop and wait for as one of a single process.

    ``limit_connections`` and the time-outs hold for each worker.
    """

    def __init__(self, config: ServerConfig, settings: WorkerSettings, listeners: Listeners) -> None:
        super().__init__(config, listeners)
        self._settings = {"config": asdict(config), **asdict(settings)}
        self._loop = asyncio.get_running_loop()
        self._workers: set[Worker] = set()
        self._exited_stats = Stats()  # the counters of workers that are gone
        self._supervisions: list[asyncio.Task[None]] = []
        self._kill_timer: asyncio.TimerHandle | None = None  # once it stops

    @classmethod
    async def start(
        cls,
        config: ServerConfig,
        workers: int,
        settings: WorkerSettings,
        sockets: Sequence[socket.socket] | None = None,
    ) -> Self:
        """Serve on ``sockets``, which are listening already, or on those that ``config`` names.

        :exc:`~echo_async.StartError` if the workers cannot start; the first one says why on stderr.
        """
        self = cls(config, settings, Listeners.bind(config) if sockets is None else Listeners(sockets))
        try:
            first = await self._start_worker()  # alone: what is wrong is said once
            rest = await asyncio.gather(*(self._start_worker() for _ in range(workers - 1)))
        except StartError:
            self.abort()
            await self._wait_for_workers()
            self._listeners.close()
            raise
        self._supervisions = [asyncio.create_task(self._supervise(worker)) for worker in (first, *rest)]
        return self

    @property
    def stats(self) -> Stats:
        """The counters of all workers, as far as they have told them: when they were asked last, and at their end."""
        return sum((worker.stats for worker in self._workers), self._exited_stats)

    async def fetch_stats(self) -> Stats:
        """The counters of all workers, now. One that is killed keeps those that it told last."""
        await self._ask_workers()
        return self.stats

    async def is_healthy(self) -> bool:
        """Whether it accepts clients and at least one worker answers."""
        return self.is_serving() and any(await self._ask_workers())

    async def _ask_workers(self) -> list[bool]:
        return await asyncio.gather(*(worker.fetch_stats() for worker in self._workers if worker.is_ready))

    def close(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._schedule_kill(self.config.timeout_graceful_shutdown + KILL_DELAY)
        self._listeners.close()  # or the kernel would let clients in that no worker accepts any more
        for worker in self._workers:
            worker.send_command("stop")

    def abort(self) -> None:
        self.close()
        self._schedule_kill(KILL_DELAY)
        for worker in self._workers:
            worker.send_command("abort")

    def reload_certificates(self) -> None:
        super().reload_certificates()  # finds out what is wrong once, here
        for worker in self._workers:
            worker.send_command("reload")

    async def wait_closed(self) -> None:
        """Wait until all workers have ended. :exc:`~echo_async.StartError` if a replacement could not start."""
        try:
            await asyncio.gather(*self._supervisions)
        finally:
            self.close()
            await self._wait_for_workers()
            self._listeners.close()

    async def _start_worker(self) -> Worker:
        if self._is_stopping:
            raise StartError("the server stops")
        worker = await Worker.start(self._settings, self.sockets)
        self._workers.add(worker)
        try:
            await worker.wait_ready()
        except StartError:
            self._workers.discard(worker)
            raise
        if self._is_stopping:
            worker.send_command("stop")
        return worker

    async def _supervise(self, worker: Worker) -> None:
        """Wait for the end of ``worker`` and put another in its place, until the server stops."""
        short_lives = 0
        while True:
            started = self._loop.time()
            code = await worker.wait_ended()
            self._workers.discard(worker)
            self._exited_stats += replace(worker.stats, active=0)
            if self._is_stopping:
                return
            log.error("worker %d ended with %d: starting another", worker.pid, code)
            if self._loop.time() - started < MIN_UPTIME:
                await self._back_off(short_lives)
                short_lives += 1
            else:
                short_lives = 0
            try:
                worker = await self._replace()
            except StartError:
                if self._is_stopping:
                    return
                raise

    async def _replace(self) -> Worker:
        for failed in range(MAX_RESTARTS - 1):
            with contextlib.suppress(StartError):
                return await self._start_worker()
            await self._back_off(failed)
        return await self._start_worker()

    async def _back_off(self, failed: int) -> None:
        await asyncio.sleep(min(MAX_RETRY_DELAY, 0.1 * 2**failed))

    def _schedule_kill(self, seconds: float) -> None:
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self._kill_timer = self._loop.call_later(seconds, self._kill)

    def _kill(self) -> None:
        """End who was told to stop and takes longer than it may."""
        for worker in self._workers:
            log.error("worker %d does not stop: killing it", worker.pid)
            worker.kill()

    async def _wait_for_workers(self) -> None:
        """Wait for the end of those that were told to stop."""
        await asyncio.gather(*self._supervisions, return_exceptions=True)
        await asyncio.gather(*(worker.wait_exited() for worker in self._workers))
        if self._kill_timer is not None:
            self._kill_timer.cancel()


class Worker:
    """One worker process, seen from the parent.

    A :class:`subprocess.Popen`, not asyncio's: killing one of asyncio's that has just ended takes its exit
    code away from who waits for it (https://github.com/python/cpython/issues/87744).
    """

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = process.pid
        self.stats = Stats()
        self.is_ready = False
        self._requests: deque[asyncio.Future[bool]] = deque()  # for its counters
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, settings: dict[str, object], sockets: Sequence[socket.socket]) -> Self:
        process, channel = _spawn(sockets)
        self = cls(process, *await asyncio.open_connection(sock=channel))
        self._writer.write(json.dumps(settings).encode() + b"\n")
        return self

    def send_command(self, what: str) -> None:
        if not self._writer.is_closing():  # it is gone: asyncio would say so on stderr
            self._writer.write(json.dumps({"do": what}).encode() + b"\n")

    async def wait_ready(self) -> None:
        try:
            async with asyncio.timeout(WORKER_START_TIMEOUT):
                answer = await self._reader.readline()
        except (TimeoutError, ConnectionError):
            answer = b""
        if not answer:
            self.kill()
            await self.wait_exited()
            self._writer.close()
            raise StartError("a worker could not start: the reason is in the line before")
        self.is_ready = True

    async def fetch_stats(self) -> bool:
        """Have its counters of now in ``stats``; False if it ends, or does not tell them in time."""
        if len(self._requests) < MAX_PENDING_REQUESTS:
            self._requests.append(asyncio.get_running_loop().create_future())
            self.send_command("stats")
        answer = self._requests[-1]
        await asyncio.wait([answer], timeout=STATS_TIMEOUT)
        return answer.done() and answer.result()

    async def wait_ended(self) -> int:
        """Wait for its end; keep the counters that it tells, and those that it sends last. Returns the exit code."""
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                self.stats = Stats(**json.loads(line)["stats"])
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
        """End it if it has not ended."""
        self._process.kill()


def _spawn(sockets: Sequence[socket.socket]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a worker that serves ``sockets``; returns it, and the parent's end of the channel to it."""
    ours, theirs = socket.socketpair()
    with theirs, _blocked_signals():
        descriptors = [each.fileno() for each in (theirs, *sockets)]
        command = [sys.executable, "-m", "echo_async.server.worker", *map(str, descriptors)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=descriptors
        ), ours


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """What is started here begins with SIGINT and SIGTERM held back: it is not to die of one before it can obey."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
