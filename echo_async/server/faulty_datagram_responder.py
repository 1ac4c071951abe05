"""Answers datagrams with faults."""

import socket
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count

from ..net import format_address
from ..wire.faults import FaultSchedule, FaultScript
from ..wire.script import EchoScript, Report, Send, Wait
from .admission import Admission
from .datagram_responder import DatagramResponder, ReplyRoute

MAX_DELAYED_SIZE = 2**24  # bytes of memory for delayed replies
DELAYED_OVERHEAD = 640  # bytes of memory of a delayed reply, besides its own


class FaultyDatagramResponder(DatagramResponder):
    """Each datagram has a plan of its own, by its number."""

    has_faults = True

    def __init__(self, schedule: FaultSchedule, admission: Admission, sockets: Sequence[socket.socket]) -> None:
        super().__init__(admission, sockets)
        self._schedule = schedule
        self._delayed: list[tuple[float, int, bytes, ReplyRoute]] = []  # a heap, by time and number
        self._delayed_size = 0
        self._numbers = count()

    def send(self, reply: bytes, route: ReplyRoute) -> None:
        plan = self._schedule.next_plan()
        if plan is None:
            return super().send(reply, route)
        delay = 0.0
        for action in FaultScript(plan, EchoScript(is_raw=True), is_raw=True).reply_datagram(reply):
            match action:
                case Report():
                    self.context.report(format_address(route.peer), action)
                case Wait(seconds):
                    delay = seconds
                case Send(data) if delay:
                    self._delay(delay, data, route)
                case Send(data):
                    super().send(data, route)

    def _delay(self, seconds: float, reply: bytes, route: ReplyRoute) -> None:
        size = len(reply) + DELAYED_OVERHEAD
        if self._delayed_size + size > MAX_DELAYED_SIZE:
            return self.refuse(route.peer, "limit")
        self._delayed_size += size
        heappush(self._delayed, (self.context.now() + seconds, next(self._numbers), reply, route))

    def send_due(self) -> float | None:
        while self._delayed:
            seconds = self._delayed[0][0] - self.context.now()
            if seconds > 0:
                return seconds
            self._send_next()
        return None

    def send_delayed(self) -> None:
        while self._delayed:
            self._send_next()

    def _send_next(self) -> None:
        _, _, reply, route = heappop(self._delayed)
        self._delayed_size -= len(reply) + DELAYED_OVERHEAD
        try:
            super().send(reply, route)
        except Exception as error:  # the others have to be sent too
            self.context.fail(format_address(route.peer), error)
