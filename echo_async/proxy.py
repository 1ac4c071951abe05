"""The PROXY protocol, without IO: what a balancer says of a client before the client's own first byte.

A header is either one line of text (version 1, at most 107 bytes) or binary (version 2: 16 bytes, then as many
as they announce). :meth:`ProxyHeader.feed` says how many of the bytes it is shown are the header's, so whoever
reads never takes a byte of what comes after it: the client's message, or its TLS handshake. What cannot become a
header is refused at its first wrong byte. No more of a header is kept than its addresses take.

By https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt, sections 2.1 and 2.2.
"""

from __future__ import annotations

import re
import socket
import struct
from typing import TYPE_CHECKING

from .logs import excerpt

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

__all__ = ["ProxyHeader", "ProxyHeaderError", "Source", "TrustedProxies"]

Source = tuple[str, int] | str | None
"""The client's address and port, the path of its Unix socket, or None: the one that is connected speaks for itself."""

V1_PREFIX = b"PROXY "
V1_SIZE = 107  # bytes of the longest line, CRLF included
V1_ADDRESSES = re.compile(rb"PROXY (TCP[46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})")
V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN( |\Z)")

V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V2_FIXED = struct.Struct("!12sBBH")
LOCAL, PROXY = 0x20, 0x21  # version 2 and the command
TCP4, TCP6, UNIX = 0x11, 0x21, 0x31  # address family and transport
V2_ADDRESSES = {TCP4: 12, TCP6: 36, UNIX: 216}  # bytes; other families have no address that is of use here

MAX_KEPT = V2_FIXED.size + V2_ADDRESSES[UNIX]


class ProxyHeaderError(Exception):
    """What came is no header that is allowed here. The text says why."""


class ProxyHeader:
    """One header, taken in as it comes; ``versions`` is ``v1``, ``v2`` or, for both, ``auto``.

    ``finished``: it is complete, and ``source`` is the client whom it names.
    """

    __slots__ = ("_head", "_received", "_size", "_versions", "finished", "source")

    def __init__(self, versions: str = "auto") -> None:
        self.finished = False
        self.source: Source = None
        self._versions = versions
        self._head = b""  # its beginning, up to the end of its addresses
        self._received = 0
        self._size: int | None = None  # of the whole header, once that is known

    @property
    def received(self) -> int:
        """Bytes of the header that have come."""
        return self._received

    def feed(self, data: bytes) -> int:
        """Take what comes next; return how many bytes of it are the header's: all, unless it is finished with them.

        :exc:`ProxyHeaderError` if this cannot become a header.
        """
        before = self._received
        self._head += data[: MAX_KEPT - len(self._head)]
        if self._size is None:
            self._size = self._measure()
        self._received = before + len(data)
        if self._size is None or self._received < self._size:
            return len(data)
        self._received = self._size
        self.source = _source_v1(self._head[: self._size]) if self._head.startswith(b"P") else _source_v2(self._head)
        self.finished = True
        return self._size - before

    def _measure(self) -> int | None:
        """How long the header is in all; None if too little of it has come to know."""
        head = self._head
        if V2_SIGNATURE.startswith(head[: len(V2_SIGNATURE)]):
            return self._measure_v2()
        if V1_PREFIX.startswith(head[: len(V1_PREFIX)]):
            return self._measure_v1()
        raise ProxyHeaderError(f"there is no PROXY header: it began with {excerpt(head[:20])}")

    def _measure_v1(self) -> int | None:
        if len(self._head) < len(V1_PREFIX):
            return None
        self._allow("v1")
        end = self._head.find(b"\r\n", 0, V1_SIZE) + 2
        if end >= 2:
            return end
        if len(self._head) >= V1_SIZE:
            raise ProxyHeaderError(f"its PROXY header has no end within {V1_SIZE} bytes")
        return None

    def _measure_v2(self) -> int | None:
        head = self._head
        if len(head) < len(V2_SIGNATURE):
            return None
        self._allow("v2")
        if len(head) > 12 and head[12] not in (LOCAL, PROXY):
            raise ProxyHeaderError(f"its PROXY header has version and command {head[12]:#04x}, which do not exist")
        if len(head) > 13 and head[12] == PROXY and (head[13] >> 4 > 3 or head[13] & 15 > 2):
            raise ProxyHeaderError(f"its PROXY header has family and transport {head[13]:#04x}, which do not exist")
        if len(head) < V2_FIXED.size:
            return None
        _, command, family, size = V2_FIXED.unpack_from(head)
        if command == PROXY and size < V2_ADDRESSES.get(family, 0):
            raise ProxyHeaderError(f"its PROXY header has {size} bytes for addresses of {V2_ADDRESSES[family]}")
        return V2_FIXED.size + int(size)

    def _allow(self, version: str) -> None:
        if self._versions not in (version, "auto"):
            raise ProxyHeaderError(f"its PROXY header is {version}, and not {self._versions} as asked for")


def _source_v1(line: bytes) -> Source:
    line = line.removesuffix(b"\r\n")
    if V1_UNKNOWN.match(line):
        return None
    if found := V1_ADDRESSES.fullmatch(line):
        family = socket.AF_INET if found[1] == b"TCP4" else socket.AF_INET6
        try:
            source, _ = (_address(family, each.decode("ascii")) for each in (found[2], found[3]))
        except OSError:
            pass
        else:
            if max(int(found[4]), int(found[5])) <= 65535:
                return source, int(found[4])
    raise ProxyHeaderError(f"its PROXY header makes no sense: {excerpt(line)}")


def _address(family: socket.AddressFamily, text: str) -> str:
    """``text`` as an address is usually written. :exc:`OSError` if it is none, or has leading zeros."""
    return socket.inet_ntop(family, socket.inet_pton(family, text))


def _source_v2(head: bytes) -> Source:
    _, command, family, _ = V2_FIXED.unpack_from(head)
    addresses = head[V2_FIXED.size :]
    if command == PROXY and family == TCP4:
        return socket.inet_ntop(socket.AF_INET, addresses[:4]), int.from_bytes(addresses[8:10])
    if command == PROXY and family == TCP6:
        return socket.inet_ntop(socket.AF_INET6, addresses[:16]), int.from_bytes(addresses[32:34])
    if command == PROXY and family == UNIX:
        return _path(addresses[:108]) or None
    return None


def _path(field: bytes) -> str:
    """A path ends at its first NUL; a name that begins with NUL is one of Linux' abstract names."""
    path = field.rstrip(b"\0") if field.startswith(b"\0") else field.partition(b"\0")[0]
    return path.decode("utf-8", "surrogateescape")


class TrustedProxies:
    """Who may send a header: ``text`` is addresses and networks with commas between them, or ``*`` for all.

    Whoever may send one can claim any address. :exc:`ValueError` says what in ``text`` makes no sense.
    """

    def __init__(self, text: str) -> None:
        from ipaddress import ip_network  # most servers have no need of it

        entries = [entry.strip() for entry in text.split(",")]
        self._all = "*" in entries
        self._networks: list[IPv4Network | IPv6Network] = [ip_network(entry) for entry in entries if entry != "*"]

    def allow(self, peername: object) -> bool:
        """Whether who is connected from ``peername`` is one of them. A Unix socket is guarded by its path's rights."""
        from ipaddress import IPv6Address, ip_address

        if self._all or not isinstance(peername, tuple):
            return True
        address = ip_address(peername[0].partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped:  # a client of a socket for both
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)
