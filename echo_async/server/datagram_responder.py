"""Answers datagrams (RFC 862), for every engine.

It reads the sockets itself instead of through a :class:`asyncio.DatagramProtocol`, which has no ancillary data, no
limit per turn of the loop, and no way to answer what has arrived before it is closed.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from ..compat import ANCILLARY_SIZE, find_reply_source, format_reply_source, receive_message
from ..errors import describe_error
from ..net import UNSPECIFIED, format_address
from ..wire.datagrams import RECEIVE_SIZE, REFUSALS, Refusals, SocketAddress, is_marked
from ..wire.script import EchoScript, Report, Send, Wait
from .admission import Admission

BATCH = 32  # datagrams of one socket before other events get their turn
GROWTH_INTERVAL = 4  # calls that answer one datagram each until one looks for a second
DRAIN_BATCHES = 256  # of each socket at a stop: more than a receive buffer holds
MAX_DELAYED_SIZE = 2**24  # bytes of memory for delayed replies
DELAYED_OVERHEAD = 640  # bytes of memory of a delayed reply, besides its own


class ReplyRoute(NamedTuple):
    """How a datagram is answered: from the address that it was sent to (RFC 1123 section 4.1.3.5)."""

    sender: socket.socket
    peer: SocketAddress
    source: list[Any]  # ancillary data; empty if the system selects the source address

    def send(self, reply: bytes) -> None:
        if self.source:
            try:
                self.sender.sendmsg([reply], self.source, 0, self.peer)
                return
            except OSError:  # one cannot send from a broadcast address, for instance
                pass
        self.sender.sendto(reply, self.peer)

    def get_extra_info(self, name: str) -> Any:
        """Return ``sockname`` or ``peername``."""
        if name == "sockname":
            host, *rest = self.sender.getsockname()
            return (format_reply_source(self.source) or host, *rest)
        return self.peer if name == "peername" else None


class DatagramResponder:
    """Answers the datagrams of one server, each with a fault plan of its own if there are any. Used by one thread."""

    def __init__(self, admission: Admission, sockets: Sequence[socket.socket]) -> None:
        config = admission.config
        self.sockets = sockets
        self.context = admission.registry
        self._counters = self.context.counters.datagrams
        self._refusals = Refusals(config.udp_allow_from, [each.getsockname()[1] for each in sockets])
        self._schedule = None if admission.scripts is None else admission.scripts.datagram_schedule()
        self._delayed: list[tuple[float, int, int | None, bytes, ReplyRoute]] = []  # a heap, by time and number
        self._delayed_size = 0
        self._numbers = count()
        self._identifies = config.mode == "identify"
        is_on_all_addresses = any(each.getsockname()[0] in UNSPECIFIED for each in sockets)
        is_changed = self._identifies or self._schedule is not None or self.context.on_datagram is not None
        self._is_plain = not (is_changed or is_on_all_addresses or self.context.log_messages)
        self._expected = 1  # datagrams that one call answers
        self._full_calls = 0  # that answered as many as expected
        self._log_refused = self.context.limit_log("%s datagram refused: %s")

    def receive(self, receiver: socket.socket) -> bool:
        """Answer what has arrived, at most ``BATCH`` datagrams; return whether there may be more.

        It expects as many as the last time, since to find that there are no more takes as long as half of a reply.
        """
        counters, refusals, is_plain, received = self._counters, self._refusals, self._is_plain, 0
        while received < self._expected:
            try:
                data, ancillary, _, source = receive_message(receiver, RECEIVE_SIZE, ANCILLARY_SIZE)
            except BlockingIOError:
                self._expected = max(1, received)
                return False
            except OSError as error:  # Windows: an earlier reply was refused by its receiver
                self.refuse(None, "send", error)
                return False
            received += 1
            try:
                reason = "loop" if is_marked(ancillary) else refusals[source]
                if reason is not None:
                    self.refuse(source, reason)
                elif is_plain:
                    size = len(data)
                    counters.answered += 1
                    counters.received += size
                    counters.sent += size
                    try:
                        receiver.sendto(data, source)
                    except OSError as error:
                        self._lose(data, source, error, len(data))
                else:
                    self._answer(receiver, data, source, ancillary)
            except Exception as error:  # the others have to be answered too
                self.context.fail(format_address(source), error)
        self._full_calls += 1
        if received > 1 or self._full_calls % GROWTH_INTERVAL == 0:
            self._expected = min(2 * received, BATCH)
        return True

    def _answer(self, receiver: socket.socket, data: bytes, source: SocketAddress, ancillary: list[Any]) -> None:
        route = ReplyRoute(receiver, source, find_reply_source(ancillary))
        reply = self._identify(data, route) if self._identifies else data
        if len(reply) > len(data):
            return self.refuse(source, "size")
        if self.context.on_datagram is not None:
            self.context.on_datagram(data)
        self._counters.answered += 1
        self._counters.received += len(data)
        if self.context.log_messages:
            self.context.log_message(format_address(source), data, "datagram: ")
        plan = None if self._schedule is None else self._schedule.next_plan()
        if plan is None:
            return self._send(reply, route, len(data))
        from ..wire.faults import FaultScript  # only for a server with faults

        delay = 0.0
        received: int | None = len(data)
        for action in FaultScript(plan, EchoScript(is_raw=True), is_raw=True).reply_datagram(reply):
            match action:
                case Report():
                    self.context.report(format_address(route.peer), action)
                case Wait(seconds):
                    delay = seconds
                case Send(reply):
                    if delay:
                        self._delay(delay, reply, route, received)
                    else:
                        self._send(reply, route, received)
                    received = None

    def _send(self, reply: bytes, route: ReplyRoute, received: int | None) -> None:
        """Send a reply to a datagram of ``received`` bytes; None for another reply to the same one."""
        self._counters.sent += len(reply)  # before it arrives: its receiver finds it counted
        try:
            route.send(reply)
        except OSError as error:
            self._lose(reply, route.peer, error, received)

    def _lose(self, reply: bytes, source: SocketAddress, error: OSError, received: int | None) -> None:
        """Count a reply that the system does not take, also if its buffer is full: UDP does not wait."""
        self._counters.sent -= len(reply)
        if received is not None:
            self._counters.answered -= 1
            self._counters.received -= received
        self.refuse(source, "send", error)

    def _identify(self, data: bytes, route: ReplyRoute) -> bytes:
        """Return the reply to the message in ``data``: up to its first newline, what follows makes room."""
        from .scripts import describe_connection  # only for the mode identify

        describer = describe_connection(self.context.config, None, None, route.get_extra_info)
        return describer.describe(data[: data.find(b"\n") + 1] or data + b"\n", self._counters.answered + 1)

    def _delay(self, seconds: float, reply: bytes, route: ReplyRoute, received: int | None) -> None:
        size = len(reply) + DELAYED_OVERHEAD
        if self._delayed_size + size > MAX_DELAYED_SIZE:
            return self.refuse(route.peer, "limit")
        self._delayed_size += size
        heappush(self._delayed, (self.context.now() + seconds, next(self._numbers), received, reply, route))

    def send_due(self) -> float | None:
        """Send the delayed replies that are due; return the seconds until the next is, None if there is none."""
        while self._delayed:
            seconds = self._delayed[0][0] - self.context.now()
            if seconds > 0:
                return seconds
            self._send_next()
        return None

    def _send_next(self) -> None:
        _, _, received, reply, route = heappop(self._delayed)
        self._delayed_size -= len(reply) + DELAYED_OVERHEAD
        try:
            self._send(reply, route, received)
        except Exception as error:  # the others have to be sent too
            self.context.fail(format_address(route.peer), error)

    def refuse(self, source: SocketAddress | None, reason: str, error: OSError | None = None) -> None:
        self._counters.refused[reason] += 1
        text = REFUSALS[reason] if error is None else f"{REFUSALS[reason]}: {describe_error(error)}"
        self._log_refused(format_address(source), text)

    def drain(self) -> None:
        """Answer what has arrived without delays, before the sockets are closed. What arrives meanwhile may be lost."""
        for each in self.sockets:
            for _ in range(DRAIN_BATCHES):
                if not self.receive(each):
                    break
        while self._delayed:
            self._send_next()
