"""Which datagrams are answered, without IO.

The source address of a datagram can be spoofed: the reply goes to the host that has it. And two services that
answer each other never stop (CVE-1999-0103). Hence the rules: no reply is longer than what was received, and none goes
to a port where another service may answer, to another echo server, or to an address that is not allowed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from .networks import Networks

SocketAddress = tuple[Any, ...]
"""Host and port; for IPv6 also flow information and scope."""

RECEIVE_SIZE = 65_535  # bytes of a datagram, headers included (RFC 791 section 3.1)
MIN_SOURCE_PORT = 1024  # below are services such as chargen and DNS, and no clients (RFC 6335 section 6)
MAX_CACHED_SOURCES = 1024  # of which it is remembered whether they are answered

REPLY_TRAFFIC_CLASS = 0xAC
"""The traffic class of every reply, by which another server recognizes it: DSCP 43, which no service class uses and
which is for local use (RFC 2474 section 6), and no ECN."""
REPLY_MARKS = {bytes([REPLY_TRAFFIC_CLASS]), REPLY_TRAFFIC_CLASS.to_bytes(4, sys.byteorder)}
"""How the kernel reports it: as a byte for IPv4 (ip(7), IP_RECVTOS), as an int for IPv6 (RFC 3542 section 6.5)."""

REFUSALS = {
    "address": "not in udp_allow_from",
    "port": f"source port below {MIN_SOURCE_PORT}",
    "loop": "sent by an echo server",
    "size": "its reply would be longer",
    "limit": "too many delayed replies",
    "send": "cannot send the reply",
}
"""Why a datagram is not answered: what is counted, and what is logged."""


def is_marked(ancillary: Iterable[tuple[int, int, bytes]]) -> bool:
    """Whether the ancillary data of a datagram is that of a reply."""
    for _, _, data in ancillary:  # noqa: SIM110 (any() takes longer)
        if data in REPLY_MARKS:
            return True
    return False


class Refusals(dict[SocketAddress, "str | None"]):
    """For each source address, why its datagrams are not answered: a key of ``REFUSALS``, None if they are.

    It remembers some of them, since to find out takes longer than to answer. ``ports`` are the server's own.
    """

    def __init__(self, allow_from: str, ports: Collection[int]) -> None:
        super().__init__()
        self._networks = Networks(allow_from)
        self._ports = frozenset(ports)

    def __missing__(self, source: SocketAddress) -> str | None:
        if len(self) >= MAX_CACHED_SOURCES:
            self.clear()
        reason = "loop" if source[1] in self._ports else None
        if source not in self._networks:
            reason = "address"
        elif source[1] < MIN_SOURCE_PORT:
            reason = "port"
        self[source] = reason
        return reason


class DatagramCounters:
    """What was received and sent in datagrams. Changed by one thread only."""

    def __init__(self) -> None:
        self.answered = 0
        self.received = 0  # bytes
        self.sent = 0  # bytes
        self.refused = Counter[str]()  # by reason
