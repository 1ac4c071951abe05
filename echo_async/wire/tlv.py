"""The type-length-value fields of a PROXY protocol version 2 header, without IO.

Specification: https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt, sections 2.2.1 to 2.2.7. Fields of cloud
providers are decoded as these document them:
AWS https://docs.aws.amazon.com/elasticloadbalancing/latest/network/edit-target-group-attributes.html,
Azure https://learn.microsoft.com/azure/private-link/private-link-service-overview,
Google https://cloud.google.com/vpc/docs/about-vpc-hosted-services.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Value = str | int | dict[str, "str | int | list[str]"]
"""Integers of 64 bits are text, because many readers of JSON round them."""

T = TypeVar("T")

FIELD = struct.Struct("!BH")  # type and length
MAX_TLVS = 256  # of a header. Its size alone allows 21,845, which would delay other connections
CRC32C, NOOP, SSL = 0x03, 0x04, 0x20
SSL_FIXED_PART = struct.Struct("!BI")  # client and verify
SSL_FLAGS = {0x01: "ssl", 0x02: "cert_conn", 0x04: "cert_sess"}
SSL_TEXTS = {0x21: "version", 0x22: "cn", 0x23: "cipher", 0x24: "sig_alg", 0x25: "key_alg"}
AWS, AZURE, GOOGLE = 0xEA, 0xEE, 0xE0
AWS_VPC_ENDPOINT_ID = AZURE_LINK_ID = b"\x01"  # the first byte of the value


def parse_tlvs(data: bytes) -> dict[str, Value | list[Value]]:
    """Return the fields by name; those of one name are a list. :exc:`ValueError` as :func:`iterate_tlvs`."""
    return _group_by_name(_decode_tlv(kind, value) for kind, value in iterate_tlvs(data) if kind != NOOP)


def _group_by_name(fields: Iterable[tuple[str, T]]) -> dict[str, T | list[T]]:
    grouped: dict[str, list[T]] = {}
    for name, value in fields:
        grouped.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in grouped.items()}


def iterate_tlvs(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each field. :exc:`ValueError` if one is truncated, or there are over ``MAX_TLVS``."""
    position = number = 0
    while position < len(data):
        if (number := number + 1) > MAX_TLVS:
            raise ValueError(f"too many TLVs: over {MAX_TLVS}")
        if len(data) - position < FIELD.size:
            raise ValueError(f"truncated TLV: {len(data) - position} bytes left, expected at least {FIELD.size}")
        kind, size = FIELD.unpack_from(data, position)
        position += FIELD.size
        if len(data) - position < size:
            raise ValueError(f"truncated TLV {kind:#04x}: {len(data) - position} bytes left, expected {size}")
        yield kind, data[position : position + size]
        position += size


def is_checksum_correct(header: bytes, start: int) -> bool:
    """Verify each CRC32C field of ``header``, whose fields begin at ``start``, as section 2.2.3 describes.

    If there are several, all are zeroed for the calculation, so that a header never needs more than one.
    """
    zeroed, checksums, position = bytearray(header), set(), start
    for kind, value in iterate_tlvs(header[start:]):
        position += FIELD.size + len(value)
        if kind == CRC32C:
            zeroed[position - len(value) : position] = bytes(len(value))
            checksums.add(value)
    return not checksums or checksums == {crc32c(zeroed).to_bytes(4)}


def crc32c(data: bytes | bytearray) -> int:
    """Return the CRC-32C (Castagnoli) of ``data``: RFC 9260 appendix A."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def _decode_tlv(kind: int, value: bytes) -> tuple[str, Value]:
    decoder = _DECODERS.get(kind)
    if decoder is not None and (decoded := decoder[1](value)) is not None:
        return decoder[0], decoded
    return f"{kind:#04x}", value.hex()


def _decode_text(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _decode_ssl(value: bytes) -> dict[str, str | int | list[str]] | None:
    if len(value) < SSL_FIXED_PART.size:
        return None
    client, verify = SSL_FIXED_PART.unpack_from(value)
    try:
        texts = _group_by_name(_decode_ssl_text(*field) for field in iterate_tlvs(value[SSL_FIXED_PART.size :]))
    except ValueError:
        return None
    return {"client": [name for flag, name in SSL_FLAGS.items() if client & flag], "verify": verify, **texts}


def _decode_ssl_text(kind: int, value: bytes) -> tuple[str, str]:
    text = _decode_text(value) if kind in SSL_TEXTS else None
    return (f"{kind:#04x}", value.hex()) if text is None else (SSL_TEXTS[kind], text)


def _decode_aws(value: bytes) -> str | None:
    return _decode_text(value[1:]) if value[:1] == AWS_VPC_ENDPOINT_ID else None


def _decode_azure(value: bytes) -> int | None:
    return int.from_bytes(value[1:], "little") if value[:1] == AZURE_LINK_ID and len(value) == 5 else None


def _decode_google(value: bytes) -> str | None:
    return str(int.from_bytes(value)) if len(value) == 8 else None


_DECODERS: dict[int, tuple[str, Callable[[bytes], Value | None]]] = {
    0x01: ("alpn", _decode_text),
    0x02: ("authority", _decode_text),
    CRC32C: ("crc32c", bytes.hex),
    0x05: ("unique_id", lambda value: text if (text := _decode_text(value)) and text.isprintable() else value.hex()),
    SSL: ("ssl", _decode_ssl),
    0x30: ("netns", _decode_text),
    AWS: ("aws_vpc_endpoint_id", _decode_aws),
    AZURE: ("azure_private_endpoint_linkid", _decode_azure),
    GOOGLE: ("gcp_psc_connection_id", _decode_google),
}
