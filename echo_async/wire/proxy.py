"""The PROXY protocol, without IO: parse the header in which a load balancer sends the client's address.

A header is one line of text (version 1, at most 107 bytes) or binary (version 2: 16 bytes, and as many as they
announce). :meth:`ProxyHeader.feed` returns how many bytes belong to the header, so that the caller consumes none
of the message or TLS handshake after it. Invalid input is rejected at its first invalid byte.

Specification: https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt, sections 2.1 and 2.2.
"""

from __future__ import annotations

import contextlib
import re
import struct
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Any

from .text import excerpt

Source = tuple[str, int] | str | None
"""The client's host and port, or Unix socket path. None: the header has no address, the peer is the client."""

V1_PREFIX = b"PROXY "
V1_MAX_SIZE = 107  # bytes, including CRLF
V1_ADDRESSES = re.compile(rb"PROXY (TCP[46]) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4})")
V1_UNKNOWN = re.compile(rb"PROXY UNKNOWN( |\Z)")

V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V2_FIXED_PART = struct.Struct("!12sBBH")  # signature, version and command, family and transport, size of the rest
LOCAL, PROXY = 0x20, 0x21  # version 2 and the command
UNSPEC, TCP4, TCP6, UNIX = 0x00, 0x11, 0x21, 0x31  # address family and transport
V2_ADDRESS_SIZES = {TCP4: 12, TCP6: 36, UNIX: 216}  # bytes; the addresses of other families are ignored
V2_MAX_SIZE = V2_FIXED_PART.size + 0xFFFF


class ProxyHeaderError(Exception):
    """The input is not an acceptable PROXY header."""


class ProxyHeader:
    """Incremental parser of one header. ``versions`` is ``v1``, ``v2`` or ``auto`` (both)."""

    __slots__ = ("_buffer", "_fields", "_size", "_versions", "destination", "finished", "received", "source", "version")

    def __init__(self, versions: str = "auto") -> None:
        self.received = 0  # bytes of the header
        self.finished = False  # the header is complete, and what follows is set
        self.version = 0  # 1 or 2
        self.source: Source = None  # the client's address
        self.destination: Source = None  # the address that the client connected to
        self._fields = b""  # of version 2, valid
        self._versions = versions
        self._buffer = b""  # at most V2_MAX_SIZE bytes
        self._size: int | None = None  # of the complete header, once known

    def feed(self, data: bytes) -> int:
        """Process received bytes; return how many belong to the header. All do, unless it is finished.

        Raises:
            ProxyHeaderError: The bytes cannot become an acceptable header.
        """
        before = self.received
        self._buffer += data[: V2_MAX_SIZE - len(self._buffer)]
        if self._size is None:
            self._size = self._find_size()
        self.received = before + len(data)
        if self._size is None or self.received < self._size:
            return len(data)
        self.received = self._size
        self._parse(self._buffer[: self._size])
        self._buffer = b""
        self.finished = True
        return self._size - before

    def _parse(self, header: bytes) -> None:
        if header[:1] == b"P":
            self.version = 1
            self.source, self.destination = _parse_v1(header)
        else:
            self.version = 2
            self.source, self.destination = _parse_v2(header)
            self._fields = _find_fields(header)

    @property
    def tlvs(self) -> dict[str, Any]:
        """The fields of version 2, which are not parsed before: :func:`~echo_async.wire.tlv.parse_tlvs`."""
        from .tlv import parse_tlvs  # only for a header with fields

        return parse_tlvs(self._fields)

    def _find_size(self) -> int | None:
        """Return the size of the complete header; None if too few bytes have been received to know it."""
        if V2_SIGNATURE.startswith(self._buffer[: len(V2_SIGNATURE)]):
            return self._find_size_v2()
        if V1_PREFIX.startswith(self._buffer[: len(V1_PREFIX)]):
            return self._find_size_v1()
        raise ProxyHeaderError(f"no PROXY signature, received {excerpt(self._buffer[:20])}")

    def _find_size_v1(self) -> int | None:
        if len(self._buffer) < len(V1_PREFIX):
            return None
        self._check_version("v1")
        end = self._buffer.find(b"\r\n", 0, V1_MAX_SIZE) + 2
        if end < 2 and len(self._buffer) >= V1_MAX_SIZE:
            raise ProxyHeaderError(f"no end of line within {V1_MAX_SIZE} bytes")
        return end if end >= 2 else None

    def _find_size_v2(self) -> int | None:
        header = self._buffer
        if len(header) < len(V2_SIGNATURE):
            return None
        self._check_version("v2")
        if len(header) > 12 and header[12] not in (LOCAL, PROXY):
            raise ProxyHeaderError(f"unknown version and command {header[12]:#04x}")
        if len(header) > 13 and header[12] == PROXY and (header[13] >> 4 > 3 or header[13] & 15 > 2):
            raise ProxyHeaderError(f"unknown family and transport {header[13]:#04x}")
        if len(header) < V2_FIXED_PART.size:
            return None
        _, command, family, size = V2_FIXED_PART.unpack_from(header)
        if command == PROXY and size < V2_ADDRESS_SIZES.get(family, 0):
            raise ProxyHeaderError(f"address block of {size} bytes, expected at least {V2_ADDRESS_SIZES[family]}")
        return V2_FIXED_PART.size + int(size)

    def _check_version(self, version: str) -> None:
        if self._versions not in (version, "auto"):
            raise ProxyHeaderError(f"version {version}, expected {self._versions}")


def _parse_v1(line: bytes) -> tuple[Source, Source]:
    line = line.removesuffix(b"\r\n")
    if V1_UNKNOWN.match(line):
        return None, None
    match = V1_ADDRESSES.fullmatch(line)
    if match and max(int(match[4]), int(match[5])) <= 65535:
        family = AF_INET if match[1] == b"TCP4" else AF_INET6
        with contextlib.suppress(OSError):
            # inet_pton raises OSError if an address is invalid, or has leading zeros.
            source, destination = (inet_ntop(family, inet_pton(family, match[each].decode())) for each in (2, 3))
            return (source, int(match[4])), (destination, int(match[5]))
    raise ProxyHeaderError(f"malformed line: {excerpt(line)}")


def _parse_v2(header: bytes) -> tuple[Source, Source]:
    _, command, family, _ = V2_FIXED_PART.unpack_from(header)
    addresses = header[V2_FIXED_PART.size :]
    if command == PROXY and family in (TCP4, TCP6):
        kind, size = (AF_INET, 4) if family == TCP4 else (AF_INET6, 16)
        source, destination = (inet_ntop(kind, addresses[start : start + size]) for start in (0, size))
        ports = struct.unpack_from("!HH", addresses, 2 * size)
        return (source, ports[0]), (destination, ports[1])
    if command == PROXY and family == UNIX:
        return _parse_unix_path(addresses[:108]) or None, _parse_unix_path(addresses[108:216]) or None
    return None, None


def _find_fields(header: bytes) -> bytes:
    """Return the fields after the addresses. Without addresses of a known size there are none."""
    _, command, family, _ = V2_FIXED_PART.unpack_from(header)
    start = V2_FIXED_PART.size + V2_ADDRESS_SIZES.get(family, 0)
    if command != PROXY or family not in (UNSPEC, *V2_ADDRESS_SIZES) or start == len(header):
        return b""
    from .tlv import is_checksum_correct  # only for a header with fields

    try:
        is_correct = is_checksum_correct(header, start)
    except ValueError as error:
        if family == UNSPEC:  # what follows may be addresses as well, which the receiver ignores (section 2.2)
            return b""
        raise ProxyHeaderError(str(error)) from error
    if not is_correct:
        raise ProxyHeaderError("wrong CRC32C checksum")
    return header[start:]


def _parse_unix_path(field: bytes) -> str:
    """Decode a NUL-padded path. One that begins with NUL is an abstract name on Linux."""
    path = field.rstrip(b"\0") if field.startswith(b"\0") else field.partition(b"\0")[0]
    return path.decode("utf-8", "surrogateescape")


def parse_address(text: str) -> tuple[str, int]:
    """Parse an IP address and a port, such as ``[2001:db8::1]:40000``. :exc:`ValueError` if it is none."""
    from ipaddress import ip_address

    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535 or (":" in host) != host.startswith("["):
        raise ValueError(f"invalid address: {text!r}")
    return str(ip_address(host.removeprefix("[").removesuffix("]"))), int(port)


def build_header(version: str, source: tuple[str, int] | None, destination: tuple[str, int]) -> bytes:
    """Return a header of ``v1`` or ``v2``. Without a ``source`` it says that the peer is the client.

    If the two addresses are of different families, the IPv4 address is sent as an IPv4-mapped IPv6 address.
    """
    from ipaddress import IPv6Address, ip_address

    if source is None:
        return V1_PREFIX + b"UNKNOWN\r\n" if version == "v1" else V2_FIXED_PART.pack(V2_SIGNATURE, LOCAL, 0, 0)
    addresses = [ip_address(host.partition("%")[0]) for host, _ in (source, destination)]
    if any(address.version == 6 for address in addresses):
        addresses = [IPv6Address(f"::ffff:{each}") if each.version == 4 else each for each in addresses]
    family = addresses[0].version
    if version == "v1":
        hosts = " ".join(str(address) for address in addresses)
        return f"PROXY TCP{family} {hosts} {source[1]} {destination[1]}\r\n".encode()
    rest = b"".join(address.packed for address in addresses) + struct.pack("!HH", source[1], destination[1])
    return V2_FIXED_PART.pack(V2_SIGNATURE, PROXY, TCP4 if family == 4 else TCP6, len(rest)) + rest
