"""TLS on every engine and event loop: echo, handshake failures and timeouts, client certificates, reload."""

from __future__ import annotations

import datetime
import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from support import (
    TIMEOUT,
    Backend,
    StartServer,
    connect,
    receive_all,
    receive_line,
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


class CertificateFiles:
    """Certificate files of a server, a client, an untrusted client and an expired server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca, self.other_ca = trustme.CA(), trustme.CA()
        self.ca_file = self.write("ca.pem", self.ca.cert_pem)
        now = datetime.datetime.now(datetime.UTC)
        self.server = self.issue("server", self.ca)
        self.client = self.issue("client", self.ca)
        self.untrusted = self.issue("untrusted", self.other_ca)
        self.expired = self.issue("expired", self.ca, now - datetime.timedelta(days=1))

    def issue(self, name: str, ca: trustme.CA, not_after: datetime.datetime | None = None) -> Path:
        cert = ca.issue_cert("localhost", "127.0.0.1", not_after=not_after)
        self.write(f"{name}.key", cert.private_key_pem)
        self.write(f"{name}.crt", cert.cert_chain_pems[0])
        return self.write(f"{name}.pem", cert.private_key_and_cert_chain_pem)

    def write(self, name: str, blob: trustme.Blob) -> Path:
        path = self.folder / name
        blob.write_to_path(str(path))
        return path

    def context(self, certificate: Path | None = None) -> ssl.SSLContext:
        """Return a client context that trusts the CA."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if certificate is not None:
            context.load_cert_chain(certificate)
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> CertificateFiles:
    return CertificateFiles(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def start_server(start_server: StartServer, files: CertificateFiles) -> StartServer:
    """Start servers with the certificate ``files.server``."""
    return partial(start_server, ssl_certfile=str(files.server))


def connect_tls(server: echo_async.EchoServer, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(connect(server), server_hostname="localhost")


@pytest.mark.parametrize(("version", "has_fin"), [(V1_2, True), (V1_3, False)])
def test_client_that_ends_its_side_receives_all_replies(
    start_server: StartServer, files: CertificateFiles, version: ssl.TLSVersion, has_fin: bool
) -> None:
    context = files.context()
    context.minimum_version = context.maximum_version = version
    message = os.urandom(1_000_000).replace(b"\n", b"") + b"\n"
    with start_server(mode="stream", chunk_size=65536) as server, connect(server) as plain:
        client = TlsClient(context)
        client.handshake(plain)

        def send() -> None:
            plain.sendall(client_bytes)
            if has_fin:
                plain.shutdown(socket.SHUT_WR)

        client_bytes = client.record(message) + client.close_notify()
        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        received = b""
        while not client.is_ended:
            data = plain.recv(65536)
            assert data
            received += client.receive(data)[0]
        sending.join(TIMEOUT)
        assert received == message
        assert receive_all(plain) == b""
        wait_for(server, active=0)
        assert (server.stats.messages, server.stats.lost, server.stats.tls_failures) == (1, 0, 0)


def test_client_that_ends_its_side_receives_a_delayed_reply(start_server: StartServer, files: CertificateFiles) -> None:
    """The message and the end of input arrive at once."""
    with start_server(mode="stream", fault="delay=0.05") as server, connect(server) as plain:
        client = TlsClient(files.context())
        client.handshake(plain)
        plain.sendall(client.record(b"one\n") + client.close_notify())
        assert client.receive(receive_all(plain)) == (b"one\n", b"")
        wait_for(server, active=0)


def test_server_that_ends_its_side_discards_what_follows(start_server: StartServer, files: CertificateFiles) -> None:
    with start_server(mode="message") as server, connect(server) as plain:
        client = TlsClient(files.context())
        client.handshake(plain)
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
    files: CertificateFiles,
) -> None:
    """Nor are they one packet each, which shows only in TLS. No reply waits for many chunks of another."""
    with start_server(mode=mode, chunk_size=20) as server, connect(server) as plain:
        client = TlsClient(files.context())
        client.handshake(plain)
        for sent, expected in ((b"first\n", b"first\n"), (replies + rest, replies)):
            start, received = len(client.received), b""
            plain.sendall(client.record(sent))
            while len(received) < len(expected):
                received += client.receive(plain.recv(65536))[0]
            assert received == expected
        records = 1 if backend.engine == "protocol" else records  # which reads more at a time
        assert len(client.received) - start == len(replies) + records * RECORD_OVERHEAD


def test_silent_tls_clients_use_the_limit_and_time_out(
    start_server: StartServer, files: CertificateFiles, monkeypatch: pytest.MonkeyPatch
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
        with connect_tls(server, files.context()) as client:
            client.sendall(b"room again\n")
            assert receive_line(client) == b"room again\n"


def test_ssl_ca_certs_requires_a_client_certificate(
    start_server: StartServer, files: CertificateFiles, tmp_path: Path
) -> None:
    """A reload with other CAs applies to new connections only."""
    trusted = tmp_path / "trusted.pem"
    shutil.copy(files.ca_file, trusted)
    with start_server(mode="stream", ssl_ca_certs=str(trusted)) as server:
        old = connect_tls(server, files.context(files.client))
        for wrong in (None, files.untrusted):
            with pytest.raises(OSError, match=r"(?i)alert|reset|broken|EOF|closed"):
                exchange(server, files.context(wrong))
        files.other_ca.cert_pem.write_to_path(str(trusted))
        server.reload_certificates()
        with pytest.raises(OSError, match=r"(?i)alert|reset|broken|EOF|closed"):
            exchange(server, files.context(files.client))
        for client in (old, connect_tls(server, files.context(files.untrusted))):
            client.sendall(b"welcome\n")
            assert receive_line(client) == b"welcome\n"
            client.close()
        wait_for(server, tls_failures=3)


def exchange(server: echo_async.EchoServer, context: ssl.SSLContext) -> None:
    """Exchange one message. With TLS 1.3 the client detects a rejected certificate when it reads."""
    with connect_tls(server, context) as client:
        client.sendall(b"x\n")
        if receive_line(client) != b"x\n":
            raise ConnectionError("closed")


def test_tls_1_1_and_plain_text_are_refused(start_server: StartServer, files: CertificateFiles) -> None:
    context = files.context()
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
        with connect_tls(server, files.context()) as secured:
            assert secured.version() in ("TLSv1.2", "TLSv1.3")


def test_stop_closes_tls_connections_and_handshakes(start_server: StartServer, files: CertificateFiles) -> None:
    with start_server(mode="stream") as server:
        clients = [connect_tls(server, files.context()) for _ in range(2)]
        in_handshake = connect(server)
        clients[0].sendall(b"answered\n")
        assert receive_line(clients[0]) == b"answered\n"
        wait_for(server, active=2)
        server.close()
        for client in (*clients, in_handshake):
            with suppress(ConnectionError, ssl.SSLError):
                assert receive_all(client) == b""
            client.close()


def test_reload_during_handshakes_fails_none(
    start_server: StartServer, files: CertificateFiles, tmp_path: Path
) -> None:
    served = tmp_path / "served.pem"
    shutil.copy(files.server, served)
    done = threading.Event()

    def reload_repeatedly() -> None:
        for certificate in itertools.cycle([files.client, files.server]):
            if done.is_set():
                return
            shutil.copy(certificate, served)
            server.reload_certificates()

    with start_server(mode="stream", ssl_certfile=str(served)) as server:
        reloading = threading.Thread(target=reload_repeatedly, daemon=True)
        reloading.start()
        try:
            for _ in range(20):
                with connect_tls(server, files.context()) as client:
                    client.sendall(b"one\n")
                    assert receive_line(client) == b"one\n"
        finally:
            done.set()
            reloading.join(TIMEOUT)
        served.write_text("invalid")
        with pytest.raises(echo_async.StartError, match=r"served\.pem"):
            server.reload_certificates()
        connect_tls(server, files.context()).close()


# Invalid certificates: an error at startup that names the file


def invalid_certificates(files: CertificateFiles) -> dict[str, list[str]]:
    folder = files.folder
    invalid = folder / "invalid.pem"
    invalid.write_text("invalid")
    encrypted = folder / "encrypted.key"
    subprocess.run(
        ["openssl", "pkey", "-in", folder / "server.key", "-aes256", "-passout", "pass:secret", "-out", encrypted],
        check=True,
        timeout=TIMEOUT,
    )
    return {
        "missing": ["--ssl-certfile", str(folder / "missing.pem")],
        "directory": ["--ssl-certfile", str(folder)],
        "not PEM": ["--ssl-certfile", str(invalid)],
        "missing key": ["--ssl-certfile", str(files.server), "--ssl-keyfile", str(folder / "missing.key")],
        "no key": ["--ssl-certfile", str(folder / "server.crt")],
        "another key": ["--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "client.key")],
        "expired": ["--ssl-certfile", str(files.expired)],
        "encrypted": ["--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(encrypted)],
        "CA not PEM": ["--ssl-certfile", str(files.server), "--ssl-ca-certs", str(invalid)],
    }


def test_invalid_certificate_is_one_error_line_with_the_path(
    files: CertificateFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    for case, options in invalid_certificates(files).items():
        for more in [[], ["--threaded"], ["--workers", "2"]] if case == "expired" else [[]]:
            assert main(["--port", "0", *options, *more]) == 3, case
            assert options[-1] in single_error_line(*capsys.readouterr()), case


def test_key_password_is_used_and_never_shown(files: CertificateFiles) -> None:
    options = invalid_certificates(files)["encrypted"]
    with server_process(*options, env={"ECHO_ASYNC_SSL_KEYFILE_PASSWORD": "secret"}) as server:
        with files.context().wrap_socket(server.connect(), server_hostname="localhost") as client:
            client.sendall(b"open\n")
            assert receive_all(client) == b"open\n"
        log = server.stop()
    assert "secret" not in log
    assert "secret" not in repr(echo_async.ServerConfig(ssl_certfile="c", ssl_keyfile_password="secret"))


@pytest.mark.parametrize("kind", [[], ["--threaded"], ["--workers", "2"]], ids=" ".join)
def test_sighup_reloads_certificates(kind: list[str], files: CertificateFiles, tmp_path: Path) -> None:
    served = tmp_path / "served.pem"
    shutil.copy(files.server, served)
    with server_process("--mode", "stream", "--ssl-certfile", str(served), *kind) as server:
        with files.context().wrap_socket(server.connect(), server_hostname="localhost") as old:
            shutil.copy(files.client, served)
            server.process.send_signal(signal.SIGHUP)
            before = old.getpeercert(binary_form=True)

            def is_new() -> bool:
                with files.context().wrap_socket(server.connect(), server_hostname="localhost") as new:
                    return new.getpeercert(binary_form=True) != before

            wait_until(is_new)
            served.write_text("invalid")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for_log("reload failed, keeping the previous certificates: ")
            with files.context().wrap_socket(server.connect(), server_hostname="localhost") as another:
                another.sendall(b"served\n")
                assert receive_line(another) == b"served\n"
            old.sendall(b"still open\n")
            assert receive_line(old) == b"still open\n"
        server.stop()


def test_certificate_replaced_while_it_is_loaded_is_a_start_error(
    files: CertificateFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker ends on any other error, and with it all of its connections."""
    served = tmp_path / "served.pem"
    shutil.copy(files.server, served)
    load = ssl.SSLContext.load_cert_chain

    def load_and_replace(*args: Any) -> None:
        load(*args)
        served.write_text("invalid")

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load_and_replace)
    with pytest.raises(echo_async.StartError, match=r"cannot load the certificate .*served\.pem"):
        Certificates(echo_async.ServerConfig(ssl_certfile=served))
