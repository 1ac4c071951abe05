"""All processes of one load, and their merged result. The processes do the work; the parent only waits."""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from time import perf_counter
from typing import Any

from ..errors import ConnectError, EchoError, describe_error
from ..net import format_address
from .distribution import Distribution
from .plan import LoadPlan
from .recorder import LATE_THRESHOLD, ProcessResult, read_result
from .result import LoadResult

START_DELAY = 0.02  # seconds for the start command to reach every process
PROGRESS_INTERVAL = 0.1  # seconds
EXIT_TIMEOUT = 5  # seconds for a process that has written its result to exit
MAX_TIMEOUT = 86_400.0  # seconds: sockets accept no timeout as long as options do

Progress = Callable[[float], None]
"""Called with the seconds since the start."""


class LoadError(EchoError):
    """A load generator process exited early."""


def find_server(host: str, port: int, uds: str | None, plan: LoadPlan) -> tuple[int, Any]:
    """Connect to the server once; return the family and the numeric address that connected."""
    name = format_address(uds or (host, port))
    wrap_tls = plan.tls_wrapper()
    try:
        with _connect(host, port, uds, min(plan.timeout, MAX_TIMEOUT)) as connected:
            found = int(connected.family), uds or connected.getpeername()
            if wrap_tls is not None:
                wrap_tls(connected).close()
            return found
    except ssl.SSLError as error:
        raise ConnectError(f"cannot connect to {name}: TLS: {describe_error(error)}") from error
    except TimeoutError as error:
        raise ConnectError(
            f"cannot connect to {name}: timed out after {plan.timeout:g} s; check the address"
        ) from error
    except (OSError, UnicodeError) as error:
        raise ConnectError(f"cannot connect to {name}: {describe_error(error)}; is the server running?") from error


def _connect(host: str, port: int, uds: str | None, timeout: float) -> socket.socket:
    if uds is None:
        return socket.create_connection((host, port), timeout)
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(timeout)
        connected.connect(uds)
    except BaseException:
        connected.close()
        raise
    return connected


def run_load(plan: LoadPlan, progress: Progress | None = None, cpus: Sequence[int] = ()) -> LoadResult:
    """Run the load in processes of its own, pinned to ``cpus`` if there are any. Ctrl-C ends it early."""
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
            worker.start(start)
        interrupted = _wait(workers, start, start + plan.warmup + plan.duration, progress)
        return _merge_results(plan, [worker.read_result() for worker in workers], interrupted)


class WorkerProcess:
    """A load generator process; killed at the end of the block if it does not exit."""

    def __init__(self, plan: LoadPlan, first: int, cpus: Sequence[int]) -> None:
        command = [sys.executable, "-m", f"{__package__}.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if cpus:
            os.sched_setaffinity(self._process.pid, cpus)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self.stdout = self._process.stdin, self._process.stdout
        self._send_line(json.dumps({"plan": plan.as_json(), "first": first}))

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError):
            self._stdin.close()
        self.stdout.close()
        if kind is not None:
            self._process.kill()
        try:
            self._process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send_line(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it exited: the next read finds that out
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()

    def wait_ready(self) -> None:
        if self.stdout.readline() != b"ready\n":
            raise self._exit_error()

    def start(self, time: float) -> None:
        self._send_line(repr(time))

    def stop(self) -> None:
        """End the measurement now; the result follows."""
        self._send_line("stop")

    def read_result(self) -> ProcessResult:
        line = self.stdout.readline()
        if not line:
            raise self._exit_error()
        return read_result(line, self.stdout.read)

    def _exit_error(self) -> LoadError:
        code = self._process.wait()
        return LoadError(f"load generator process exited with code {code}; try fewer --connections")


def _wait(workers: Sequence[WorkerProcess], start: float, end: float, progress: Progress | None) -> bool:
    """Wait for the first result; return whether Ctrl-C came first. A result before ``end`` stops all workers."""
    interrupted = False
    try:
        while not select.select([worker.stdout for worker in workers], (), (), PROGRESS_INTERVAL)[0]:
            if progress is not None:
                progress(perf_counter() - start)
    except KeyboardInterrupt:
        interrupted = True
    if perf_counter() < end:
        for worker in workers:
            worker.stop()
    return interrupted


def _merge_results(plan: LoadPlan, results: Sequence[ProcessResult], interrupted: bool) -> LoadResult:
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
        failures=sum((Counter(each["failures"]) for each in facts), Counter[str]()),
        mismatch=next((each["mismatch"] for each in facts if each["mismatch"]), None),
        generator_cpu=[each["cpu_seconds"] / max(each["seconds"], 1e-9) for each in facts],
        service=Distribution(service_times, counts),
        response=Distribution(service_times + delays, counts) if is_open_loop else None,
    )
