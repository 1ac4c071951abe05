"""The times at which messages are sent: closed loop or open loop.

A closed loop sends the next message when a reply arrives. A server that pauses also pauses its load, so that only
the few messages in flight are slow (coordinated omission). An open loop sends by the clock, like
independent clients: each message has a due time, and its response time includes waiting for room in the pipeline.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from .connection import LoadConnection
from .recorder import LATE_THRESHOLD, Recorder

ROUNDING_TOLERANCE = 1e-3  # of a message
DISPATCH_BATCH = 1000  # due messages that are sent before replies are read again


class ClosedLoop:
    """Keeps ``pipeline`` messages in flight on each connection, apart from ``pause`` seconds after a reply."""

    def __init__(self, pipeline: int, pause: float, call_later: Callable[[float, Callable[[], None]], None]) -> None:
        self._pipeline = pipeline
        self._pause = pause
        self._call_later = call_later
        self._is_running = False
        self._connections: Sequence[LoadConnection] = ()

    def start(self, connections: Sequence[LoadConnection], start: float, end: float) -> None:
        """Send messages on ``connections`` from ``start`` until ``end``."""
        self._is_running = True
        self._connections = connections
        for connection in connections:
            connection.is_looping = not self._pause
            if connection.is_usable:
                self.on_usable(connection)

    def dispatch(self, now: float) -> float:
        """Send the messages that are due; return the time of the next one."""
        return math.inf

    def on_usable(self, connection: LoadConnection) -> None:
        """``connection`` is established, for the first time or again."""
        self._send(connection, self._pipeline)

    def on_replies(self, connection: LoadConnection, count: int, now: float) -> None:
        if self._pause:
            self._call_later(self._pause, partial(self._send, connection, count))
        elif self._is_running:
            connection.send(now, now, count)

    def _send(self, connection: LoadConnection, count: int) -> None:
        if self._is_running and connection.is_usable:
            now = perf_counter()
            connection.send(now, now, count)

    def stop(self) -> int:
        """Send no more messages; return how many were due and were never dispatched."""
        self._is_running = False
        for connection in self._connections:
            connection.is_looping = False
        return 0


class OpenLoop:
    """Sends ``rate`` messages per second, round-robin over the connections, each with up to ``pipeline`` in flight."""

    def __init__(self, pipeline: int, rate: float, recorder: Recorder) -> None:
        self._connections: Sequence[LoadConnection] = ()
        self._pipeline = pipeline
        self._rate = rate
        self._recorder = recorder
        self._start = self._end = math.inf
        self._dispatched = 0

    def start(self, connections: Sequence[LoadConnection], start: float, end: float) -> None:
        self._connections = connections
        self._start, self._end = start, end

    def dispatch(self, now: float) -> float:
        for _ in range(DISPATCH_BATCH):
            due = self._start + self._dispatched / self._rate  # from the start each time: errors do not add up
            if due >= self._end:
                return math.inf
            if due > now:
                return due
            connection = self._connections[self._dispatched % len(self._connections)]
            self._dispatched += 1
            if now - due > LATE_THRESHOLD:
                self._recorder.late_by_generator += 1
            connection.queued.append(due)
            self.on_usable(connection)
        return now

    def on_usable(self, connection: LoadConnection) -> None:
        if not connection.is_usable or not connection.queued:
            return
        room = self._pipeline - len(connection.in_flight)  # each entry is one message here
        if room <= 0:
            return
        now = perf_counter()
        for _ in range(min(room, len(connection.queued))):
            connection.send(connection.queued.popleft(), now, 1)

    def on_replies(self, connection: LoadConnection, count: int, now: float) -> None:
        self.on_usable(connection)

    def stop(self) -> int:
        end = min(self._end, perf_counter())
        self.dispatch(end)
        self._end = -math.inf
        return max(0, math.ceil((end - self._start) * self._rate - self._dispatched - ROUNDING_TOLERANCE))
