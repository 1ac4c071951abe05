"""When messages are sent.

A closed loop sends the next message when a reply is there: a server that stops for a while stops its load
as well, and only the few messages in flight show it (coordinated omission). An open loop sends by the
clock, as clients do who know nothing of each other: each message has the moment at which it is due, and
waits, with the time running, where its connection has no room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from .connection import Connection
from .recorder import LATE, Recorder

__all__ = ["ClosedLoop", "OpenLoop", "Schedule"]

ROUNDING = 1e-3  # of a message
AT_ONCE = 1000  # messages that may be due until replies are looked at again


class Schedule(Protocol):
    """What a generator and its connections ask of it."""

    def begin(self, connections: Sequence[Connection], start: float, end: float) -> None:
        """The first messages over ``connections``, at ``start``; the last before ``end``."""

    def dispatch(self, now: float) -> float:
        """Send what is due, and tell when the next one is."""

    def opened(self, connection: Connection) -> None:
        """``connection`` is usable, from now or again."""

    def room(self, connection: Connection, count: int, now: float) -> None:
        """So many messages came back on ``connection``."""

    def stop(self) -> int:
        """Nothing new from now on; how many messages were due, and it never came to them."""


class ClosedLoop:
    """Each connection keeps ``pipeline`` messages in flight."""

    def __init__(self, pipeline: int) -> None:
        self._pipeline = pipeline
        self._running = False

    def begin(self, connections: Sequence[Connection], start: float, end: float) -> None:
        self._running = True
        for connection in connections:
            if connection.usable:
                self.opened(connection)

    def dispatch(self, now: float) -> float:
        return math.inf

    def opened(self, connection: Connection) -> None:
        self.room(connection, self._pipeline, perf_counter())

    def room(self, connection: Connection, count: int, now: float) -> None:
        if self._running:
            connection.send(now, now, count)

    def stop(self) -> int:
        self._running = False
        return 0


class OpenLoop:
    """``rate`` messages a second, evenly; in turn over the connections, each with up to ``pipeline`` in flight."""

    def __init__(self, pipeline: int, rate: float, recorder: Recorder) -> None:
        self._connections: Sequence[Connection] = ()
        self._pipeline = pipeline
        self._rate = rate
        self._recorder = recorder
        self._start = self._end = math.inf
        self._number = 0

    def begin(self, connections: Sequence[Connection], start: float, end: float) -> None:
        self._connections = connections
        self._start, self._end = start, end

    def dispatch(self, now: float) -> float:
        for _ in range(AT_ONCE):
            due = self._start + self._number / self._rate  # from the start each time: errors do not add up
            if due >= self._end:
                return math.inf
            if due > now:
                return due
            connection = self._connections[self._number % len(self._connections)]
            self._number += 1
            self._recorder.scheduled(late=now - due > LATE)
            connection.waiting.append(due)
            self.opened(connection)
        return now

    def opened(self, connection: Connection) -> None:
        """Send what waits, as far as there is room."""
        if not connection.usable or not connection.waiting:
            return
        room = self._pipeline - len(connection.in_flight)  # each entry is one message here
        if room <= 0:
            return
        now = perf_counter()
        for _ in range(min(room, len(connection.waiting))):
            connection.send(connection.waiting.popleft(), now, 1)

    def room(self, connection: Connection, count: int, now: float) -> None:
        self.opened(connection)

    def stop(self) -> int:
        end = min(self._end, perf_counter())
        self.dispatch(end)
        self._end = -math.inf
        return max(0, math.ceil((end - self._start) * self._rate - self._number - ROUNDING))
