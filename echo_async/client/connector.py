"""Open a connection: resolve and connect. Every step has a deadline, the resolver included."""

import os
import socket
from collections.abc import Sequence
from time import monotonic, perf_counter, sleep
from typing import Any

from ..background import call_in_thread
from .endpoint import UNIX_RETRY_DELAY, Endpoint, closed_on_error, refuse_self_connection, seconds_left

SMALL_SEGMENT_SIZE = 1400  # bytes

Address = tuple[int, Any]
"""The family of a socket, and what it connects to."""


def find_addresses(endpoint: Endpoint, deadline: float) -> Sequence[Address]:
    """Return the addresses of the host, or that of the Unix socket."""
    if endpoint.config.uds is not None:
        return [(socket.AF_UNIX, os.fspath(endpoint.config.uds))]
    # The timeout of the system's resolver can be longer.
    resolved = endpoint.numeric or call_in_thread(endpoint.resolve, "echo-async resolver").result(
        seconds_left(deadline)
    )
    return [(info[0], info[4]) for info in resolved]


def connect_first(endpoint: Endpoint, addresses: Sequence[Address], deadline: float) -> tuple[Address, socket.socket]:
    """Connect to the first address that accepts. Each has an equal share of the time."""
    failure = OSError("no address")
    for number, address in enumerate(addresses):
        share = seconds_left(deadline) / (len(addresses) - number)
        try:
            return address, connect(endpoint, address, monotonic() + share)
        except OSError as error:
            failure = error
    raise failure


def connect(endpoint: Endpoint, address: Address, deadline: float, *, is_small: bool = False) -> socket.socket:
    """Connect to an address, and send the PROXY header, if one is configured.

    ``is_small`` is for a connection that is full soon: Linux sizes the send buffer of the server by the segments.
    """
    family, target = address
    started = perf_counter()
    with closed_on_error(socket.socket(family, socket.SOCK_STREAM)) as connected:
        if isinstance(target, tuple):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_small and hasattr(socket, "TCP_MAXSEG"):
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT_SIZE)
        while True:
            connected.settimeout(seconds_left(deadline))
            try:
                connected.connect(target)
                break
            except BlockingIOError:  # the backlog of a Unix socket is full
                sleep(UNIX_RETRY_DELAY)
        refuse_self_connection(connected)
    endpoint.start(connected, started)
    return connected
