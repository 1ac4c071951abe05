"""Several worker processes that serve the same listening sockets.

The supervisor opens the sockets and starts the workers, which inherit them. It serves no connections itself: it
replaces workers that exit, forwards a shutdown, and adds up the counters. The workers share one socket per address
instead of opening their own with SO_REUSEPORT, so that the connections in its backlog outlive a worker. Supervisor
and worker communicate over a socket pair, in lines of JSON. A worker exits when the supervisor closes its end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Self

from ..errors import StartError
from ..listeners import Listeners
from ..logs import LogFormat, LogLevel, log
from ..stats import Stats
from .group import BaseGroup, ListenerConfig, listen
from .server import BaseServer
from .worker_process import Worker

MAX_RESTARTS = 5  # consecutive attempts to start a replacement before the server stops
MIN_UPTIME = 1.0  # seconds; a worker that exits earlier is replaced after a delay
INITIAL_RESTART_DELAY = 0.1  # seconds; doubled after each failure
MAX_RESTART_DELAY = 10.0  # seconds
KILL_DELAY = 2.0  # seconds after the graceful shutdown timeout, or after an abort, until a worker is killed


@dataclass(frozen=True)
class WorkerSettings:
    """The settings of a worker besides the configurations of the listeners."""

    loop: str
    log_level: LogLevel
    log_format: LogFormat
    labels: Mapping[str, str]


class Supervisor(BaseGroup[BaseServer]):
    """The parent process of the workers, with the methods of a server. ``limit_connections`` applies per worker."""

    def __init__(
        self, listeners: Sequence[ListenerConfig], settings: WorkerSettings, bound: Sequence[Listeners]
    ) -> None:
        super().__init__([BaseServer(each.config, sockets) for each, sockets in zip(listeners, bound, strict=True)])
        self._listeners = bound
        self._settings = asdict(settings)
        self._loop = asyncio.get_running_loop()
        self._is_stopping = False
        self._workers: set[Worker] = set()
        self._exited_stats = [Stats()] * len(bound)  # the counters of workers that have exited
        self._supervise_tasks: list[asyncio.Task[None]] = []
        self._kill_timer: asyncio.TimerHandle | None = None  # set during a shutdown

    @classmethod
    async def start(
        cls,
        listeners: Sequence[ListenerConfig],
        workers: int,
        settings: WorkerSettings,
    ) -> Self:
        """Start ``workers`` processes, each of which serves all of ``listeners``.

        :exc:`~echo_async.StartError` if a worker cannot start; it writes the reason to stderr.
        """
        async with listen(listeners) as bound:
            self = cls(listeners, settings, bound)
            try:
                first = await self._start_worker()  # on its own, so that an error is printed once
                rest = await asyncio.gather(*(self._start_worker() for _ in range(workers - 1)))
            except StartError:
                self.abort()
                await self._wait_for_workers()
                raise
        self._supervise_tasks = [asyncio.create_task(self._supervise(worker)) for worker in (first, *rest)]
        return self

    @property
    def listener_stats(self) -> list[Stats]:
        """The sums of the counters that the workers reported last."""
        return _add_stats(self._exited_stats, *(worker.stats for worker in self._workers))

    async def fetch_stats(self) -> list[Stats]:
        """Return the current counters of all workers; for those that do not respond, the last reported."""
        await self._request_stats()
        return self.listener_stats

    async def is_healthy(self) -> bool:
        """Return whether connections are accepted and at least one worker responds."""
        return self.is_serving() and any(await self._request_stats())

    async def _request_stats(self) -> list[bool]:
        """Update the counters of the workers that are ready; return which of them responded."""
        return await asyncio.gather(*(worker.fetch_stats() for worker in self._workers if worker.is_ready))

    def close(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            timeout = max(each.config.timeout_graceful_shutdown for each in self.servers)
            self._schedule_kill(timeout + KILL_DELAY)
        for each in self._listeners:
            each.close()  # otherwise the kernel would still establish connections
        for worker in self._workers:
            worker.send_command("stop")

    def abort(self) -> None:
        self.close()
        self._schedule_kill(KILL_DELAY)
        for worker in self._workers:
            worker.send_command("abort")

    def reload_certificates(self) -> None:
        super().reload_certificates()  # raises StartError before any worker reads the files
        for worker in self._workers:
            worker.send_command("reload")

    async def wait_closed(self) -> None:
        """Wait until all workers have exited. :exc:`~echo_async.StartError` if a replacement could not start."""
        try:
            await asyncio.gather(*self._supervise_tasks)
        finally:
            self.close()
            await self._wait_for_workers()

    async def _start_worker(self) -> Worker:
        if self._is_stopping:
            raise StartError("server is shutting down")
        worker = await Worker.start(self.servers, self._settings)
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
        """Replace ``worker``, and each replacement, when it exits, until the server stops."""
        early_exits = 0
        while True:
            started_at = self._loop.time()
            code = await worker.run_until_exit()
            self._workers.discard(worker)
            self._exited_stats = _add_stats(self._exited_stats, [replace(each, active=0) for each in worker.stats])
            if self._is_stopping:
                return
            log.error("worker %d exited with code %d, restarting", worker.pid, code)
            if self._loop.time() - started_at < MIN_UPTIME:
                await _delay_restart(early_exits)
                early_exits += 1
            else:
                early_exits = 0
            try:
                worker = await self._start_replacement()
            except StartError:
                if self._is_stopping:
                    return
                raise

    async def _start_replacement(self) -> Worker:
        for failures in range(MAX_RESTARTS - 1):
            with contextlib.suppress(StartError):
                return await self._start_worker()
            await _delay_restart(failures)
        return await self._start_worker()

    def _schedule_kill(self, seconds: float) -> None:
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self._kill_timer = self._loop.call_later(seconds, self._kill_workers)

    def _kill_workers(self) -> None:
        for worker in self._workers:
            log.error("worker %d did not stop in time, killed", worker.pid)
            worker.kill()

    async def _wait_for_workers(self) -> None:
        await asyncio.gather(*self._supervise_tasks, return_exceptions=True)
        await asyncio.gather(*(worker.wait_exited() for worker in self._workers))
        if self._kill_timer is not None:
            self._kill_timer.cancel()


def _add_stats(*reports: Sequence[Stats]) -> list[Stats]:
    """Add the counters of each listener; a worker that has not reported yet has none."""
    return [sum(each, Stats()) for each in zip_longest(*reports, fillvalue=Stats())]


async def _delay_restart(failures: int) -> None:
    await asyncio.sleep(min(MAX_RESTART_DELAY, INITIAL_RESTART_DELAY * 2**failures))
