"""The PROXY protocol: the parser against the specification, and servers that require a header."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
import tracemalloc
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import StartServer, connect, count_events, is_echoed, receive_all, receive_line, reset, wait_for

import echo_async
from echo_async.server.accept_loop import AcceptLoop
from echo_async.server.admission import Admission
from echo_async.server.proxy_reader import receive_header
from echo_async.server.registry import Registry
from echo_async.wire.networks import Networks
from echo_async.wire.proxy import ProxyHeader, ProxyHeaderError, Source

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
CLIENT4, CLIENT6 = ("192.168.0.1", 56324), ("2001:db8::1", 65535)


def v2(command: int, family: int, addresses: bytes = b"", tlvs: bytes = b"") -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(addresses + tlvs)) + addresses + tlvs


def pack_addresses(source: str, destination: str, ports: tuple[int, int]) -> bytes:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    return socket.inet_pton(family, source) + socket.inet_pton(family, destination) + struct.pack("!HH", *ports)


def pack_unix(source: bytes, destination: bytes = b"/run/server") -> bytes:
    return source.ljust(108, b"\0") + destination.ljust(108, b"\0")


TCP4 = pack_addresses("192.168.0.1", "192.168.0.11", (56324, 443))
TCP6 = pack_addresses("2001:db8::1", "2001:db8::2", (65535, 443))
TLV = b"\x04\x00\x03pad" + b"\x02\x00\x0bexample.org"
LONGEST = b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"

HEADERS: dict[bytes, Source] = {
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n": CLIENT4,  # the example of the specification
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": ("255.255.255.255", 65535),
    b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n": ("0.0.0.0", 0),
    b"PROXY TCP6 2001:db8::1 2001:DB8:0:0::2 65535 443\r\n": CLIENT6,
    b"PROXY TCP6 %b %b 65535 65535\r\n" % (LONGEST, LONGEST): (LONGEST.decode(), 65535),
    b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n": ("::ffff:192.0.2.1", 1),
    b"PROXY UNKNOWN\r\n": None,
    b"PROXY UNKNOWN any text, even \r or \n\r\n": None,
    b"PROXY UNKNOWN %b %b 65535 65535\r\n" % (LONGEST, LONGEST): None,  # 107 bytes, the maximum
    v2(0x21, 0x11, TCP4): CLIENT4,
    v2(0x21, 0x11, TCP4, TLV): CLIENT4,
    v2(0x21, 0x21, TCP6): CLIENT6,
    v2(0x21, 0x21, TCP6, TLV * 127 + b"\xe9\xf0\0" + bytes(0xF000)): CLIENT6,
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
    v2(0x20, 0xFF, TLV): None,  # LOCAL: the family is ignored
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
    SIGNATURE[:-1] + b"\r": "no PROXY signature",
    SIGNATURE + b"\x11": "unknown version and command 0x11",
    SIGNATURE + b"\x21\x41": "unknown family and transport 0x41",
    SIGNATURE + b"\x21\x13": "unknown family and transport 0x13",
    v2(0x21, 0x11, TCP4[:-1]): "address block of 11 bytes, expected at least 12",
    v2(0x21, 0x21, TCP4): "address block of 12 bytes, expected at least 36",
    v2(0x21, 0x31, pack_unix(b"")[:-1]): "address block of 215 bytes, expected at least 216",
}


def assert_finished(header: ProxyHeader, source: Source) -> None:
    assert header.finished
    assert header.source == source


# Parser


def test_parser_consumes_the_header_and_no_more() -> None:
    for header, source in HEADERS.items():
        for rest in (b"", b"\n", b"Hola Server!\n", b"PROXY UNKNOWN\r\n" * 100):
            parser = ProxyHeader()
            assert parser.feed(header + rest) == parser.received == len(header)
            assert_finished(parser, source)


@given(header=st.sampled_from([each for each in HEADERS if len(each) < 1000]), rest=st.binary(), data=st.data())
def test_parser_fed_any_split_gives_the_same_source(header: bytes, rest: bytes, data: st.DataObject) -> None:
    parser, sent, at = ProxyHeader(), header + rest, 0
    while not parser.finished:
        at += parser.feed(sent[at : at + data.draw(st.integers(1, len(sent)))])
    assert at == len(header)
    assert_finished(parser, HEADERS[header])


@given(source=st.from_type(IPv4Address) | st.from_type(IPv6Address), port=st.integers(0, 65535))
def test_parser_reads_every_address_in_both_versions(source: IPv4Address | IPv6Address, port: int) -> None:
    address = str(source)
    line = f"PROXY TCP{source.version} {address} {address} {port} 1\r\n".encode()
    binary = v2(0x21, 0x11 if source.version == 4 else 0x21, pack_addresses(address, address, (port, 1)))
    for header in (line, binary):
        parser = ProxyHeader()
        parser.feed(header)
        assert isinstance(parser.source, tuple)
        assert type(source)(parser.source[0]) == source
        assert parser.source[1] == port


def test_malformed_header_is_rejected_with_the_reason() -> None:
    for header, reason in MALFORMED.items():
        with pytest.raises(ProxyHeaderError) as caught:
            ProxyHeader().feed(header)
        assert reason in str(caught.value)
        assert str(caught.value).isprintable()
        byte_by_byte = ProxyHeader()
        with pytest.raises(ProxyHeaderError):
            deque(map(byte_by_byte.feed, (header[index : index + 1] for index in range(len(header)))))


@given(st.binary(min_size=1, max_size=300) | st.binary(max_size=300).map(SIGNATURE.__add__))
def test_parser_fed_any_bytes_consumes_or_rejects_them(data: bytes) -> None:
    parser = ProxyHeader()
    with suppress(ProxyHeaderError):
        assert 0 < parser.feed(data) <= len(data)
        assert parser.finished or parser.received == len(data)


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


# Servers


@pytest.fixture
def start_server(start_server: StartServer) -> StartServer:
    """Start servers that expect a PROXY header of either version."""
    return partial(start_server, proxy_protocol="auto")


def assert_closed(client: socket.socket) -> None:
    with suppress(ConnectionError):
        assert receive_all(client) == b""


V1_HEADER = b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"


def test_log_shows_the_source_address_of_the_header(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    shown = {
        V1_HEADER: "192.168.0.1:56324",
        v2(0x21, 0x21, TCP6, TLV): "[2001:db8::1]:65535",
        v2(0x21, 0x31, pack_unix(b"/run/\x1bclient")): "/run/\\x1bclient",
        b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n": "192.0.2.1:1",
        v2(0x20, 0): None,
    }
    with start_server() as server:
        for header, peer in shown.items():
            with connect(server) as client:
                address = "{}:{}".format(*client.getsockname())
                client.sendall(header + b"Hola Server!\n")
                assert receive_all(client) == b"Hola Server!\n"
                assert f"{peer or address} 13 bytes: Hola Server!" in caplog.messages
        wait_for(server, active=0)
    stats = server.stats
    assert (stats.accepted, stats.messages, stats.bytes_in, stats.bytes_out) == (5, 5, 65, 65)
    assert stats.proxy_failures == stats.tls_failures == 0


def test_header_sent_byte_by_byte_precedes_the_messages(start_server: StartServer) -> None:
    with start_server(mode="stream") as server:
        for header in (V1_HEADER, v2(0x21, 0x11, TCP4, TLV)):
            with connect(server) as client:
                for index in range(len(header)):
                    client.sendall(header[index : index + 1])
                for message in (b"one\n", V1_HEADER, b"x" * 10_000 + b"\n"):  # a second header is a message
                    client.sendall(message)
                    assert receive_line(client, len(message)) == message


def test_invalid_or_missing_header_closes_and_is_counted(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    invalid = [b"Hola Server!\n", b"PROXY TCP4 nonsense\r\n", SIGNATURE + b"\x31", v2(0x21, 0x11)]
    with start_server(mode="stream") as server:
        for header in invalid:
            with connect(server) as client:
                client.sendall(header + b"one\n")
                assert_closed(client)
        for is_reset in (False, True):
            with connect(server) as client:
                client.sendall(V1_HEADER[:10])
                if is_reset:
                    reset(client)
                else:
                    client.shutdown(socket.SHUT_WR)
                    assert_closed(client)
        wait_for(server, proxy_failures=6)
    assert server.stats.accepted == server.stats.bytes_in == server.stats.lost == 0
    lines = [message for message in caplog.messages if "PROXY" in message]  # rate limited
    assert lines[0].endswith(" invalid PROXY header: no PROXY signature, received Hola Server!\\none")
    assert lines[-1].partition(" (")[0].endswith(" invalid PROXY header: truncated after 10 bytes")
    assert sum(map(count_events, lines)) == 6


def test_missing_or_incomplete_header_times_out(start_server: StartServer) -> None:
    with start_server(timeout_message=0.8, limit_connections=2) as server:
        with connect(server) as silent, connect(server) as slow:
            slow.sendall(v2(0x21, 0x11, TCP4)[:20])
            connect(server).close()
            wait_for(server, refused=1)  # those without a header count for the limit
            assert_closed(silent)
            assert_closed(slow)
        wait_for(server, timeouts_message=2)
        with connect(server) as client:
            client.sendall(V1_HEADER + b"room again\n")
            assert receive_all(client) == b"room again\n"
    assert server.stats.proxy_failures == 0


def test_peer_outside_proxy_allow_from_is_closed(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    with start_server(proxy_allow_from="10.0.0.0/8,192.0.2.1") as server:
        with connect(server) as client:
            assert_closed(client)
        wait_for(server, proxy_failures=1)
    assert "connection refused: not in proxy_allow_from" in caplog.text


def test_stop_serves_connections_with_complete_headers(start_server: StartServer) -> None:
    with start_server(mode="stream") as server:
        clients = [connect(server) for _ in range(20)]
        for client in clients[10:]:
            client.sendall(V1_HEADER + b"one\n")
        clients[0].sendall(V1_HEADER[:-1])
        server.close()
        for client in clients[:10]:
            assert_closed(client)
        for client in clients[10:]:
            assert receive_all(client) == b"one\n"
        for client in clients:
            client.close()
    assert (server.stats.messages, server.stats.active) == (10, 0)
    assert server.stats.proxy_failures == 0  # a connection closed by the stop is not a failure


class SingleByteSocket(socket.socket):
    """A socket from which every read returns one byte of a header."""

    def settimeout(self, value: float | None) -> None:
        assert value is None or value > 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        return b"P" if flags else b""


def test_header_timeout_is_not_extended_by_single_bytes() -> None:
    header = ProxyHeader()
    header.feed(v2(0x21, 0x11, TCP4, b"\0" * 60_000)[:20])
    with SingleByteSocket() as client, pytest.raises(TimeoutError):
        receive_header(client, header, 1e-6)
    assert not header.finished


def test_header_timeout_over_the_socket_maximum_is_accepted() -> None:
    client, accepted = socket.socketpair()
    with client, accepted:
        client.sendall(b"PROXY UNKNOWN\r\n")
        receive_header(accepted, ProxyHeader(), 1e11)


class SingleAcceptLoop(asyncio.SelectorEventLoop):
    """An event loop that accepts one client, and calls ``on_next_accept`` before it does anything else."""

    clients: list[socket.socket]
    on_next_accept: Callable[[], object]

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
        if self.clients:
            return self.clients.pop(), ("127.0.0.1", 1)
        self.on_next_accept()
        raise asyncio.CancelledError


def test_close_at_the_moment_of_accept_closes_the_connection() -> None:
    async def main() -> None:
        admission = Admission(Registry(echo_async.ServerConfig(proxy_protocol="auto")))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SingleAcceptLoop)
        loop.clients = [accepted]
        loop.on_next_accept = AcceptLoop(admission, loop, accepted, None, lambda registry, slot: asyncio.Protocol).close
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert admission.is_idle

    client, accepted = socket.socketpair()
    with client, accepted, asyncio.Runner(loop_factory=SingleAcceptLoop) as runner:
        runner.run(main())
        assert client.recv(1) == b""


def test_large_header_is_not_kept_in_memory(start_server: StartServer) -> None:
    """Its fields are reported in mode ``identify`` only."""
    header = v2(0x21, 0x11, TCP4, b"\xe9" + struct.pack("!H", 60_000) + bytes(60_000))
    with start_server(mode="stream", proxy_protocol="v2") as server, ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            client = stack.enter_context(connect(server))
            client.sendall(header)
            assert is_echoed(client)
        after, _ = tracemalloc.get_traced_memory()
    assert after - before < 20 * 30_000


def test_header_precedes_the_tls_handshake(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start_server(tls=True) as server:
        for header in (V1_HEADER, v2(0x21, 0x11, TCP4, TLV)):
            plain = connect(server)
            plain.sendall(header)
            with client_context.wrap_socket(plain, server_hostname="localhost") as client:
                client.sendall(b"secret\n")
                assert receive_line(client) == b"secret\n"
        with connect(server) as client:
            client.sendall(V1_HEADER + b"no TLS\n")
            with suppress(ConnectionError):
                receive_all(client)
        wait_for(server, tls_failures=1)
        with connect(server) as plain, pytest.raises(OSError, match=r"(?i)reset|EOF|closed|broken"):
            client_context.wrap_socket(plain, server_hostname="localhost")
        wait_for(server, proxy_failures=1)
    assert caplog.text.count(" 192.168.0.1:56324 7 bytes: secret") == 2
    assert "192.168.0.1:56324 TLS handshake failed" in caplog.text
