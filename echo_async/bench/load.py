"""All processes of one load, and what they found together. The processes do the work; the parent only waits."""

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
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from ..errors import ConfigError, ConnectError, EchoError, describe_error
from .distribution import Distribution
from .plan import LoadPlan
from .recorder import LATE, read_results

__all__ = ["LoadError", "LoadResult", "find_server", "run_load"]

HEAD_START = 0.02  # seconds for the word to start to reach every process
TICK = 0.1  # seconds between two looks at the clock, for the progress bar
END = 5  # seconds for a process that has told its result to end
LONGEST_WAIT = 86_400.0  # seconds: sockets cannot wait as long as options can say
NEARLY_ALL = 0.95  # of a core: a generator that uses that much is the limit itself

Progress = Callable[[float], None]
"""Is told from time to time how many seconds have passed since the start."""


class LoadError(EchoError):
    """A process that makes the load ended, and nobody asked it to."""


@dataclass(kw_only=True)
class LoadResult:
    """What a load found. Times in seconds."""

    plan: LoadPlan
    interrupted: bool = False
    """Ctrl-C ended it early."""
    seconds: float = 0.0
    messages: int = 0
    """Answered within ``seconds``."""
    answered: int = 0
    """... and in the warm-up and after the end."""
    late: int = 0
    """Sent more than a millisecond after they were due, for whatever reason."""
    behind: int = 0
    """... because the generator came to them late, not because their connections had no room."""
    lost: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    mismatch: dict[str, Any] | None = None
    generator_cpu: list[float] = field(default_factory=list)
    """Of each process: the part of a core that it used."""
    service: Distribution
    """From sending to the last byte of the reply."""
    response: Distribution | None
    """From the moment a message was due; None in a closed loop, which knows no such moment."""

    @property
    def messages_per_second(self) -> float:
        return self.messages / self.seconds if self.seconds else 0.0

    @property
    def megabytes_per_second(self) -> float:
        """Of messages, in one direction: 10**6 bytes."""
        return self.messages_per_second * self.plan.size / 1e6

    @property
    def times(self) -> Distribution:
        """What counts as latency: the response time where there is one, else the service time."""
        return self.service if self.response is None else self.response

    @property
    def generator_was_the_limit(self) -> bool:
        """Whether the figures tell more of the load generator than of the server: no CPU left, or no time."""
        sent = max(1, self.times.count)
        return max(self.generator_cpu, default=0.0) > NEARLY_ALL or self.behind > sent / 100

    @property
    def everything_came_back(self) -> bool:
        return not (self.lost or self.failures or self.mismatch)


def find_server(host: str, port: int, uds: str | None, plan: LoadPlan) -> tuple[int, Any]:
    """The family and address of the server, which answers there. :exc:`~echo_async.ConnectError` if none does."""
    if uds == "":
        raise ConfigError("uds is empty: give the path of a Unix socket")
    name = uds or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    context = plan.tls_context()
    try:
        with _connect(host, port, uds, min(plan.timeout, LONGEST_WAIT)) as connected:
            found = int(connected.family), uds or connected.getpeername()
            if context is not None:
                assert plan.tls is not None
                context.wrap_socket(connected, server_hostname=plan.tls["server_hostname"]).close()
            return found
    except ssl.SSLError as error:
        raise ConnectError(f"cannot connect to {name}: TLS: {describe_error(error)}") from error
    except (OSError, UnicodeError) as error:
        why = f"no answer within {plan.timeout:g} s" if isinstance(error, TimeoutError) else describe_error(error)
        raise ConnectError(f"cannot connect to {name}: {why}; is the server running there?") from error


def _connect(host: str, port: int, uds: str | None, seconds: float) -> socket.socket:
    if uds is None:
        return socket.create_connection((host, port), seconds)
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(seconds)
        connected.connect(uds)
    except BaseException:
        connected.close()
        raise
    return connected


def run_load(plan: LoadPlan, progress: Progress | None = None, cpus: Sequence[int] = ()) -> LoadResult:
    """Run the load in processes of its own, on ``cpus`` if any are named; Ctrl-C ends it early, with what there is."""
    with ExitStack() as stack:
        workers = []
        first = 0
        for share in plan.split():
            workers.append(stack.enter_context(Worker(share, first, cpus)))
            first += share.connections
        for worker in workers:
            worker.wait_ready()
        start = perf_counter() + HEAD_START
        for worker in workers:
            worker.start(start)
        interrupted = _wait(workers, start, start + plan.warmup + plan.duration, progress)
        return _merge_results(plan, [worker.result() for worker in workers], interrupted)


class Worker:
    """A process that makes a part of the load; killed, if need be, at the end of the block."""

    def __init__(self, plan: LoadPlan, first: int, cpus: Sequence[int]) -> None:
        command = [sys.executable, "-m", f"{__package__}.worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if cpus:
            os.sched_setaffinity(self._process.pid, cpus)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self.out = self._process.stdin, self._process.stdout
        self._say(json.dumps({"plan": plan.as_json(), "first": first}))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(OSError):
            self._in.close()
        self.out.close()
        if kind is not None:
            self._process.kill()
        try:
            self._process.wait(END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it ended: the next word from it will be missing
            self._in.write(line.encode() + b"\n")
            self._in.flush()

    def wait_ready(self) -> None:
        if self.out.readline() != b"ready\n":
            raise self._ended()

    def start(self, moment: float) -> None:
        self._say(repr(moment))

    def stop(self) -> None:
        """End the measurement now; there will be a result."""
        self._say("stop")

    def result(self) -> tuple[dict[str, Any], bytes, bytes, bytes]:
        line = self.out.readline()
        if not line:
            raise self._ended()
        return read_results(line, self.out.read)

    def _ended(self) -> LoadError:
        return LoadError(f"a process of the load ended by itself with {self._process.wait()}; try fewer --connections")


def _wait(workers: Sequence[Worker], start: float, end: float, progress: Progress | None) -> bool:
    """Until a worker has something to say. Before the end that is a byte that differs: then the others stop as well.

    Returns whether Ctrl-C ended it.
    """
    interrupted = False
    try:
        while not select.select([worker.out for worker in workers], (), (), TICK)[0]:
            if progress is not None:
                progress(perf_counter() - start)
    except KeyboardInterrupt:
        interrupted = True
    if perf_counter() < end:
        for worker in workers:
            worker.stop()
    return interrupted


def _merge_results(
    plan: LoadPlan, results: Sequence[tuple[dict[str, Any], bytes, bytes, bytes]], interrupted: bool
) -> LoadResult:
    import numpy as np

    facts = [result[0] for result in results]
    service = np.frombuffer(b"".join(result[1] for result in results), dtype=np.float64)
    waits = np.frombuffer(b"".join(result[2] for result in results), dtype=np.float64)
    counts = np.frombuffer(b"".join(result[3] for result in results), dtype=np.uint64)
    open_loop = plan.rate is not None
    return LoadResult(
        plan=plan,
        interrupted=interrupted,
        seconds=max(each["seconds"] for each in facts),
        messages=sum(each["in_window"] for each in facts),
        answered=sum(each["answered"] for each in facts),
        late=int((waits > LATE).sum()) if open_loop else 0,
        behind=sum(each["behind"] for each in facts),
        lost=sum(each["lost"] for each in facts),
        failures=sum((Counter(each["failures"]) for each in facts), Counter[str]()),
        mismatch=next((each["mismatch"] for each in facts if each["mismatch"]), None),
        generator_cpu=[each["cpu_seconds"] / max(each["seconds"], 1e-9) for each in facts],
        service=Distribution(service, counts),
        response=Distribution(service + waits, counts) if open_loop else None,
    )
