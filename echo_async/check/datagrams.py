"""The check of datagrams: how large they may be, how many are lost, and whether they keep their order."""

import errno
import os
import socket
from select import select
from time import perf_counter

from ..client.datagram_tracker import MAX_PAYLOAD, MAX_PAYLOAD_IPV4, DatagramFormat, DatagramTracker
from .context import IDENTIFY, Context
from .result import Failure, Skip

SIZES = (1472, 8192, MAX_PAYLOAD_IPV4)  # bytes: that of an Ethernet frame, a usual and the largest one
SIZE_ATTEMPTS = 3  # datagrams of each size
COUNT, SIZE = 200, 64  # datagrams to count the lost ones, and their bytes
MAX_LOST = 0.05  # share of lost datagrams
REPLY_TIMEOUT = 1.0  # seconds after which a datagram counts as lost


def check_udp(context: Context) -> str:
    if context.mode is IDENTIFY:
        raise Skip("a server in mode identify describes a datagram instead of returning it")
    assert context.address is not None
    with socket.socket(context.address[0], socket.SOCK_DGRAM) as sender:
        sender.connect(context.address[4])  # sends nothing
        counted = _exchange(sender, SIZE, COUNT)
        lost = counted.lost / counted.sent
        facts = f"{counted.lost} of {counted.sent} lost, {counted.reordered} out of order"
        if counted.corrupted:
            raise Failure(f"{counted.corrupted} of {counted.sent} datagrams changed", "the reply is not an echo")
        if lost > MAX_LOST:
            raise Failure(facts, "no UDP echo server, a firewall, or a path that drops datagrams")
        returned = [size for size in SIZES if _exchange(sender, size, SIZE_ATTEMPTS, stops_early=True).received]
    if not returned:
        raise Failure(f"no datagram of {SIZES[0]:,} bytes, {facts}", "a path MTU of less than an Ethernet frame")
    return f"{facts}, at most {returned[-1]:,} bytes"


def _exchange(sender: socket.socket, size: int, count: int, *, stops_early: bool = False) -> DatagramTracker:
    """Send ``count`` datagrams, and wait for the reply to each, or only for the first one."""
    tracker = DatagramTracker(DatagramFormat(size, int.from_bytes(os.urandom(4), "big")), REPLY_TIMEOUT)
    while (tracker.sent < count or tracker.in_flight) and not (stops_early and tracker.received):
        now = perf_counter()
        try:
            if tracker.sent < count and tracker.can_send:
                data = tracker.next_datagram()
                tracker.record_sent(now)
                sender.send(data)
            elif select([sender], [], [], max(0.0, (tracker.deadline or now) - now))[0]:
                tracker.receive(sender.recv(MAX_PAYLOAD), perf_counter())
        except OSError as error:  # refused, or too large: counts as lost
            if error.errno == errno.ECONNREFUSED:
                raise Failure("connection refused", "no server listens on the UDP port") from error
        if tracker.expire(perf_counter()) and not tracker.received:
            break  # none arrives
    return tracker
