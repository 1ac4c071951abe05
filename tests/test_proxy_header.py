"""The PROXY protocol without IO: headers of the specification, malformed ones, and any others.

The package proxy-protocol (https://pypi.org/project/proxy-protocol), with crc32c, is a second opinion. It differs in
three points: it keeps the last of several fields of a type, calculates the checksum of the fields sorted by type, and
accepts truncated fields.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2
from support import PROXY_SIGNATURE, TCP4_ADDRESSES, proxy_header, tlv

from echo_async.wire.networks import Networks
from echo_async.wire.proxy import ProxyHeader, ProxyHeaderError, Source
from echo_async.wire.tlv import crc32c, iterate_tlvs

CLIENT6 = ("2001:db8::1", 65535)
TCP4 = TCP4_ADDRESSES
TCP6 = 2 * socket.inet_pton(socket.AF_INET6, "2001:db8::1") + struct.pack("!HH", 65535, 443)
TLVS = tlv(0x04, b"pad") + tlv(0x02, b"example.org")
LONGEST = b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"


def pack_unix(source: bytes, destination: bytes = b"/run/server") -> bytes:
    return source.ljust(108, b"\0") + destination.ljust(108, b"\0")


FAMILIES: dict[int, tuple[bytes, Source, Source]] = {
    0x00: (b"", None, None),
    0x11: (TCP4, ("192.0.2.1", 4711), ("192.0.2.9", 443)),
    0x21: (TCP6, CLIENT6, ("2001:db8::1", 443)),
    0x31: (pack_unix(b"/run/client"), "/run/client", "/run/server"),
}


def v2(command: int, family: int, addresses: bytes = b"", *fields: bytes) -> bytes:
    return proxy_header(*fields, command=command, family=family, addresses=addresses)


HEADERS: dict[bytes, Source] = {
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n": ("192.168.0.1", 56324),  # the example of the specification
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": ("255.255.255.255", 65535),
    b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n": ("0.0.0.0", 0),
    b"PROXY TCP6 2001:db8::1 2001:DB8:0:0::2 65535 443\r\n": CLIENT6,
    b"PROXY TCP6 %b %b 65535 65535\r\n" % (LONGEST, LONGEST): (LONGEST.decode(), 65535),
    b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n": ("::ffff:192.0.2.1", 1),
    b"PROXY UNKNOWN\r\n": None,
    b"PROXY UNKNOWN any text, even \r or \n\r\n": None,
    b"PROXY UNKNOWN %b %b 65535 65535\r\n" % (LONGEST, LONGEST): None,  # 107 bytes, the maximum
    v2(0x21, 0x11, TCP4): ("192.0.2.1", 4711),
    v2(0x21, 0x11, TCP4, TLVS): ("192.0.2.1", 4711),
    v2(0x21, 0x21, TCP6): CLIENT6,
    v2(0x21, 0x21, TCP6, TLVS * 127 + tlv(0xE9, bytes(0xF000))): CLIENT6,
    v2(0x21, 0x31, pack_unix(b"/run/client")): "/run/client",
    v2(0x21, 0x31, pack_unix(b"/" + b"x" * 107)): "/" + "x" * 107,
    v2(0x21, 0x31, pack_unix(b"/run/client\0rest")): "/run/client",
    v2(0x21, 0x31, pack_unix(b"\0abstract")): "\0abstract",
    v2(0x21, 0x31, pack_unix(b"")): None,
    v2(0x21, 0x00): None,  # UNSPEC
    v2(0x21, 0x00, TCP4): None,
    v2(0x21, 0x12, TCP4): None,  # datagrams: valid, but the address is ignored
    v2(0x21, 0x22, TCP6): None,
    v2(0x21, 0x32, pack_unix(b"/run/client")): None,
    v2(0x20, 0x00): None,  # LOCAL
    v2(0x20, 0x11, TCP4): None,
    v2(0x20, 0x11, b"short"): None,
    v2(0x20, 0xFF, TLVS): None,  # LOCAL: the family is ignored
}

MALFORMED: dict[bytes, str] = {
    b"Hola Server!\n": "no PROXY signature, received Hola Server!",
    b"\n": "no PROXY signature",
    b"proxy TCP4 192.168.0.1 192.168.0.11 56324 443\r\n": "no PROXY signature",
    b"PROXY\tTCP4 192.168.0.1 192.168.0.11 56324 443\r\n": "no PROXY signature",
    b"\x16\x03\x01\x02\x00": "no PROXY signature",
    b"PROXY TCP4 192.168.0.1  192.168.0.11 56324 443\r\n": "malformed line: PROXY TCP4",
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324\r\n": "malformed line",
    b"PROXY TCP4 192.168.0.01 192.168.0.11 56324 443\r\n": "malformed line",
    b"PROXY TCP4 192.168.0.1 192.168.0.11 65536 443\r\n": "malformed line",
    b"PROXY TCP4 192.168.0.1 192.168.0.11 056 443\r\n": "malformed line",
    b"PROXY TCP4 192.168.0.1 192.168.0.11 \xd9\xa1 443\r\n": "malformed line",
    b"PROXY TCP4 ::1 ::1 1 2\r\n": "malformed line",
    b"PROXY TCP6 192.168.0.1 192.168.0.11 1 2\r\n": "malformed line",
    b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n": "malformed line",
    b"PROXY UDP4 192.168.0.1 192.168.0.11 1 2\r\n": "malformed line",
    b"PROXY UNKNOWNS\r\n": "malformed line",
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\n" + b"x" * 100: "no end of line within 107 bytes",
    b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n": "no end of line within 107 bytes",  # 108 bytes
    PROXY_SIGNATURE[:-1] + b"\r": "no PROXY signature",
    PROXY_SIGNATURE + b"\x11": "unknown version and command 0x11",
    PROXY_SIGNATURE + b"\x21\x41": "unknown family and transport 0x41",
    PROXY_SIGNATURE + b"\x21\x13": "unknown family and transport 0x13",
    v2(0x21, 0x11, TCP4[:-1]): "address block of 11 bytes, expected at least 12",
    v2(0x21, 0x21, TCP4): "address block of 12 bytes, expected at least 36",
    v2(0x21, 0x31, pack_unix(b"")[:-1]): "address block of 215 bytes, expected at least 216",
}


def parse(data: bytes, versions: str = "auto") -> ProxyHeader:
    parsed = ProxyHeader(versions)
    assert parsed.feed(data + b"message\n") == parsed.received == len(data)
    assert parsed.finished
    return parsed


# Addresses


def test_header_of_the_table_is_consumed_and_no_more() -> None:
    for header, source in HEADERS.items():
        for rest in (b"", b"\n", b"Hola Server!\n", b"PROXY UNKNOWN\r\n" * 100):
            parser = ProxyHeader()
            assert parser.feed(header + rest) == parser.received == len(header)
            assert (parser.finished, parser.source) == (True, source)


@given(header=st.sampled_from([each for each in HEADERS if len(each) < 1000]), rest=st.binary(), data=st.data())
def test_header_fed_in_any_split_gives_the_same_source(header: bytes, rest: bytes, data: st.DataObject) -> None:
    parser, sent, at = ProxyHeader(), header + rest, 0
    while not parser.finished:
        at += parser.feed(sent[at : at + data.draw(st.integers(1, len(sent)))])
    assert (at, parser.source) == (len(header), HEADERS[header])


def test_malformed_header_is_rejected_with_the_reason() -> None:
    for header, reason in MALFORMED.items():
        with pytest.raises(ProxyHeaderError) as caught:
            ProxyHeader().feed(header)
        assert reason in str(caught.value)
        assert str(caught.value).isprintable()
        byte_by_byte = ProxyHeader()
        with pytest.raises(ProxyHeaderError):
            deque(map(byte_by_byte.feed, (header[index : index + 1] for index in range(len(header)))))


@given(st.binary(min_size=1) | st.binary().map(PROXY_SIGNATURE.__add__) | st.binary().map(proxy_header))
def test_any_bytes_are_consumed_or_rejected(data: bytes) -> None:
    parser = ProxyHeader()
    with suppress(ProxyHeaderError):
        assert 0 < parser.feed(data) <= len(data)
        assert isinstance(parser.tlvs, dict) if parser.finished else parser.received == len(data)


def test_header_of_another_version_is_rejected() -> None:
    for versions, other in (("v1", v2(0x20, 0)), ("v2", b"PROXY UNKNOWN\r\n")):
        with pytest.raises(ProxyHeaderError, match=f"version v[12], expected {versions}"):
            ProxyHeader(versions).feed(other)


def test_trusted_proxies_match_addresses_and_networks() -> None:
    addresses, networks = Networks("127.0.0.1,::1"), Networks("10.0.0.0/8, fe80::/10")
    assert all(each in addresses for each in [("127.0.0.1", 1), ("::1", 1, 0, 0), ("::ffff:127.0.0.1", 1, 0, 0)])
    assert all(each in networks for each in [("10.255.0.1", 1), ("fe80::1%eth0", 1, 0, 2), ""])  # a Unix socket
    assert ("127.0.0.2", 1) not in addresses
    assert ("11.0.0.1", 1) not in networks
    assert ("11.0.0.1", 1) in Networks("*")


# Fields


def with_checksum(*fields: bytes, **options: Any) -> bytes:
    """Return a header with a correct checksum, as a field before ``fields`` of higher types."""
    lower = [each for each in fields if each[0] < 0x03]
    higher = fields[len(lower) :]
    zeroed = proxy_header(*lower, tlv(0x03, bytes(4)), *higher, **options)
    return proxy_header(*lower, tlv(0x03, crc32c(zeroed).to_bytes(4)), *higher, **options)


SSL = tlv(
    0x20,
    bytes([0x07])
    + struct.pack("!I", 0)
    + tlv(0x21, b"TLSv1.3")
    + tlv(0x22, b"client.example")
    + tlv(0x23, b"TLS_AES_256_GCM_SHA384")
    + tlv(0x24, b"SHA256")
    + tlv(0x25, b"RSA2048"),
)
SSL_FIELDS = {
    "client": ["ssl", "cert_conn", "cert_sess"],
    "verify": 0,
    "version": "TLSv1.3",
    "cn": "client.example",
    "cipher": "TLS_AES_256_GCM_SHA384",
    "sig_alg": "SHA256",
    "key_alg": "RSA2048",
}
FIELDS: list[tuple[list[bytes], dict[str, Any]]] = [
    ([], {}),
    ([tlv(0x01, b"h2")], {"alpn": "h2"}),
    ([tlv(0x01, b"\xff")], {"0x01": "ff"}),
    ([tlv(0x02, b"echo.example")], {"authority": "echo.example"}),
    ([tlv(0x04, b"\0\0\0")], {}),
    ([tlv(0x05, b"id-42")], {"unique_id": "id-42"}),
    ([tlv(0x05, b"\x00\x01")], {"unique_id": "0001"}),
    ([tlv(0x05, b"")], {"unique_id": ""}),
    ([SSL], {"ssl": SSL_FIELDS}),
    ([tlv(0x20, bytes(5))], {"ssl": {"client": [], "verify": 0}}),
    ([tlv(0x20, b"\x01\0\0\0\x01" + tlv(0x29, b"\x01"))], {"ssl": {"client": ["ssl"], "verify": 1, "0x29": "01"}}),
    ([tlv(0x20, b"\x01\0\0")], {"0x20": "010000"}),
    ([tlv(0x20, bytes(5) + b"\x21\0\x09TLS")], {"0x20": "0000000000" + "210009" + b"TLS".hex()}),
    ([tlv(0x30, b"blue")], {"netns": "blue"}),
    ([tlv(0xEA, b"\x01vpce-08d2bf15fac5001c9")], {"aws_vpc_endpoint_id": "vpce-08d2bf15fac5001c9"}),
    ([tlv(0xEA, b"\x02x")], {"0xea": "0278"}),
    ([tlv(0xEE, b"\x01\x04\x03\x02\x01")], {"azure_private_endpoint_linkid": 0x01020304}),
    ([tlv(0xEE, b"\x01\x04")], {"0xee": "0104"}),
    ([tlv(0xE0, (2**63).to_bytes(8))], {"gcp_psc_connection_id": "9223372036854775808"}),
    ([tlv(0xE0, b"\0")], {"0xe0": "00"}),
    ([tlv(0xF0, b"\x01\x02")], {"0xf0": "0102"}),
    (
        [tlv(0x20, bytes(5) + tlv(0x21, b"TLSv1.3") + tlv(0x22, b"\xff") + tlv(0x22, b"a") + tlv(0x22, b"b"))],
        {"ssl": {"client": [], "verify": 0, "version": "TLSv1.3", "0x22": "ff", "cn": ["a", "b"]}},
    ),
    ([tlv(0x02, b"one"), tlv(0x02, b"two")], {"authority": ["one", "two"]}),
    ([tlv(0x02, b"x" * 60_000)], {"authority": "x" * 60_000}),
]


def test_fields_are_decoded_by_name() -> None:
    for fields, expected in FIELDS:
        for family, (addresses, source, destination) in FAMILIES.items():
            parsed = parse(v2(0x21, family, addresses, *fields))
            assert (parsed.source, parsed.destination, parsed.tlvs) == (source, destination, expected)


def test_local_command_has_no_fields() -> None:
    parsed = parse(proxy_header(tlv(0x02, b"ignored"), b"\xff", command=0x20))
    assert (parsed.source, parsed.destination, parsed.tlvs) == (None, None, {})


def test_truncated_field_is_an_invalid_header() -> None:
    for field, error in {
        b"\x02": "truncated TLV: 1 bytes left, expected at least 3",
        b"\x02\0": "truncated TLV: 2 bytes left, expected at least 3",
        b"\x02\0\x05four": "truncated TLV 0x02: 4 bytes left, expected 5",
        tlv(0x02, b"x") + b"\x01\xff\xff": "truncated TLV 0x01: 0 bytes left, expected 65535",
    }.items():
        with pytest.raises(ProxyHeaderError, match=error):
            parse(proxy_header(field))


def test_header_of_too_many_fields_is_invalid_and_cheap() -> None:
    """A header has room for 21,845 fields, which took 46 ms and 2 MiB."""
    assert len(parse(proxy_header(*(tlv(0x30 + number % 8, b"") for number in range(256)))).tlvs) == 8
    with pytest.raises(ProxyHeaderError, match="too many TLVs: over 256"):
        parse(proxy_header(21_000 * tlv(0xE9, b"")))


def test_checksum_of_the_header_is_verified() -> None:
    for family, (addresses, _, _) in FAMILIES.items():
        data = with_checksum(tlv(0x02, b"echo.example"), family=family, addresses=addresses)
        assert parse(data).tlvs["crc32c"] == data[-4:].hex()
        for position in (16, len(data) - 8, len(data) - 1):
            wrong = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
            with pytest.raises(ProxyHeaderError, match="wrong CRC32C checksum"):
                parse(wrong)


def test_several_checksums_must_all_be_correct() -> None:
    """All are zero in the calculation. Its time does not depend on their number."""
    checksum = crc32c(proxy_header(*(250 * [tlv(0x03, bytes(4))]))).to_bytes(4)
    correct = 250 * [tlv(0x03, checksum)]
    assert parse(proxy_header(*correct)).tlvs["crc32c"] == 250 * [checksum.hex()]
    for wrong in (proxy_header(*correct[1:], tlv(0x03, bytes(4))), proxy_header(tlv(0x03, b"123"))):
        with pytest.raises(ProxyHeaderError, match="wrong CRC32C checksum"):
            parse(wrong)


# A second opinion


PORTS = st.integers(0, 65535)


@given(
    hosts=st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)) | st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6)),
    ports=st.tuples(PORTS, PORTS),
    fields=st.dictionaries(st.integers(0, 255).filter(lambda kind: kind != 0x03), st.binary(max_size=30), max_size=8),
)
def test_any_header_agrees_with_another_parser(
    hosts: tuple[IPv4Address | IPv6Address, ...], ports: tuple[int, int], fields: dict[int, bytes]
) -> None:
    line = "PROXY TCP{} {} {} {} {}\r\n".format(hosts[0].version, *hosts, *ports).encode()
    addresses = hosts[0].packed + hosts[1].packed + struct.pack("!HH", *ports)
    family = 0x11 if hosts[0].version == 4 else 0x21
    binary = with_checksum(*(tlv(kind, fields[kind]) for kind in sorted(fields)), family=family, addresses=addresses)
    for version, header, opinion in ((1, line, ProxyProtocolV1()), (2, binary, ProxyProtocolV2())):
        parsed, other = parse(header, f"v{version}"), opinion.unpack(header)
        assert parsed.version == version
        for found, expected in ((parsed.source, other.source), (parsed.destination, other.dest)):
            assert isinstance(found, tuple)
            assert (ip_address(found[0]), found[1]) == expected
    assert dict(iterate_tlvs(binary[16 + len(addresses) :])) == dict(other.tlv)
