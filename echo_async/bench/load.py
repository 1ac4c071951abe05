"""All processes of one load, and their merged result. The processes do the work; the parent only waits."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from time import monotonic, perf_counter
from typing import Any

from ..children import blocked_signals, start_child
from ..client.connector import connect_first, find_addresses, seconds_left
from ..client.datagram_tracker import DatagramFormat
from ..client.endpoint import Endpoint, refuse_self_connection
from ..errors import EchoError
from .plan import LoadPlan
from .recorder import LATE_THRESHOLD, ProcessResult, read_result
from .result import Distribution, LoadResult

START_DELAY = 0.02  # seconds for the start command to reach every process
PROGRESS_INTERVAL = 0.1  # seconds
PROBE_INTERVAL = 0.1  # seconds until a datagram without a reply is sent again
EXIT_TIMEOUT = 5  # seconds for a process that has written its result to exit
MAX_TIMEOUT = 86_400.0  # seconds: sockets accept no timeout as long as options do


def find_server(plan: LoadPlan, host: str, port: int, uds: str | None = None) -> LoadPlan:
    """Connect to the server once; return the plan with the numeric address that connected."""
    wrap_tls = plan.tls_wrapper()
    endpoint, deadline = Endpoint(host, port, uds=uds), monotonic() + plan.timeout
    try:
        info, connected = connect_first(endpoint, find_addresses(endpoint, deadline), deadline)
        with connected:
            connected.settimeout(seconds_left(deadline))
            if wrap_tls is not None:
                wrap_tls(connected).close()
        return replace(plan, family=int(info[0]), address=info[4])
    except (OSError, UnicodeError) as error:
        raise endpoint.connect_error(error, plan.timeout) from error


def find_udp_server(plan: LoadPlan, host: str, port: int) -> LoadPlan:
    """Send datagrams until one is answered; return the plan with the numeric address that answered."""
    endpoint = Endpoint(host, port)
    try:
        *others, last = [(info[0], info[4]) for info in endpoint.resolve()]
        for family, address in others:
            with suppress(OSError):
                return _probe_server(plan, family, address)
        return _probe_server(plan, *last)
    except (OSError, UnicodeError) as error:
        raise endpoint.connect_error(error, plan.timeout) from error


def _probe_server(plan: LoadPlan, family: int, address: Any) -> LoadPlan:
    deadline = perf_counter() + min(plan.timeout, MAX_TIMEOUT)
    with socket.socket(family, socket.SOCK_DGRAM) as connected:
        connected.connect(address)
        refuse_self_connection(connected)
        while (left := deadline - perf_counter()) > 0:
            connected.settimeout(min(left, PROBE_INTERVAL))
            connected.send(DatagramFormat(plan.size).encode(1))
            with suppress(TimeoutError):
                connected.recv(1)
                return replace(plan, family=int(family), address=connected.getpeername())
    raise TimeoutError


def run_load(plan: LoadPlan, progress: Callable[[float], None] | None = None, cpus: Sequence[int] = ()) -> LoadResult:
    """Run the load in processes of its own, pinned to ``cpus`` if there are any. Ctrl-C ends it early.

    ``progress`` is called with the seconds since the start.
    """
    with ExitStack() as stack:
        workers = []
        first = 0
        for share in plan.split():
            workers.append(stack.enter_context(WorkerProcess(share, first, cpus)))
            first += share.connections
        for worker in workers:
            worker.wait_ready()
        start = perf_counter() + START_DELAY
        for worker in workers:
            worker.send(repr(start))
        interrupted = _wait(workers, start, start + plan.warmup + plan.duration, progress)
        return merge_results(plan, [worker.read_result() for worker in workers], interrupted)


class WorkerProcess:
    """A load generator process; killed at the end of the block if it does not exit."""

    def __init__(self, plan: LoadPlan, first: int, cpus: Sequence[int]) -> None:
        with blocked_signals({signal.SIGINT}):  # Ctrl-C is handled here
            self._process, self.channel = start_child(f"{__package__}.worker")
        if cpus:
            os.sched_setaffinity(self._process.pid, cpus)
        self._reader = self.channel.makefile("rb")
        self.send(json.dumps({"plan": asdict(plan), "first": first}))

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._reader.close()
        self.channel.close()
        if kind is not None:
            self._process.kill()
        try:
            self._process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, line: str) -> None:
        """Send the plan, then the start time, then anything to end the measurement now; the result follows."""
        with suppress(ConnectionError):  # it exited: the next read finds that out
            self.channel.sendall(line.encode() + b"\n")

    def wait_ready(self) -> None:
        self._read_line()

    def read_result(self) -> ProcessResult:
        return read_result(self._read_line(), self._reader.read)

    def _read_line(self) -> bytes:
        """Return the next line; :exc:`~echo_async.EchoError` if the process exits instead."""
        with suppress(ConnectionError):  # it has not read all that was sent
            if line := self._reader.readline():
                return line
        code = self._process.wait()
        raise EchoError(f"load generator process exited with code {code}; try fewer --connections")


def _wait(workers: Sequence[WorkerProcess], start: float, end: float, progress: Callable[[float], None] | None) -> bool:
    """Wait for the first result; return whether Ctrl-C came first. A result before ``end`` stops all workers."""
    interrupted = False
    results = select.poll()  # select accepts no descriptor over 1023
    for worker in workers:
        results.register(worker.channel, select.POLLIN)
    try:
        while not results.poll(1e3 * PROGRESS_INTERVAL):
            if progress is not None:
                progress(perf_counter() - start)
    except KeyboardInterrupt:
        interrupted = True
    if perf_counter() < end:
        for worker in workers:
            worker.send("stop")
    return interrupted


def merge_results(plan: LoadPlan, results: Sequence[ProcessResult], interrupted: bool = False) -> LoadResult:
    import numpy as np

    facts = [each.facts for each in results]
    service_times = np.frombuffer(b"".join(each.service_times for each in results), dtype=np.float64)
    delays = np.frombuffer(b"".join(each.delays for each in results), dtype=np.float64)
    counts = np.frombuffer(b"".join(each.counts for each in results), dtype=np.uint64)
    is_open_loop = plan.rate is not None
    return LoadResult(
        plan=plan,
        interrupted=interrupted,
        seconds=max(each["seconds"] for each in facts),
        messages=sum(each["in_window"] for each in facts),
        answered=sum(each["answered"] for each in facts),
        late=int((delays > LATE_THRESHOLD).sum()) if is_open_loop else 0,
        late_by_generator=sum(each["late_by_generator"] for each in facts),
        lost=sum(each["lost"] for each in facts),
        duplicated=sum(each["duplicated"] for each in facts),
        failures=sum((Counter(each["failures"]) for each in facts), Counter[str]()),
        mismatch=next((each["mismatch"] for each in facts if each["mismatch"]), None),
        generator_cpu=[each["cpu_seconds"] / max(each["seconds"], 1e-9) for each in facts],
        service=Distribution(service_times, counts),
        response=Distribution(service_times + delays, counts) if is_open_loop else None,
    )
