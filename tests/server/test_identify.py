"""``identify`` mode on every engine and event loop, and the clients of it."""

from __future__ import annotations

import json
import os
import socket
import ssl
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from support import StartServer, connect, connect_tls, receive_line, run

import echo_async
from echo_async import Identity, ReplyDifferent, sync
from echo_async.cli.client import main as client_main
from echo_async.config import ServerOptions
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer
from echo_async.wire.proxy import build_header


def identify(client: Any, message: bytes) -> Identity:
    client.sendall(message)
    return Identity.parse(receive_line(client))


def test_reply_describes_server_connection_and_message(start_server: StartServer) -> None:
    with start_server(mode="identify", host="::1", labels={"zone": "a"}) as server, connect(server) as client:
        first = identify(client, b"Hola Server!\n")
        second = identify(client, b"\xff\n")
        assert (first.message, first.bytes, first.number) == ("Hola Server!", 13, 1)
        assert (second.message, second.message_base64, second.bytes, second.number) == (None, "/w==", 2, 2)
        assert (first.server.pid, first.server.hostname) == (os.getpid(), socket.gethostname())
        assert first.server.address == f"[::1]:{client.getpeername()[1]}"
        assert (first.server.engine, first.server.version) == (server.config.engine, echo_async.__version__)
        assert first.server.labels == {"zone": "a"}
        assert (first.client.address, first.client.port) == client.getsockname()[:2]
        assert (first.proxy, first.tls) == (None, None)
        assert first.server == second.server


def test_reply_on_a_unix_socket_has_no_port(start_server: StartServer, tmp_path: Path) -> None:
    with start_server(mode="identify", uds=str(tmp_path / "echo.sock")) as server, connect(server) as client:
        identity = identify(client, b"x\n")
        assert identity.server.address == str(tmp_path / "echo.sock")
        assert (identity.client.address, identity.client.port) == (None, None)


@pytest.mark.parametrize(("version", "tls"), [("v1", False), ("v2", True)])
def test_reply_reports_the_proxy_header(
    version: str, tls: bool, start_server: StartServer, client_context: ssl.SSLContext
) -> None:
    header = build_header(version, ("192.0.2.1", 4711), ("192.0.2.9", 443))
    with start_server(mode="identify", proxy_protocol="auto", tls=tls) as server, connect(server) as plain:
        plain.sendall(header)
        peer = plain.getsockname()
        client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
        with client:
            identity = identify(client, b"x\n")
    assert (identity.client.address, identity.client.port) == ("192.0.2.1", 4711)
    assert identity.proxy is not None
    assert identity.proxy.version == int(version[1])
    assert (identity.proxy.peer.address, identity.proxy.peer.port) == peer
    assert (identity.proxy.destination.address, identity.proxy.destination.port) == ("192.0.2.9", 443)
    assert (identity.tls is not None) is tls


def test_reply_reports_the_tls_session(
    start_server: StartServer, authority: trustme.CA, ca_file: Path, client_context: ssl.SSLContext
) -> None:
    issued = authority.issue_cert("client.example", common_name="client")
    issued.configure_cert(client_context)
    client_context.set_alpn_protocols(["h2", "echo"])
    options: ServerOptions = {"ssl_ca_certs": str(ca_file), "ssl_alpn": "echo, raw"}
    with (
        start_server(mode="identify", tls=True, **options) as server,
        connect_tls(server, client_context) as client,
    ):
        identity = identify(client, b"x\n")
        version, cipher = client.version(), client.cipher()
    assert identity.tls is not None
    assert cipher is not None
    assert (identity.tls.version, identity.tls.cipher) == (version, cipher[0])
    assert (identity.tls.sni, identity.tls.alpn) == ("localhost", "echo")
    certificate = identity.tls.client_certificate
    assert certificate is not None
    assert (certificate.subject or "").endswith(",CN=client")
    assert certificate.sans == ["DNS:client.example"]
    own = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())
    assert int(certificate.serial or "", 16) == own.serial_number


def test_reply_without_sni_and_alpn_has_null(start_server: StartServer, client_context: ssl.SSLContext) -> None:
    client_context.check_hostname = False
    with start_server(mode="identify", tls=True) as server, client_context.wrap_socket(connect(server)) as client:
        tls = identify(client, b"x\n").tls
    assert tls is not None
    assert (tls.sni, tls.alpn, tls.client_certificate) == (None, None, None)


def test_pipelined_messages_are_answered_in_order_and_logged(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "echo_async.access")
    with start_server(mode="identify") as server, connect(server) as client:
        client.sendall(b"".join(b"%d\n" % number for number in range(500)))
        client.shutdown(socket.SHUT_WR)
        lines = client.makefile("rb").readlines()
        assert [json.loads(line)["message"] for line in lines] == [str(number) for number in range(500)]
        assert [json.loads(line)["number"] for line in lines] == [*range(1, 501)]
        stats = server.stats
    assert (stats.messages, stats.bytes_out) == (500, sum(map(len, lines)))
    assert [line.partition(" bytes: ")[2] for line in caplog.messages] == [str(number) for number in range(500)]


def test_replies_of_a_flood_are_not_collected(start_server: StartServer) -> None:
    """A reply is 300 times as long as its message: each is made when the previous one is sent."""
    with start_server(mode="identify", timeout_write=0.3) as server, connect(server) as client:
        with suppress(ConnectionError):
            while True:
                client.sendall(10_000 * b"\n")
        assert server.stats.timeouts_write == 1
        assert server.stats.bytes_out < 20_000_000


def test_faults_apply_to_the_replies(start_server: StartServer) -> None:
    with start_server(mode="identify", fault_sequence=["close=10", "duplicate"]) as server:
        with connect(server) as client:
            client.sendall(b"x\n")
            assert client.makefile("rb").read() == b'{"message"'
        with connect(server) as client:
            client.sendall(b"x\n")
            lines = client.makefile("rb")
            assert lines.readline() == lines.readline()


def test_clients_return_an_identity() -> None:
    with HostedServer(mode="identify") as server:
        with sync.connect(*server.address) as client:
            identities = [client.identify(message) for message in ("Hola", b"\xff")]

        async def main() -> list[Identity]:
            async with echo_async.connect(*server.address) as client:
                return [await client.identify(message) for message in ("one", b"\xff", "x" * 100_000)]

        identities += run(main)
    assert [each.number for each in identities] == [1, 2, 1, 2, 3]
    assert [each.bytes for each in identities] == [5, 2, 4, 2, 100_001]
    assert [each.message_base64 for each in identities] == [None, "/w==", None, "/w==", None]


def test_identify_of_other_replies_fails(faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        peer.receive_line()
        while True:
            peer.send(100_000 * b"x")

    async def main(server: HostedServer) -> None:
        async with echo_async.connect(*server.address) as client:
            await client.identify("Hola")

    for server, error in (
        (faulty_server(), "in identify mode"),
        (faulty_server(handler=serve), "too long: over 16414 bytes without a newline"),
    ):
        with sync.connect(*server.address) as client, pytest.raises(ReplyDifferent, match=error):
            client.identify("Hola")
        with pytest.raises(ReplyDifferent, match=error):
            run(partial(main, server))


def test_client_command_prints_the_replies(capfd: pytest.CaptureFixture[str]) -> None:
    with HostedServer(mode="identify") as server:
        arguments = ["--port", str(server.port), "--identify"]
        assert client_main([*arguments, "one", "two"]) == 0
        assert [json.loads(line)["message"] for line in capfd.readouterr().out.splitlines()] == ["one", "two"]
        assert client_main([*arguments, "--json", "one"]) == 0
        reply = json.loads(capfd.readouterr().out)
        assert (reply["ok"], reply["seq"], reply["identity"]["message"]) == (True, 1, "one")


def test_client_command_escapes_what_a_server_reports(
    faulty_server: MakeEchoServer, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """C1 controls, bidirectional overrides and line separators, in names that this version does not know as well."""
    hostile = "\x9b31m\u202e\u2028\x7f\u2066\U000e0001 ñ€😀"
    reply = {
        **{"message": "x", "bytes": 2, "number": 1, "kubernetes": {}, "client": {}, "proxy": None, "tls": None},
        "server": {"hostname": hostile, "labels": {hostile: hostile}},
        hostile: [hostile],
    }
    line = json.dumps(reply, ensure_ascii=False).encode().replace(b", ", b",\t\r")

    def serve(peer: Peer) -> None:
        peer.receive_line()
        peer.send(line + b"\n")

    server = faulty_server(handler=serve)
    assert client_main(["--port", str(server.address[1]), "--identify", "x"]) == 0
    text = capfdbinary.readouterr().out.decode()
    assert text.removesuffix("\n").isprintable()
    assert json.loads(text) == reply
    assert text.count("ñ€😀") == 5


def test_client_command_checks_the_reply(capfd: pytest.CaptureFixture[str]) -> None:
    with HostedServer() as server:
        arguments = ["--port", str(server.port), "--identify", "one"]
        assert client_main(arguments) == 1
        out, err = capfd.readouterr()
        assert (out, "in identify mode?" in err) == ("", True)
        assert client_main([*arguments, "--json"]) == 1
        assert json.loads(capfd.readouterr().out)["error"]["kind"] == "mismatch"
    assert client_main(["--identify", "--count", "1"]) == 2
    assert "--identify and --count are mutually exclusive" in capfd.readouterr().err
