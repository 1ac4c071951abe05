"""Several worker processes that serve the same addresses.

The supervisor opens the listening sockets and starts the workers, which inherit them. It serves no connections
itself: it replaces workers that exit or hang, forwards a shutdown, and adds up the counters.

Each worker has sockets of its own, among which the kernel distributes the connections (SO_REUSEPORT). Workers that
share a socket compete instead, and most connections go to the one that is idle. The supervisor keeps all sockets
open: the connections in the backlogs of a worker that exits wait for its replacement, which inherits them. Sockets
that cannot be divided are shared (see :meth:`~echo_async.server.listeners.ListeningSockets.divide`).

Supervisor and worker communicate over a socket pair, in lines of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, zip_longest
from typing import Any, Self

from ..errors import StartError
from ..logs import log
from ..server.listeners import ListenerConfig, ListeningSockets
from ..server.server import EchoServer, listen
from ..stats import Stats
from ..tls import Certificates
from .worker_process import Worker

MAX_RESTARTS = 5  # consecutive attempts to start a replacement before the server stops
MIN_UPTIME = 1.0  # seconds; a worker that exits earlier is replaced after a delay
INITIAL_RESTART_DELAY = 0.1  # seconds; doubled after each failure
MAX_RESTART_DELAY = 2.0  # seconds; connections wait in the backlogs meanwhile
KILL_DELAY = 2.0  # seconds after the graceful shutdown timeout, or after an abort, until a worker is killed

WorkerSockets = Sequence[ListeningSockets]
"""The listening sockets of one worker and of all its replacements, for each listener."""


class Supervisor:
    """The parent process of the workers. ``limit_connections`` applies per worker."""

    def __init__(
        self,
        listeners: Sequence[ListenerConfig],
        workers: int,
        settings: dict[str, Any],
        bound: Sequence[ListeningSockets],
    ) -> None:
        self._configs = [each.config for each in listeners]
        self.certificates = [Certificates(each) for each in self._configs if each.ssl_certfile is not None]
        self.addresses = [address for each in bound for address in each.addresses]
        self.listener_names = [each.name for each in bound]
        self._sockets: list[WorkerSockets] = list(zip(*(each.divide(workers) for each in bound), strict=True))
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self.worker_restarts = 0
        self._is_stopping = False
        self._workers: set[Worker] = set()
        self._exited_stats = [Stats()] * len(bound)  # the counters of workers that have exited
        self._supervise_tasks: list[asyncio.Task[None]] = []
        self._kill_timer: asyncio.TimerHandle | None = None  # set during a shutdown

    @classmethod
    async def start(cls, listeners: Sequence[ListenerConfig], workers: int, settings: dict[str, Any]) -> Self:
        """Start ``workers`` processes, each of which serves all of ``listeners``.

        ``settings`` has ``loop``, ``log_level``, ``log_format`` and ``labels``. :exc:`~echo_async.StartError` if a
        worker cannot start; it writes the reason to stderr.
        """
        async with listen(listeners) as bound:
            self = cls(listeners, workers, settings, bound)
            first, *others = self._sockets
            try:
                started = [await self._start_worker(first)]  # on its own, so that an error is printed once
                started += await asyncio.gather(*map(self._start_worker, others))
            except StartError:
                self.abort()
                await self._wait_for_workers()
                raise
        self._supervise_tasks = [
            asyncio.create_task(self._supervise(*each)) for each in zip(self._sockets, started, strict=True)
        ]
        return self

    async def fetch_stats(self) -> list[Stats]:
        """Return the counters of each listener, over all workers; of those that do not respond, the last reported."""
        await self._request_stats()
        return _add_stats(self._exited_stats, *(worker.stats for worker in self._workers))

    async def is_healthy(self) -> bool:
        """Return whether connections are accepted and at least one worker responds."""
        return self.is_serving() and any(await self._request_stats())

    async def _request_stats(self) -> list[bool]:
        """Update the counters of the workers that are ready; return which of them responded."""
        return await asyncio.gather(*(worker.fetch_stats() for worker in self._workers if worker.is_ready))

    def is_serving(self) -> bool:
        """Whether connections are accepted."""
        return not self._is_stopping

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once."""
        if self._is_stopping:
            return
        self._is_stopping = True
        timeout = max(each.timeout_graceful_shutdown for each in self._configs)
        self._schedule_kill(timeout + KILL_DELAY)
        for worker in self._workers:
            if worker.is_ready:
                worker.request_stats()  # it is stopped when it has responded

    def abort(self) -> None:
        """Shut down without waiting for any client."""
        self.close()
        self._schedule_kill(KILL_DELAY)
        _close(chain.from_iterable(self._sockets))
        for worker in self._workers:
            worker.send_command("abort")

    def reload_certificates(self) -> bool:
        """The same as that of a server. :exc:`~echo_async.StartError` before any worker reads the files."""
        for each in self.certificates:
            each.reload()
        for worker in self._workers:
            worker.send_command("reload")
        return bool(self.certificates)

    async def wait_closed(self) -> None:
        """Wait until all workers have exited. :exc:`~echo_async.StartError` if a replacement could not start."""
        try:
            await asyncio.gather(*self._supervise_tasks)
        finally:
            self.close()
            await self._wait_for_workers()

    async def _start_worker(self, sockets: WorkerSockets) -> Worker:
        if self._is_stopping and not _has_queue(sockets):
            raise StartError("server is shutting down")
        descriptors = [each.descriptors for each in sockets]
        worker = await Worker.start(list(map(ListenerConfig, self._configs, descriptors)), self._settings)
        self._workers.add(worker)
        try:
            await worker.wait_ready()
        except StartError:
            self._workers.discard(worker)
            raise
        self._stop_responding(sockets, worker)
        return worker

    def _stop_responding(self, sockets: WorkerSockets, worker: Worker) -> None:
        """If the server stops, stop ``worker``, which has just responded: it accepts the connections in its backlogs.

        The sockets are closed here before, so that the kernel establishes no connection after the worker's are closed.
        """
        if self._is_stopping:
            _close(sockets)
            worker.send_command("stop")

    async def _supervise(self, sockets: WorkerSockets, worker: Worker) -> None:
        """Replace ``worker``, and each replacement, when it exits, until the server stops.

        A worker that exits before it is stopped is replaced even then, if connections are in its backlogs.
        """
        early_exits = 0
        try:
            while True:
                started_at = self._loop.time()
                code = await worker.run_until_exit(partial(self._stop_responding, sockets, worker))
                self._workers.discard(worker)
                self._exited_stats = _add_stats(self._exited_stats, [replace(each, active=0) for each in worker.stats])
                if self._is_stopping and not _has_queue(sockets):
                    return
                log.error("worker %d exited with code %d, restarting", worker.pid, code)
                self.worker_restarts += 1
                if self._loop.time() - started_at < MIN_UPTIME:
                    await _delay_restart(early_exits)
                    early_exits += 1
                else:
                    early_exits = 0
                worker = await self._start_replacement(sockets)
        except StartError:
            if not self._is_stopping:
                raise
        finally:
            _close(sockets)

    async def _start_replacement(self, sockets: WorkerSockets) -> Worker:
        for failures in range(MAX_RESTARTS - 1):
            with contextlib.suppress(StartError):
                return await self._start_worker(sockets)
            await _delay_restart(failures)
        return await self._start_worker(sockets)

    def _schedule_kill(self, seconds: float) -> None:
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self._kill_timer = self._loop.call_later(seconds, self._kill_workers)

    def _kill_workers(self) -> None:
        _close(chain.from_iterable(self._sockets))  # nobody is replaced
        for worker in self._workers:
            log.error("worker %d did not stop in time, killed", worker.pid)
            worker.kill()

    async def _wait_for_workers(self) -> None:
        await asyncio.gather(*self._supervise_tasks, return_exceptions=True)
        await asyncio.gather(*(worker.wait_exited() for worker in self._workers))
        if self._kill_timer is not None:
            self._kill_timer.cancel()


Service = EchoServer | Supervisor
"""What a process serves."""


def _has_queue(sockets: WorkerSockets) -> bool:
    """Whether a connection waits to be accepted; False once the sockets are closed."""
    return any(each.has_queue() for each in sockets)


def _close(listeners: Iterable[ListeningSockets]) -> None:
    for each in listeners:
        each.close()


def _add_stats(*reports: Sequence[Stats]) -> list[Stats]:
    """Add the counters of each listener; a worker that has not reported yet has none."""
    return [sum(each, Stats()) for each in zip_longest(*reports, fillvalue=Stats())]


async def _delay_restart(failures: int) -> None:
    await asyncio.sleep(min(MAX_RESTART_DELAY, INITIAL_RESTART_DELAY * 2**failures))
