"""TLS on every engine and event loop: echo, handshake failures and timeouts, client certificates, reload."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
import signal
import socket
import ssl
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from support import (
    TIMEOUT,
    Backend,
    Listener,
    StartServer,
    connect,
    connect_tls,
    is_echoed,
    listening,
    receive_all,
    receive_line,
    run_process,
    scrape_metrics,
    server_process,
    set_constant,
    single_error_line,
    wait_for,
    wait_until,
)
from tls_client import V1_2, V1_3, TlsClient

import echo_async
from echo_async.cli.server import main
from echo_async.config import Mode
from echo_async.tls import Certificates

RECORD_OVERHEAD = 22  # bytes of a record of TLS 1.3 besides its plaintext
REFUSED = r"(?i)alert|reset|broken|EOF|closed"


@pytest.fixture(scope="module")
def folder(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, with and without their keys, of a server, a client, an untrusted client and an expired server."""
    folder = tmp_path_factory.mktemp("certificates")
    other = trustme.CA()
    other.cert_pem.write_to_path(folder / "other_ca.pem")
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    for name, ca in {"server": authority, "client": authority, "untrusted": other, "expired": authority}.items():
        issued = ca.issue_cert("localhost", "127.0.0.1", not_after=yesterday if name == "expired" else None)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.crt")
        issued.private_key_and_cert_chain_pem.write_to_path(folder / f"{name}.pem")
    (folder / "folder.pem").mkdir()
    (folder / "invalid.pem").write_text("invalid")
    keys: list[str | Path] = ["-in", folder / "server.key", "-out", folder / "encrypted.key"]
    assert run_process(["openssl", "pkey", *keys, "-aes256", "-passout", "pass:secret"]).returncode == 0
    return folder


@pytest.fixture
def start_server(start_server: StartServer) -> StartServer:
    return partial(start_server, tls=True)


@pytest.mark.parametrize(
    ("version", "has_fin", "fault"), [(V1_2, True, None), (V1_3, False, None), (V1_3, False, "delay=0.05")]
)
def test_client_that_ends_its_side_receives_all_replies(
    start_server: StartServer,
    client_context: ssl.SSLContext,
    version: ssl.TLSVersion,
    has_fin: bool,
    fault: str | None,
) -> None:
    client_context.minimum_version = client_context.maximum_version = version
    message = os.urandom(10_000 if fault else 1_000_000).replace(b"\n", b"") + b"\n"
    with start_server(mode="stream", chunk_size=65536, fault=fault) as server, connect(server) as plain:
        client = TlsClient(client_context).handshake(plain)

        def send() -> None:
            plain.sendall(client_bytes)
            if has_fin:
                plain.shutdown(socket.SHUT_WR)

        client_bytes = client.record(message) + client.close_notify()
        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        assert client.receive(receive_all(plain))[0] == message
        sending.join(TIMEOUT)
        assert client.is_ended
        wait_for(server, active=0)
        assert (server.stats.messages, server.stats.lost, server.stats.tls_failures) == (1, 0, 0)


@pytest.mark.parametrize(("data", "end"), [(b"one\n", "closed"), (b"one\nrest", "lost")])
def test_client_that_closes_without_close_notify_is_no_reset(
    start_server: StartServer, client_context: ssl.SSLContext, data: bytes, end: str
) -> None:
    """As ``ssl.SSLSocket.close`` does. It answers the server's own close_notify with a reset."""
    with start_server(mode="stream") as server:
        with connect(server, client_context) as client:
            client.sendall(data)
            assert receive_line(client) == b"one\n"
        wait_for(server, active=0)
        assert server.stats.ended == {end: 1}


def test_server_that_ends_its_side_discards_what_follows(
    start_server: StartServer, client_context: ssl.SSLContext
) -> None:
    with start_server(mode="message") as server, connect(server) as plain:
        client = TlsClient(client_context).handshake(plain)
        plain.sendall(client.record(b"Hola Server!\n"))
        received = b""
        while not client.is_ended:
            received += client.receive(plain.recv(65536))[0]
        assert received == b"Hola Server!\n"
        assert receive_all(plain) == b"", "the connection beneath is half-closed as well"
        assert server.stats.active == 1
        plain.sendall(client.record(b"more") + client.close_notify())
        wait_for(server, active=0)
        assert receive_all(plain) == b""  # no reset
        assert (server.stats.bytes_in, server.stats.tls_failures) == (17, 0)


@pytest.mark.parametrize(
    ("mode", "replies", "rest", "records"),
    [
        ("stream", b"a chunk of 20 bytes\n" * 40, b"incomplete", 1),
        ("raw", b"a chunk of 20 bytes\n" * 40, b"", 1),
        ("stream", b"not delayed by\n" + b"x" * 1500 + b"\n", b"", 2),
    ],
)
def test_replies_to_chunks_at_hand_are_one_record(
    mode: Mode,
    replies: bytes,
    rest: bytes,
    records: int,
    backend: Backend,
    start_server: StartServer,
    client_context: ssl.SSLContext,
) -> None:
    """Nor are they one packet each, which shows only in TLS. No reply waits for many chunks of another."""
    with start_server(mode=mode, chunk_size=20) as server, connect(server) as plain:
        client = TlsClient(client_context).handshake(plain)
        for sent, expected in ((b"first\n", b"first\n"), (replies + rest, replies)):
            start, received = len(client.received), b""
            plain.sendall(client.record(sent))
            while len(received) < len(expected):
                received += client.receive(plain.recv(65536))[0]
            assert received == expected
        records = 1 if backend.engine == "protocol" else records  # which reads more at a time
        assert len(client.received) - start == len(replies) + records * RECORD_OVERHEAD


def test_silent_tls_clients_use_the_limit_and_time_out(
    start_server: StartServer, client_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_constant(monkeypatch, "HANDSHAKE_TIMEOUT", 0.5)
    with start_server(limit_connections=3) as server:
        silent = [connect(server) for _ in range(3)]
        with connect(server) as one_more:
            wait_for(server, refused=1)
            one_more.close()
        wait_for(server, timeouts_handshake=3)
        for client in silent:
            with suppress(ConnectionError):
                assert receive_all(client) == b""
            client.close()
        monkeypatch.undo()  # on a busy machine, a handshake can take as long
        with connect_tls(server, client_context) as client:
            assert is_echoed(client, b"room again\n")


def test_ssl_ca_certs_requires_a_client_certificate(
    start_server: StartServer, client_context: ssl.SSLContext, ca_file: Path, folder: Path, tmp_path: Path
) -> None:
    """A reload with other CAs applies to new connections only. With TLS 1.3, a client sees a refusal when it reads."""
    trusted = tmp_path / "trusted.pem"
    shutil.copy(ca_file, trusted)

    def connect_as(name: str) -> ssl.SSLSocket:
        client_context.load_cert_chain(folder / f"{name}.pem")
        return connect_tls(server, client_context)

    with start_server(mode="stream", ssl_ca_certs=str(trusted)) as server:
        with pytest.raises(OSError, match=REFUSED), connect_tls(server, client_context) as client:
            is_echoed(client)
        old = connect_as("client")
        with pytest.raises(OSError, match=REFUSED), connect_as("untrusted") as client:
            is_echoed(client)
        shutil.copy(folder / "other_ca.pem", trusted)
        server.reload_certificates()
        with pytest.raises(OSError, match=REFUSED), connect_as("client") as client:
            is_echoed(client)
        for client in (old, connect_as("untrusted")):
            assert is_echoed(client, b"welcome\n")
            client.close()
        wait_for(server, tls_failures=3)


def test_tls_1_1_and_plain_text_are_refused(
    start_server: StartServer, client_context: ssl.SSLContext, authority: trustme.CA
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with start_server() as server:
        with pytest.raises(OSError, match=r"(?i)alert|reset|EOF|no protocols|version"):
            connect_tls(server, context)
        with connect(server) as client, suppress(ConnectionError):
            client.sendall(b"Hola Server!\n")
            assert not receive_all(client).endswith(b"Hola Server!\n")
        wait_for(server, tls_failures=2)
        with connect_tls(server, client_context) as secured:
            assert secured.version() in ("TLSv1.2", "TLSv1.3")


def test_reload_during_handshakes_fails_none(
    start_server: StartServer, client_context: ssl.SSLContext, folder: Path, tmp_path: Path
) -> None:
    served = tmp_path / "served.pem"
    shutil.copy(folder / "server.pem", served)
    done = threading.Event()

    def reload_repeatedly() -> None:
        for name in itertools.cycle(["client", "server"]):
            if done.is_set():
                return
            shutil.copy(folder / f"{name}.pem", served)
            server.reload_certificates()

    with start_server(mode="stream", tls=False, ssl_certfile=str(served)) as server:
        reloading = threading.Thread(target=reload_repeatedly, daemon=True)
        reloading.start()
        try:
            for _ in range(20):
                with connect_tls(server, client_context) as client:
                    assert is_echoed(client)
        finally:
            done.set()
            reloading.join(TIMEOUT)
        served.write_text("invalid")
        with pytest.raises(echo_async.StartError, match=r"served\.pem"):
            server.reload_certificates()
        connect_tls(server, client_context).close()


def test_invalid_certificate_is_one_error_line_with_the_path(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for options in (
        *(f"--ssl-certfile {name}" for name in ("missing.pem", "folder.pem", "invalid.pem", "server.crt")),
        *(f"{kind} --ssl-certfile expired.pem" for kind in ("", "--threaded", "--workers 2")),
        *(f"--ssl-certfile server.crt --ssl-keyfile {name}.key" for name in ("missing", "client", "encrypted")),
        "--ssl-certfile server.pem --ssl-ca-certs invalid.pem",
    ):
        *_, path = arguments = options.split()
        assert main(["--port", "0", *arguments]) == 3, options
        assert path in single_error_line(*capsys.readouterr()), options


def test_key_password_is_used_and_never_shown(folder: Path, client_context: ssl.SSLContext) -> None:
    options = ("--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "encrypted.key"))
    with server_process(*options, env={"ECHO_ASYNC_SSL_KEYFILE_PASSWORD": "secret"}) as server:
        with connect_tls(server, client_context) as client:
            assert is_echoed(client)
        log = server.stop()
    assert "secret" not in log
    assert "secret" not in repr(echo_async.ServerConfig(ssl_certfile="c", ssl_keyfile_password="secret"))


@pytest.mark.parametrize("kind", [[], ["--threaded"], ["--workers", "2"]], ids=" ".join)
def test_sighup_reloads_the_certificate_of_tls_listeners(
    kind: list[str], folder: Path, client_context: ssl.SSLContext, tmp_path: Path
) -> None:
    """Connections stay open. A certificate that is invalid changes nothing. The metrics count each certificate."""
    served = tmp_path / "served.pem"
    shutil.copy(folder / "server.pem", served)
    options = ("--mode", "stream", "--ssl-certfile", str(served), "--metrics-port", "0", *kind)
    with listening("0,tls", "0", "0,tls", options=options) as (server, [first, _, third]):
        server.wait_for_log(" server started: ")
        [certificate, *_] = x509.load_pem_x509_certificates(served.read_bytes())
        expiry = scrape_metrics(server.log)["echo_async_certificate_expiry_timestamp_seconds"]
        assert expiry == certificate.not_valid_after_utc.timestamp()
        with connect_tls(first, client_context) as old:
            before = old.getpeercert(binary_form=True)

            def has_new_certificate(listener: Listener) -> bool:
                with connect_tls(listener, client_context) as client:
                    assert is_echoed(client)
                    return client.getpeercert(binary_form=True) != before

            shutil.copy(folder / "client.pem", served)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for_log("SIGHUP received: certificates reloaded\n")
            wait_until(lambda: has_new_certificate(first) and has_new_certificate(third))
            served.write_text("invalid")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for_log("reload failed, keeping the previous certificates: ")
            samples = scrape_metrics(server.log)
            reloads = [samples[f"echo_async_certificate_reloads_total[{kind}]"] for kind in ("success", "failure")]
            assert reloads == [2, 1]
            assert has_new_certificate(first)
            assert is_echoed(old, b"still open\n")
        server.stop()


def test_certificate_replaced_while_it_is_loaded_is_a_start_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker ends on any other error, and with it all of its connections."""
    served = tmp_path / "served.pem"
    shutil.copy(folder / "server.pem", served)
    load = ssl.SSLContext.load_cert_chain

    def load_and_replace(*args: Any) -> None:
        load(*args)
        served.write_text("invalid")

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_and_replace)
    with pytest.raises(echo_async.StartError, match=r"cannot load the certificate .*served\.pem"):
        Certificates(echo_async.ServerConfig(ssl_certfile=served))
