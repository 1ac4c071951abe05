"""PROXY headers that clients send, as servers of this package read them."""

from __future__ import annotations

import logging
import ssl
import threading
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
from clients import Connect, Echo
from support import TIMEOUT

import echo_async
from echo_async import sync
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import Peer
from echo_async.wire.proxy import ProxyHeader, build_header, parse_address

pytestmark = pytest.mark.usefixtures("no_leaks")

VERSIONS: tuple[Literal["v1", "v2"], ...] = ("v1", "v2")


def test_client_sends_the_proxy_source(echo: Echo, caplog: pytest.LogCaptureFixture) -> None:
    """Its own address by default."""
    caplog.set_level(logging.INFO, "echo_async.access")
    sources = ("192.0.2.1:40000", "[2001:db8::1]:7", None)
    for version in VERSIONS:
        caplog.clear()
        with sync.serve(port=0, proxy_protocol=version) as server:
            for source in sources:
                assert echo("Hola Server!", *server.address, send_proxy=version, proxy_source=source) == "Hola Server!"
        shown = sorted(line.removesuffix(" 13 bytes: Hola Server!") for line in caplog.messages)
        assert shown[0].startswith("127.0.0.1:")
        assert shown[1:] == list(sources[:2])


def test_client_sends_the_header_before_tls(echo: Echo, certificate: Path, client_context: ssl.SSLContext) -> None:
    with sync.serve(port=0, proxy_protocol="auto", ssl_certfile=str(certificate)) as server:
        for version in VERSIONS:
            assert echo("secret", *server.address, ssl=client_context, send_proxy=version) == "secret"


def test_client_of_a_unix_socket_sends_a_header(echo: Echo, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with sync.serve(uds=path, proxy_protocol="auto"):
        for version in VERSIONS:
            assert echo("hola", uds=path, send_proxy=version) == "hola"
            assert echo("hola", uds=path, send_proxy=version, proxy_source="192.0.2.1:1") == "hola"


def test_connection_reset_before_the_header_is_closed(
    connect: Connect, faulty_server: MakeEchoServer, caplog: pytest.LogCaptureFixture
) -> None:
    reset = threading.Event()

    def serve(peer: Peer) -> None:
        peer.reset()
        reset.set()

    def pause(record: logging.LogRecord) -> bool:
        """Delay the log line before the header until the reset has arrived."""
        return not record.getMessage().startswith("connected to ") or reset.wait(TIMEOUT)

    server = faulty_server(handler=serve)
    caplog.set_level(logging.DEBUG, "echo_async.client")
    caplog.handler.addFilter(pause)
    try:
        with pytest.raises(echo_async.ConnectError, match="cannot connect to"):
            connect(*server.address, send_proxy="v1")
    finally:
        caplog.handler.removeFilter(pause)


ADDRESSES = [
    ("192.0.2.1:1", "192.0.2.2:65535", ("192.0.2.1", 1)),
    ("[2001:db8::1]:65535", "[::1]:1", ("2001:db8::1", 65535)),
    ("192.0.2.1:1", "[::1]:1", ("::ffff:192.0.2.1", 1)),
    ("[2001:db8::1]:1", "127.0.0.1:1", ("2001:db8::1", 1)),
]


def test_header_is_parsed_as_it_was_built() -> None:
    for version, (source, destination, parsed) in product(VERSIONS, ADDRESSES):
        built = build_header(version, parse_address(source), parse_address(destination))
        header = ProxyHeader(version)
        assert header.feed(built + b"message") == len(built)
        assert (header.finished, header.source) == (True, parsed)
