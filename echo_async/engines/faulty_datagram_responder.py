"""Answers datagrams with faults."""

import socket
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count

from ..datagrams import SocketAddress
from ..faults import FaultSchedule, Report, Send, Wait
from ..net import format_address
from .admission import Admission
from .datagram_responder import DatagramResponder

MAX_DELAYED_SIZE = 2**24  # bytes of memory for delayed replies
DELAYED_OVERHEAD = 256  # bytes of memory of a delayed reply, besides its own


class FaultyDatagramResponder(DatagramResponder):
    """Each datagram has a plan of its own, by its number."""

    has_faults = True

    def __init__(self, schedule: FaultSchedule, admission: Admission, sockets: Sequence[socket.socket]) -> None:
        super().__init__(admission, sockets)
        self._schedule = schedule
        self._delayed: list[tuple[float, int, socket.socket, bytes, SocketAddress]] = []  # a heap, by time and number
        self._delayed_size = 0
        self._numbers = count()

    def send(self, receiver: socket.socket, reply: bytes, source: SocketAddress) -> None:
        plan = self._schedule.next_plan()
        if plan is None:
            return super().send(receiver, reply, source)
        delay = 0.0
        for action in plan.reply_datagram(reply):
            match action:
                case Report():
                    self.context.report_fault(format_address(source), action)
                case Wait(seconds):
                    delay = seconds
                case Send(data) if delay:
                    self._delay(delay, receiver, data, source)
                case Send(data):
                    super().send(receiver, data, source)

    def _delay(self, seconds: float, receiver: socket.socket, reply: bytes, source: SocketAddress) -> None:
        size = len(reply) + DELAYED_OVERHEAD
        if self._delayed_size + size > MAX_DELAYED_SIZE:
            return self.refuse(source, "limit")
        self._delayed_size += size
        heappush(self._delayed, (self.context.now() + seconds, next(self._numbers), receiver, reply, source))

    def send_due(self) -> float | None:
        while self._delayed:
            seconds = self._delayed[0][0] - self.context.now()
            if seconds > 0:
                return seconds
            self._send_next()
        return None

    def release(self) -> None:
        while self._delayed:
            self._send_next()

    def _send_next(self) -> None:
        _, _, receiver, reply, source = heappop(self._delayed)
        self._delayed_size -= len(reply) + DELAYED_OVERHEAD
        super().send(receiver, reply, source)
