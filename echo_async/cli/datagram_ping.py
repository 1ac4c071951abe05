"""``client --udp``: numbered datagrams, their round-trip times, and how many were lost on the way."""

import asyncio
import errno
import math
import socket
from collections import deque
from contextlib import suppress
from time import perf_counter
from typing import Any

from ..background import start_resolver
from ..client.datagram_tracker import MAX_PAYLOAD, MAX_PAYLOAD_IPV4, DatagramFormat, DatagramTracker, Reply
from ..client.endpoint import Endpoint, closed_on_error, log, refuse_self_connection
from ..errors import ConfigError, ConnectError, ReplyDifferent, ReplyLate
from ..net import AddressInfo, format_address
from .output import Output
from .ping import RoundTrips

SEND_RETRY_DELAY = 0.001  # seconds until a full send buffer is tried again


async def ping(endpoint: Endpoint, size: int, count: int, interval: float, output: Output) -> bool:
    """Send ``count`` datagrams of ``size`` bytes (0: until interrupted), ``interval`` seconds apart.

    Return whether each came back in time and nothing else was received. :exc:`ConnectError` if all addresses of the
    host refuse the first datagram; without an answer, the first address is used.
    """
    try:
        async with asyncio.timeout(endpoint.config.connect_timeout):
            *others, last = endpoint.numeric or await asyncio.wrap_future(start_resolver(endpoint.resolve))
    except (OSError, UnicodeError) as error:
        raise endpoint.connect_error(error, endpoint.config.connect_timeout) from error
    output.print_heading(f"ECHO {endpoint.name}: {size} bytes over UDP")
    for info in others:
        with suppress(ConnectError):
            return await _ping_address(endpoint, info, size, count, interval, output)
    return await _ping_address(endpoint, last, size, count, interval, output)


async def _ping_address(
    endpoint: Endpoint, info: AddressInfo, size: int, count: int, interval: float, output: Output
) -> bool:
    tracker = DatagramTracker(DatagramFormat(size), endpoint.config.timeout)
    try:
        connected = socket.socket(info[0], socket.SOCK_DGRAM)
        with closed_on_error(connected):
            connected.setblocking(False)
            connected.connect(info[4])
            refuse_self_connection(connected)
    except OSError as error:  # also if the kernel does not support the address family
        raise endpoint.connect_error(error, 0) from error
    log.debug("sending datagrams to %s", format_address(info[4]))
    transport, pinging = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: DatagramPing(endpoint, connected, tracker, output), sock=connected
    )
    try:
        await pinging.run(count, interval)
    except asyncio.CancelledError:  # Ctrl-C
        pass
    finally:
        transport.close()
        await pinging.closed
    pinging.print_summary()
    return not (tracker.lost or tracker.late or tracker.corrupted)


class DatagramPing(asyncio.DatagramProtocol):
    """Sends on a connected socket, and prints what is received. Callbacks print nothing: printing can raise."""

    def __init__(self, endpoint: Endpoint, connected: socket.socket, tracker: DatagramTracker, output: Output) -> None:
        self._endpoint = endpoint
        self._socket = connected
        self._tracker = tracker
        self._output = output
        self._trips = RoundTrips()
        self._unprinted_results: deque[Reply | OSError | int] = deque()  # an integer: the size of a corrupted datagram
        self._is_changed = asyncio.Event()
        self.closed = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, address: Any) -> None:
        reply = self._tracker.receive(data, perf_counter())
        self._unprinted_results.append(len(data) if reply is None else reply)
        self._is_changed.set()

    def error_received(self, error: Exception) -> None:
        assert isinstance(error, OSError)
        self._unprinted_results.append(error)
        self._is_changed.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)

    async def run(self, count: int, interval: float) -> None:
        """Send, and wait for each datagram until its reply or its timeout."""
        tracker, due, last = self._tracker, perf_counter(), count or math.inf
        while tracker.sent < last or tracker.in_flight:
            now = perf_counter()
            can_send = tracker.sent < last and tracker.can_send
            if can_send and due <= now:
                await asyncio.sleep(0 if self._send() else SEND_RETRY_DELAY)
                due = max(due + interval, now)
            else:
                times = [due] if can_send else []
                times += [] if tracker.deadline is None else [tracker.deadline]
                await self._wait(min(times) - now)
            self._print_results()

    def _send(self) -> bool:
        """Send the next datagram; return False if the send buffer is full.

        Not the transport sends: before Python 3.13, it does not send an empty datagram.
        """
        sent = perf_counter()
        try:
            self._socket.send(self._tracker.next_datagram())
        except BlockingIOError:
            return False
        except OSError as error:
            self._unprinted_results.append(error)  # perhaps that of an earlier datagram; then this one was not sent
        self._tracker.record_sent(sent)
        return True

    async def _wait(self, seconds: float) -> None:
        self._is_changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_changed.wait()

    def _print_results(self) -> None:
        name, size = self._endpoint.name, self._tracker.size
        while self._unprinted_results:
            match self._unprinted_results.popleft():
                case Reply() as reply:
                    if reply.seconds is not None:
                        self._trips.add(reply.seconds)
                    self._output.print_datagram(name, size, reply)
                case OSError() as error:
                    self._handle_error(error)
                case corrupted:
                    text = f"reply mismatch: received {corrupted} bytes that were not sent; is {name} an echo server?"
                    self._output.print_numbered_failure(ReplyDifferent(text, 0), None)
        timeout = self._endpoint.config.timeout
        for number in self._tracker.expire(perf_counter()):
            error = ReplyLate(f"reply timeout: no reply from {name} within {timeout:g} s")
            self._output.print_numbered_failure(error, number)

    def _handle_error(self, error: OSError) -> None:
        """Raise if this is the first result; else a datagram is lost: the oldest, because errors do not name it."""
        tracker = self._tracker
        if error.errno == errno.EMSGSIZE:
            limit = f"a datagram has at most {MAX_PAYLOAD_IPV4} bytes over IPv4, {MAX_PAYLOAD} over IPv6"
            where = f"{tracker.size} bytes to {self._endpoint.name}"
            raise ConfigError(f"cannot send {where}: message too long; {limit}")
        failure = self._endpoint.connect_error(error, 0)
        failure.__cause__ = error
        if not (tracker.received or tracker.lost or tracker.corrupted):
            raise failure
        number = tracker.give_up_oldest()
        if number is not None:
            self._output.print_numbered_failure(failure, number)

    def print_summary(self) -> None:
        tracker, trips = self._tracker, self._trips
        trips.sent = tracker.received + tracker.lost  # what was in flight at Ctrl-C was not lost
        names = ("late", "duplicated", "reordered", "corrupted")
        counts = {name: getattr(tracker, name) for name in names}
        details = ", ".join(f"{count} {name}" for name, count in counts.items())
        counts = {"sent": trips.sent, "received": trips.received, "lost": trips.lost, **counts}
        self._output.print_summary(trips.summary(self._endpoint.name, details), counts)
