"""The load of one process: its connections on one poller, and the clock.

It uses no event loop: an event loop's timers have a resolution of a millisecond. A message is sent within
about 50 µs of its due time.
"""

import heapq
import math
import select
from collections.abc import Callable, Sequence
from itertools import count
from time import perf_counter

from .connection import LoadConnection, LoadContext, SocketFactory, TcpConnection
from .datagram_connection import DatagramConnection
from .pattern import MAX_IO_SIZE, Batches, Pattern
from .plan import LoadPlan
from .poller import READ, Poller
from .recorder import Recorder
from .schedule import ClosedLoop, OpenLoop

MAX_SLEEP = 1.0  # seconds
MIN_READ_SIZE = 4096  # bytes
CONNECT_BATCH = 100  # connections opened at once: with more, the server's accept queue can overflow


class LoadGenerator:
    """The load of one process. ``first`` is the number of its first connection, counted over all processes."""

    def __init__(self, plan: LoadPlan, *, first: int = 0) -> None:
        self._plan = plan
        self._recorder = Recorder(is_open_loop=plan.rate is not None)
        self._poller = Poller()
        self._schedule: ClosedLoop | OpenLoop = (
            ClosedLoop(plan.pipeline, plan.pause, self._call_later)
            if plan.rate is None
            else OpenLoop(plan.max_in_flight, plan.rate, self._recorder)
        )
        pattern = Pattern(plan.size)
        context = LoadContext(
            plan=plan,
            pattern=pattern,
            batches=Batches(pattern.view, plan.size * plan.pipeline),
            buffer=memoryview(bytearray(min(MAX_IO_SIZE, max(MIN_READ_SIZE, plan.size * plan.pipeline)))),
            recorder=self._recorder,
            sockets=SocketFactory(plan, has_sources=plan.mode == "message"),
            poller=self._poller,
            wrap_tls=plan.tls_wrapper(),
            call_later=self._call_later,
            on_usable=self._schedule.on_usable,
            on_replies=self._schedule.on_replies,
        )
        create: Callable[[LoadContext, int], LoadConnection] = DatagramConnection if plan.udp else TcpConnection
        self._connections = [create(context, first + number) for number in range(plan.connections)]
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_numbers = count()
        self._is_timed = plan.rate is not None or plan.pause > 0

    def connect(self) -> None:
        """Open the connections. One that is not established within the timeout is retried during the load."""
        if self._plan.mode == "message":
            for connection in self._connections:
                connection.is_usable = True
            return
        deadline = perf_counter() + self._plan.timeout
        for start in range(0, len(self._connections), CONNECT_BATCH):
            batch = self._connections[start : start + CONNECT_BATCH]
            for connection in batch:
                connection.open()
            self._run_until(deadline, _all_usable(batch))

    def stop_on_input(self, descriptor: int) -> None:
        """Stop the load at input or end of input on ``descriptor``."""
        self._poller.register(descriptor, READ, self._stop)

    def run(self, start: float) -> Recorder:
        """Warm up from ``start`` (of ``time.perf_counter``), measure, and wait for the outstanding replies."""
        measure = start + self._plan.warmup
        end = measure + self._plan.duration
        self._run_until(start)
        self._schedule.start(self._connections, start, end)
        self._run_until(measure)
        self._recorder.end_warmup()
        self._run_until(end)
        self._recorder.end_window()
        if undispatched := self._schedule.stop():
            self._recorder.add_loss("load generator could not keep up with the rate", undispatched)
        self._run_until(perf_counter() + self._plan.timeout, self._is_idle)
        self._run_timers(perf_counter())  # a busy machine may be late for the last timeouts
        self._record_unanswered()
        self.close()
        return self._recorder

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._poller.close()

    def _call_later(self, delay: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (perf_counter() + delay, next(self._timer_numbers), callback))

    def _stop(self) -> None:
        self._recorder.is_stopped = True

    def _is_idle(self) -> bool:
        return not any(each.in_flight or each.queued for each in self._connections)

    def _run_until(self, deadline: float, is_done: Callable[[], bool] | None = None) -> None:
        """Send and receive until ``deadline``, until ``is_done()``, or until the load is stopped."""
        poll, callbacks, timers, recorder = self._poller.poll, self._poller.callbacks, self._timers, self._recorder
        while (now := perf_counter()) < deadline and not recorder.is_stopped:
            if is_done is not None and is_done():
                return
            timeout = self._run_due(now, deadline) if timers or self._is_timed else deadline - now
            for descriptor, _ in poll(timeout if timeout < MAX_SLEEP else MAX_SLEEP):
                callbacks[descriptor]()

    def _run_due(self, now: float, deadline: float) -> float:
        """Send the messages and call the timers that are due; return the seconds to wait for replies."""
        due = min(deadline, self._schedule.dispatch(now), self._run_timers(now))
        timeout = max(0.0, due - perf_counter())
        if self._is_timed and (descriptor := self._poller.fileno()) >= 0:
            select.select([descriptor], (), (), min(timeout, MAX_SLEEP))  # microseconds; epoll_wait has milliseconds
            return 0.0
        return timeout

    def _run_timers(self, now: float) -> float:
        """Call the timers that are due; return the time of the next one."""
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        return self._timers[0][0] if self._timers else math.inf

    def _record_unanswered(self) -> None:
        unanswered = sum(each.unanswered + len(each.queued) for each in self._connections)
        if unanswered:
            self._recorder.add_loss(
                f"reply timeout: no reply within {self._plan.timeout:g} s after the end", unanswered
            )


def _all_usable(connections: Sequence[LoadConnection]) -> Callable[[], bool]:
    return lambda: all(each.is_usable for each in connections)
