"""One process of a load: its connections on one selector, the clock, and what they saw.

No event loop: what is measured here is compared in microseconds, and an event loop's timers tick in
milliseconds. A message is sent when its time has come to within some 50 us.
"""

from __future__ import annotations

import heapq
import math
import resource
import select
import selectors
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from time import perf_counter

from .connection import Connection
from .pattern import Pattern
from .plan import LoadPlan
from .recorder import Recorder
from .schedule import ClosedLoop, OpenLoop, Schedule

__all__ = ["LoadGenerator", "raise_descriptor_limit"]

LONGEST_SLEEP = 1.0
AT_ONCE = 100  # connections that are opened: more than a server's queue has room for would wait for a second
LOOPBACK_SOURCES = 32  # addresses to connect from, so that message mode does not run out of ports

IP_BIND_ADDRESS_NO_PORT = 24  # Linux; the socket module has no name for it


class LoadGenerator:
    """The load of one process. ``first`` is the number of its first connection among those of all processes."""

    def __init__(self, plan: LoadPlan, *, first: int = 0) -> None:
        self.plan = plan
        self.pattern = Pattern(plan.size)
        self.recorder = Recorder()
        self.tls = plan.tls_context()
        self.selector = selectors.DefaultSelector()
        self.schedule: Schedule = (
            ClosedLoop(plan.pipeline) if plan.rate is None else OpenLoop(plan.pipeline, plan.rate, self.recorder)
        )
        self._connections = [Connection(self, first + number) for number in range(plan.connections)]
        self._stopped = False
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = count()
        self._sources = _sources(plan)
        self._number = getattr(self.selector, "fileno", lambda: -1)()  # a selector of old kinds has none

    def connect(self) -> None:
        """Open the connections. What cannot be opened within the time-out is left to be tried again."""
        if self.plan.mode == "message":
            for connection in self._connections:
                connection.usable = True
            return
        give_up = perf_counter() + self.plan.timeout
        for begin in range(0, len(self._connections), AT_ONCE):
            wave = self._connections[begin : begin + AT_ONCE]
            for connection in wave:
                connection.open()
            self._until(give_up, _all_usable(wave))

    def stop_on(self, descriptor: int) -> None:
        """Whatever comes there, or its end, stops the load."""
        self.selector.register(descriptor, selectors.EVENT_READ, self._stop)

    def run(self, start: float) -> Recorder:
        """Load from ``start`` on (of ``time.perf_counter``): warm up, measure, wait for what is still to come."""
        _sleep_precisely()
        measure = start + self.plan.warmup
        end = measure + self.plan.duration
        self._until(start)
        self.schedule.begin(self._connections, start, end)
        self._until(measure)
        self.recorder.restart()
        self._until(end)
        self.recorder.end_window()
        never = self.schedule.stop()
        if never:
            self.lost("the generator could not keep up with the rate", never)
        self._until(perf_counter() + self.plan.timeout, self._idle)
        self._give_up()
        self._close()
        return self.recorder

    def new_socket(self, number: int) -> socket.socket:
        made = socket.socket(self.plan.family)
        made.setblocking(False)
        if self.plan.family != socket.AF_UNIX:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._sources:
            made.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            made.bind((self._sources[(number + next(self._ties)) % len(self._sources)], 0))
        return made

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._later, (perf_counter() + seconds, next(self._ties), callback))

    def lost(self, why: str, messages: int) -> None:
        if not self._stopped:
            self.recorder.lost += messages
            self.recorder.failures[why] += 1

    def differs(self, connection: int, message: int, offset: int, what: str) -> None:
        """A byte is not what was sent: there is nothing more to measure."""
        self.recorder.mismatch = {"connection": connection, "message": message, "offset": offset, "what": what}
        self._stopped = True

    def _stop(self, _: int) -> None:
        self._stopped = True

    def _idle(self) -> bool:
        return not any(each.in_flight or each.waiting for each in self._connections)

    def _until(self, moment: float, done: Callable[[], bool] | None = None) -> None:
        """Carry messages until ``moment``, or until it is ``done``, or stopped."""
        dispatch, poll = self.schedule.dispatch, self._poll
        while (now := perf_counter()) < moment and not self._stopped:
            if done is not None and done():
                return
            due = min(moment, dispatch(now))
            if self._later:
                due = min(due, self._call_later(now))
            for key, events in poll(due):
                key.data(events)

    def _poll(self, due: float) -> Sequence[tuple[selectors.SelectorKey, int]]:
        """What is ready; nothing, when ``due`` has come."""
        wait = max(0.0, min(due - perf_counter(), LONGEST_SLEEP))
        if self.plan.rate is not None and self._number >= 0:
            select.select([self._number], (), (), wait)  # to the microsecond; epoll_wait counts milliseconds
            wait = 0.0
        return self.selector.select(wait)

    def _call_later(self, now: float) -> float:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        return self._later[0][0] if self._later else math.inf

    def _give_up(self) -> None:
        """What has no reply by now is lost."""
        unanswered = sum(sum(entry[2] for entry in each.in_flight) + len(each.waiting) for each in self._connections)
        if unanswered:
            self.lost(f"no reply within {self.plan.timeout:g} s after the end", unanswered)

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()
        self.selector.close()


def _all_usable(connections: Sequence[Connection]) -> Callable[[], bool]:
    return lambda: all(each.usable for each in connections)


def _sources(plan: LoadPlan) -> Sequence[str]:
    """Addresses to connect from, in turn: on loopback, where a connection a message would use up the ports of one."""
    loopback = plan.family == socket.AF_INET and str(plan.address[0]).startswith("127.")
    if plan.mode != "message" or not loopback or sys.platform != "linux":
        return ()
    return [f"127.0.1.{number}" for number in range(1, 1 + LOOPBACK_SOURCES)]


def _sleep_precisely() -> None:
    """Linux lets a sleep last 50 us longer than asked for, to save power, unless it is told not to."""
    with suppress(OSError):
        Path("/proc/self/timerslack_ns").write_text("1")


def raise_descriptor_limit() -> None:
    """As many descriptors as this process may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
