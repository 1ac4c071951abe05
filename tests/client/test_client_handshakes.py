"""What precedes the messages: the PROXY header, as servers of this package read it, and the TLS handshake."""

from __future__ import annotations

import logging
import ssl
import threading
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
import trustme
from clients import Connect, Echo
from support import TIMEOUT

import echo_async
from echo_async import sync, tls
from echo_async.cli.client import main
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import Peer
from echo_async.wire.proxy import ProxyHeader, build_header, parse_address

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_close_during_reset_completes(
    connect: Connect, faulty_server: MakeEchoServer, certificate: Path, client_context: ssl.SSLContext
) -> None:
    closed = threading.Event()

    def serve(peer: Peer) -> None:
        peer.send(peer.receive_line())
        closed.wait(TIMEOUT)
        peer.reset()

    server = faulty_server(handler=serve, ssl_certfile=str(certificate))
    with connect(*server.address, ssl=client_context) as client:
        assert client.echo("a") == "a"
        client.close()
        client.close()
        closed.set()


def test_connect_verifies_the_certificate(
    echo: Echo, faulty_server: MakeEchoServer, certificate: Path, client_context: ssl.SSLContext
) -> None:
    address = faulty_server(ssl_certfile=certificate).address
    with pytest.raises(echo_async.ConnectError, match="TLS: certificate verify failed: "):
        echo("Hola", *address, ssl=True, retry=TIMEOUT)  # not retried
    with pytest.raises(echo_async.ConnectError, match=r"'other\.example'"):
        echo("Hola", *address, ssl=client_context, server_hostname="other.example")
    assert echo("Hola", *address, ssl=client_context, server_hostname="localhost") == "Hola"
    assert echo("Hola", *address, ssl=tls.client_context(verify=False)) == "Hola"


def test_connect_client_certificate_is_sent(
    echo: Echo,
    faulty_server: MakeEchoServer,
    certificate: Path,
    authority: trustme.CA,
    ca_file: Path,
    tmp_path: Path,
    client_context: ssl.SSLContext,
) -> None:
    own = tmp_path / "client.pem"
    authority.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(str(own))
    server = faulty_server(ssl_certfile=certificate, ssl_ca_certs=ca_file)
    with_certificate = tls.client_context(ca_certs=str(ca_file), certfile=str(own))
    assert echo("Hola", *server.address, ssl=with_certificate) == "Hola"
    # The alert, the end or the reset can come first, or the write fails because of it.
    with pytest.raises(echo_async.ReplyLost, match=r"certificate required|reset by peer|broken pipe|eof occurred"):
        echo("Hola", *server.address, ssl=client_context)


def test_connect_server_without_tls_raises(echo: Echo, faulty_server: MakeEchoServer) -> None:
    def greet(peer: Peer) -> None:
        peer.send(b"220 mail.example ESMTP\r\n")
        peer.receive_line()

    server = faulty_server(handler=greet)
    with pytest.raises(echo_async.ConnectError, match=r"cannot connect to .*: TLS: "):
        echo("Hola", *server.address, ssl=True)


def test_connect_stalled_handshake_times_out(echo: Echo, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="stall")
    with pytest.raises(echo_async.ConnectTimeout):
        echo("Hola", *server.address, ssl=True, connect_timeout=0.1)


def test_command_tls_options(
    faulty_server: MakeEchoServer, certificate: Path, ca_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = faulty_server(ssl_certfile=certificate)

    def client(*args: str) -> tuple[int, str, str]:
        code = main(["--port", str(server.port), *args, "hola"])
        return code, *capfd.readouterr()

    assert client("--ssl-ca-certs", str(ca_file)) == (0, "hola\n", "")
    code, _, stderr = client("--ssl")
    assert (code, stderr.count("\n")) == (3, 1)
    assert "certificate verify failed" in stderr
    assert client("--ssl-no-verify", "--quiet") == (0, "hola\n", "")
    code, _, stderr = client("--ssl-no-verify", "--verbose")
    assert "warning: the server certificate is not verified" in stderr
    assert "* TLS handshake completed in " in stderr
    assert code == 0


def test_client_context_invalid_file_raises(certificate: Path, tmp_path: Path) -> None:
    invalid = tmp_path / "invalid.pem"
    invalid.write_text("invalid")
    for options, text in (
        ({"ca_certs": "/nonexistent"}, "ssl_ca_certs /nonexistent: no such file or directory"),
        ({"ca_certs": str(invalid)}, "no certificate or crl found"),
        ({"certfile": str(invalid)}, f"ssl_certfile {invalid}: "),
        ({"keyfile": str(certificate)}, "ssl_keyfile requires ssl_certfile"),
    ):
        with pytest.raises(echo_async.ConfigError, match=text):
            tls.client_context(**options)  # type: ignore[arg-type]
    assert tls.client_context().minimum_version is ssl.TLSVersion.TLSv1_2


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
    connect: Connect, faulty_server: MakeEchoServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    monkeypatch.setattr(logging.getLogger("echo_async.client"), "filters", [pause])
    with pytest.raises(echo_async.ConnectError, match="cannot connect to"):
        connect(*server.address, send_proxy="v1")


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
