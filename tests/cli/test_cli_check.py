"""``echo-async check``: lines, JSON, terminals, exit codes, and peers that are no echo servers."""

from __future__ import annotations

import json
import re
import resource
import signal
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest
from support import TIMEOUT, ChildProcess, Cli, run_process, single_error_line

from echo_async.check.checks import CHECKS
from echo_async.check.result import Result
from echo_async.cli.check import Output
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer
from echo_async.testing.certificates import TlsKind
from echo_async.testing.scripts import Handler

pytestmark = pytest.mark.usefixtures("no_leaks")

COMMAND = [sys.executable, "-W", "error", "-m", "echo_async", "check"]


@pytest.fixture(autouse=True)
def keep_descriptor_limit() -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def check(cli: Cli, options: str, *, code: int = 0) -> list[dict[str, Any]]:
    """Run the checks; return the objects that ``--json`` prints."""
    return [json.loads(line) for line in cli.output(f"check --json {options}", code=code).splitlines()]


def test_check_json_prints_one_object_per_check(cli: Cli) -> None:
    with HostedServer(mode="message", udp=True) as server:
        quick = "--connections 5 --size 20000 --idle 0.1"
        results = check(cli, f"--host localhost --port {server.port} --udp {quick}")
    assert [each["check"] for each in results] == [each.name for each in CHECKS if each.name != "tls"]
    assert [each["check"] for each in results if each["result"] != "ok"] == ["identity"]
    for each in results:
        assert list(each) == ["check", "result", "expected", "seen", "reason", "seconds"]
        assert (each["reason"] is None) is (each["result"] == "ok")
    address = rf"127\.0\.0\.1:{server.port}, name resolved in \d+\.\d ms, connected in \d+\.\d ms"
    assert re.fullmatch(address, results[0]["seen"])
    assert (results[1]["check"], results[1]["seen"], results[-2]["result"]) == ("mode", "message", "skipped")


@pytest.mark.parametrize(
    ("environment", "outcome"),
    [({}, "\x1b[32mok     \x1b[0m"), ({"NO_COLOR": "1"}, "ok     "), ({"TERM": "dumb"}, "ok     ")],
)
def test_check_on_a_terminal_shows_progress(
    environment: dict[str, str], outcome: str, terminal: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    user, program = terminal
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", program)
        for quiet in (False, True):
            output = Output(quiet=quiet, json=False)
            output.print_start("idle")
            output.print_result(Result("idle", "ok", "a reply", "seen", None, 0.1))
        print(flush=True)
    assert user.readline().decode() == f"idle ...\ridle          {outcome}  seen\r\n"
    assert user.readline().decode() == f"idle ...\r{' ' * 16}\r\r\n"


def test_check_without_a_reader_of_stdout_stops() -> None:
    with (
        HostedServer() as server,
        ChildProcess([*COMMAND, "--port", str(server.port)], stdout=PIPE, stderr=PIPE) as process,
    ):
        process.stdout.close()
        assert process.wait(TIMEOUT) == 141
        assert process.stderr.read() == b""


def test_check_ctrl_c_ends_with_130(faulty_server: MakeEchoServer) -> None:
    command = [*COMMAND, "--port", str(faulty_server(handler=accept_in_silence).port)]
    with ChildProcess(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout.readline().startswith("connect ")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert "Traceback" not in process.stderr.read()


def test_check_with_more_connections_than_descriptors_is_one_line() -> None:
    script = 'ulimit -n 40; exec "$@"'
    with HostedServer(mode="message") as server:
        done = run_process(["bash", "-c", script, "bash", *COMMAND, "--port", str(server.port), "--quiet"])
    assert done.returncode == 2
    assert "too many open files" in single_error_line(done.stdout, done.stderr)


def accept_in_silence(peer: Peer) -> None:
    while peer.receive_some():
        pass


def send_without_end(peer: Peer) -> None:
    while True:
        peer.send(bytes(65536))


def send_lines_without_end(peer: Peer) -> None:
    while True:
        peer.send(b"0123456789\r\n" * 1000)


@pytest.mark.parametrize(
    ("serve", "options", "seen"),
    [
        (None, "--mode message", "mode stream"),
        (accept_in_silence, "--timeout 0.2", "nothing of 4 bytes, then nothing within 0.2 s"),
        (send_without_end, "--timeout 10", r', from byte 0 on "\x00'),
        (send_lines_without_end, "--timeout 10", ', from byte 0 on "0123456789'),
    ],
)
def test_check_of_another_mode_or_no_echo_server_fails_once(
    serve: Handler | None, options: str, seen: str, cli: Cli, faulty_server: MakeEchoServer
) -> None:
    connect, mode = check(cli, f"--port {faulty_server(handler=serve).port} {options}", code=1)
    assert (connect["check"], connect["result"]) == ("connect", "ok")
    assert (mode["check"], mode["result"]) == ("mode", "failed")
    assert seen in mode["seen"]
    assert mode["reason"]


def test_check_of_a_peer_that_resets_fails_once(cli: Cli, faulty_server: MakeEchoServer) -> None:
    """The reset can arrive while the client still connects."""
    done = cli(f"check --json --port {faulty_server(handler=Peer.reset).port}")
    *_, last = map(json.loads, done.out.splitlines())
    assert (last["result"], done.code) == ("failed", 3 if last["check"] == "connect" else 1)
    assert "reset" in last["seen"]


def test_check_of_an_unreachable_host_fails_once(
    cli: Cli, closed_port: int, black_hole_address: tuple[str, int]
) -> None:
    assert cli.output(f"check --quiet --port {closed_port}", code=3) == (
        f"connect       failed   expected a connection; seen cannot connect to 127.0.0.1:{closed_port}: "
        "connection refused: is the server running?\n"
    )
    [result] = check(cli, "--host missing.invalid", code=3)
    assert (result["check"], result["result"], result["reason"]) == ("connect", "failed", "check the host name")
    host, port = black_hole_address
    [result] = check(cli, f"--host {host} --port {port} --connect-timeout 0.3", code=3)
    assert result["seen"].endswith("timed out after 0.3 s")


@pytest.mark.parametrize(
    ("kind", "timeout", "seen"),
    [
        ("expired", "10", "has expired"),
        ("wrong-host", "10", "Hostname mismatch"),
        ("stalled", "0.5", "timed out after 0.5 s"),
    ],
)
def test_check_of_an_invalid_certificate_fails_once(
    kind: TlsKind, timeout: str, seen: str, cli: Cli, tmp_path: Path, faulty_server: MakeEchoServer
) -> None:
    server = faulty_server(tls=kind)
    assert server.client_context is not None
    [authority] = server.client_context.get_ca_certs(binary_form=True)
    (tmp_path / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(authority))
    options = f"--server-hostname localhost --ssl-ca-certs {tmp_path}/ca.pem --connect-timeout {timeout}"
    connect, tls = check(cli, f"--port {server.port} {options}", code=3)
    assert (connect["result"], tls["check"], tls["result"]) == ("ok", "tls", "failed")
    assert seen in tls["seen"]
