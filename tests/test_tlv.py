"""The fields of PROXY headers of version 2: the examples of the specification, and headers made by hand.

The package proxy-protocol (https://pypi.org/project/proxy-protocol), with crc32c, is a second opinion. It differs in
three points: it keeps the last of several fields of a type, calculates the checksum of the fields sorted by type, and
accepts truncated fields.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from echo_async.wire.proxy import ProxyHeader, ProxyHeaderError, Source
from echo_async.wire.tlv import crc32c, iterate_tlvs, parse_tlvs

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
IPV4 = socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.9") + struct.pack("!HH", 4711, 443)
IPV6 = 2 * socket.inet_pton(socket.AF_INET6, "2001:db8::1") + struct.pack("!HH", 4711, 443)
PATHS = b"/run/client".ljust(108, b"\0") + b"/run/server".ljust(108, b"\0")
FAMILIES = {0x11: IPV4, 0x21: IPV6, 0x31: PATHS}


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def header(*fields: bytes, command: int = 0x21, family: int = 0x11, addresses: bytes = IPV4) -> bytes:
    rest = addresses + b"".join(fields)
    return SIGNATURE + struct.pack("!BBH", command, family, len(rest)) + rest


def with_checksum(*fields: bytes, **options: Any) -> bytes:
    """Return a header with a correct checksum, as a field before ``fields`` of higher types."""
    lower = [each for each in fields if each[0] < 0x03]
    higher = fields[len(lower) :]
    zeroed = header(*lower, tlv(0x03, bytes(4)), *higher, **options)
    return header(*lower, tlv(0x03, crc32c(zeroed).to_bytes(4)), *higher, **options)


def parse(data: bytes) -> ProxyHeader:
    parsed = ProxyHeader("v2")
    assert parsed.feed(data + b"message\n") == len(data)
    assert parsed.finished
    return parsed


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
        for family, addresses in FAMILIES.items():
            assert parse(header(*fields, family=family, addresses=addresses)).tlvs == expected
        assert parse(header(*fields, family=0x00, addresses=b"")).tlvs == expected


def test_local_command_has_no_fields() -> None:
    parsed = parse(header(tlv(0x02, b"ignored"), b"\xff", command=0x20))
    assert (parsed.source, parsed.destination, parsed.tlvs) == (None, None, {})


def test_truncated_field_is_an_invalid_header() -> None:
    for field, error in {
        b"\x02": "truncated TLV: 1 bytes left, expected at least 3",
        b"\x02\0": "truncated TLV: 2 bytes left, expected at least 3",
        b"\x02\0\x05four": "truncated TLV 0x02: 4 bytes left, expected 5",
        tlv(0x02, b"x") + b"\x01\xff\xff": "truncated TLV 0x01: 0 bytes left, expected 65535",
    }.items():
        with pytest.raises(ProxyHeaderError, match=error):
            parse(header(field))


def test_header_of_too_many_fields_is_invalid_and_cheap() -> None:
    """A header has room for 21,845 fields, which took 46 ms and 2 MiB."""
    assert len(parse(header(*(tlv(0x30 + number % 8, b"") for number in range(256)))).tlvs) == 8
    with pytest.raises(ProxyHeaderError, match="too many TLVs: over 256"):
        parse(header(21_000 * tlv(0xE9, b"")))


# The checksum


def test_crc32c_of_known_values() -> None:
    """RFC 3720 appendix B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(32 * b"\xff") == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283


def test_checksum_of_the_header_is_verified() -> None:
    for family, addresses in FAMILIES.items():
        data = with_checksum(tlv(0x02, b"echo.example"), family=family, addresses=addresses)
        assert parse(data).tlvs["crc32c"] == data[-4:].hex()
        for position in (16, len(data) - 8, len(data) - 1):
            wrong = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
            with pytest.raises(ProxyHeaderError, match="wrong CRC32C checksum"):
                parse(wrong)


def test_several_checksums_must_all_be_correct() -> None:
    """All are zero in the calculation. Its time does not depend on their number."""
    checksum = crc32c(header(*(250 * [tlv(0x03, bytes(4))]))).to_bytes(4)
    correct = 250 * [tlv(0x03, checksum)]
    assert parse(header(*correct)).tlvs["crc32c"] == 250 * [checksum.hex()]
    for wrong in (header(*correct[1:], tlv(0x03, bytes(4))), header(tlv(0x03, b"123"))):
        with pytest.raises(ProxyHeaderError, match="wrong CRC32C checksum"):
            parse(wrong)


# A second opinion


def expected_address(address: Any) -> Source:
    """Convert an address of the other parser."""
    return (str(address[0]), address[1]) if isinstance(address, tuple) else address


def assert_agrees(data: bytes, start: int) -> None:
    """Compare addresses and fields, which begin at ``start``, with those of the other parser."""
    parsed = parse(data)
    other = ProxyProtocolV2().unpack(data)
    assert (parsed.source, parsed.destination) == (expected_address(other.source), expected_address(other.dest))
    assert dict(iterate_tlvs(data[start:])) == dict(other.tlv)


def test_header_of_any_family_agrees_with_another_parser() -> None:
    for family, addresses in FAMILIES.items():
        data = with_checksum(tlv(0x02, b"echo.example"), SSL, family=family, addresses=addresses)
        assert_agrees(data, len(header(family=family, addresses=addresses)))


def test_version_1_agrees_with_another_parser() -> None:
    for line in (
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n",  # the example of the specification
        b"PROXY TCP6 2001:db8::1 2001:db8::2 65535 443\r\n",
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN 192.168.0.1 192.168.0.11 56324 443\r\n",
    ):
        parsed, other = ProxyHeader("v1"), ProxyProtocolV1().unpack(line)
        parsed.feed(line)
        assert (parsed.version, parsed.tlvs) == (1, {})
        assert (parsed.source, parsed.destination) == (expected_address(other.source), expected_address(other.dest))


@given(st.dictionaries(st.integers(0, 255).filter(lambda kind: kind != 0x03), st.binary(max_size=30), max_size=8))
def test_fields_of_any_type_agree_with_another_parser(fields: dict[int, bytes]) -> None:
    data = with_checksum(*(tlv(kind, fields[kind]) for kind in sorted(fields)))
    assert_agrees(data, len(header()))


@given(st.binary(max_size=100))
def test_any_bytes_are_parsed_or_truncated(data: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(parse_tlvs(data), dict)
