"""What a comparison can run beside the clients that it measures: a flood from one client, or idle connections."""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

from ..client.endpoint import refuse_self_connection
from ..compat import descriptor_limit, raise_descriptor_limit
from ..errors import ConfigError, EchoError, describe_error
from .connection import SocketFactory
from .generator import CONNECT_BATCH
from .load import WorkerProcess, merge_results
from .plan import LoadPlan
from .result import LoadResult

FLOOD_SIZE = 20  # bytes per message
FLOOD_PIPELINE = 1_000_000  # messages in flight: more than all buffers between client and server hold
RESERVED_DESCRIPTORS = 100  # of this process and of the server
IDLE_MESSAGE = b"idle\n"

Finish = Callable[[], LoadResult | None]
"""Ends a disturbance; returns what a flood received. Raises :exc:`~echo_async.EchoError` if it was not served."""


@dataclass(frozen=True)
class Disturbance:
    """A flood, or a number of idle connections."""

    idle: int = 0
    """The number of idle connections; 0: a flood."""

    @classmethod
    def parse(cls, text: str) -> Disturbance:
        """Raise :exc:`~echo_async.ConfigError` unless ``text`` is ``flood`` or ``idle=N``."""
        if text == "flood":
            return cls()
        name, _, number = text.partition("=")
        limit = max_idle_connections()
        if name == "idle" and number.isascii() and number.isdecimal() and 1 <= int(number) <= limit:
            return cls(int(number))
        raise ConfigError(
            f"invalid --disturb: {text!r} (must be flood, or idle=N with N from 1 to {limit}, "
            "for which there are descriptors)"
        )

    def __str__(self) -> str:
        return f"idle={self.idle}" if self.idle else "flood"

    def run(self, server: LoadPlan, cpus: Sequence[int]) -> AbstractContextManager[Finish]:
        """Disturb the server at the address in ``server`` within ``with``."""
        return open_idle_connections(server, self.idle) if self.idle else run_flood(server, cpus)


def max_idle_connections() -> int:
    """Raise the descriptor limit, also of servers that are started later; return how many connections it allows."""
    raise_descriptor_limit()
    return max(1, (descriptor_limit() or 2**31) - RESERVED_DESCRIPTORS)


@contextmanager
def run_flood(server: LoadPlan, cpus: Sequence[int]) -> Iterator[Finish]:
    """Run a client, in a process of its own, that sends without pause, and reads and compares all it gets."""
    flood = replace(server, connections=1, size=FLOOD_SIZE, pipeline=FLOOD_PIPELINE, pause=0.0)
    plan = replace(flood, warmup=0.0, duration=math.inf)
    with WorkerProcess(plan, 0, cpus) as worker:

        def finish() -> LoadResult:
            worker.send("stop")
            result = merge_results(plan, [worker.read_result()])
            if not result.is_complete:
                raise EchoError(f"the flood failed: {result.describe_failures()}")
            return result

        worker.wait_ready()
        worker.send(repr(perf_counter()))
        yield finish


@contextmanager
def open_idle_connections(server: LoadPlan, number: int) -> Iterator[Finish]:
    """Open connections that are silent after one message and its reply, which shows that the server accepted them."""
    sockets = SocketFactory(server, has_sources=True)
    opened = select.poll()  # for the end of their input

    def finish() -> None:
        if closed := len(opened.poll(0)):
            raise EchoError(f"the server closed {closed:,} of {number:,} idle connections")

    with ExitStack() as stack:
        try:
            for start in range(0, number, CONNECT_BATCH):
                batch = range(start, min(number, start + CONNECT_BATCH))
                for each in _exchange_messages([stack.enter_context(sockets.create(index)) for index in batch], server):
                    opened.register(each, select.POLLIN)
        except OSError as error:
            raise EchoError(f"cannot open {number:,} idle connections: {describe_error(error)}") from error
        yield finish


def _exchange_messages(clients: Sequence[socket.socket], server: LoadPlan) -> Sequence[socket.socket]:
    for client in clients:
        client.settimeout(server.timeout)
        client.connect(server.address)
        refuse_self_connection(client)
        client.sendall(IDLE_MESSAGE)
    for client in clients:
        if client.recv(len(IDLE_MESSAGE)) != IDLE_MESSAGE:
            raise ConnectionResetError("closed by the server")
    return clients
