"""``echo-async check``: lines, JSON, terminals, exit codes, and peers that are no echo servers."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest
import wrong_servers as wrong
from support import ChildProcess, over_socket, run_process, single_error_line

from echo_async.check.checks import CHECKS
from echo_async.check.result import Result
from echo_async.cli.check import Output, main
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer
from echo_async.testing.certificates import TlsKind
from echo_async.testing.scripts import Handler

pytestmark = pytest.mark.usefixtures("no_leaks")

COMMAND = [sys.executable, "-W", "error", "-m", "echo_async", "check"]
QUICK = ("--connections", "5", "--size", "20000", "--idle", "0.1")
Check = Callable[..., list[Any]]


@pytest.fixture(autouse=True)
def keep_descriptor_limit() -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    """Run the command against a port in this process; return the lines that it prints, JSON decoded."""

    def run(port: int, *args: str, code: int = 0) -> list[Any]:
        assert main(["--port", str(port), *args]) == code
        out, err = capsys.readouterr()
        assert err == ""
        return [json.loads(line) if "--json" in args else line for line in out.splitlines()]

    return run


# Output


def test_check_prints_one_line_per_check(check: Check) -> None:
    with HostedServer(mode="message") as server:
        lines = [line.split(maxsplit=2) for line in check(server.port, "--host", "localhost", *QUICK)]
    assert [line[0] for line in lines] == [each.name for each in CHECKS if each.name not in ("tls", "udp")]
    address = rf"127\.0\.0\.1:{server.port}, name resolved in \d+\.\d ms, connected in \d+\.\d ms"
    assert re.fullmatch(address, lines[0][2])
    assert lines[1] == ["mode", "ok", "message"]
    assert [line[0] for line in lines if line[1] == "skipped"] == ["identity"]


def test_check_json_prints_one_object_per_check(check: Check) -> None:
    with HostedServer(mode="message", udp=True) as server:
        results = check(server.port, "--udp", "--json", *QUICK)
    assert [each["check"] for each in results] == [each.name for each in CHECKS if each.name != "tls"]
    for each in results:
        assert list(each) == ["check", "result", "expected", "seen", "reason", "seconds"]
        assert each["result"] in ("ok", "skipped")
        assert (each["reason"] is None) is (each["result"] == "ok")


def test_check_quiet_prints_failures_only(check: Check, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(handler=over_socket(partial(wrong.strip_carriage_returns, wrong.Server())))
    [line] = check(server.port, "--quiet", *QUICK, code=1)
    assert line.startswith(
        "bytes         failed   expected every byte value and every size unchanged; "
        r'seen 255 instead of 256 bytes, from byte 12 on "\x0e\x0f\x10'
    )
    assert line.endswith(": something removes carriage returns, as strip() and text mode do")


@pytest.mark.parametrize(
    ("environment", "outcome"),
    [({}, "\x1b[32mok     \x1b[0m"), ({"NO_COLOR": "1"}, "ok     "), ({"TERM": "dumb"}, "ok     ")],
)
def test_check_on_a_terminal_shows_progress(
    environment: dict[str, str], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    primary, secondary = pty.openpty()
    with open(secondary, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        for quiet in (False, True):
            output = Output(quiet=quiet, json=False)
            output.print_start("idle")
            output.print_result(Result("idle", "ok", "a reply", "seen", None, 0.1))
        monkeypatch.undo()
    assert read_terminal(primary) == f"idle ...\ridle          {outcome}  seen\r\nidle ...\r{' ' * 16}\r"


def read_terminal(descriptor: int) -> str:
    output = b""
    with suppress(OSError):  # all of it was read
        while data := os.read(descriptor, 65536):
            output += data
    os.close(descriptor)
    return output.decode()


def test_check_without_a_reader_of_stdout_stops() -> None:
    with (
        HostedServer() as server,
        ChildProcess([*COMMAND, "--port", str(server.port)], stdout=PIPE, stderr=PIPE) as process,
    ):
        process.stdout.close()
        assert process.wait(20) == 141
        assert process.stderr.read() == b""


def test_check_ctrl_c_ends_with_130(faulty_server: MakeEchoServer) -> None:
    command = [*COMMAND, "--port", str(faulty_server(handler=accept_in_silence).port)]
    with ChildProcess(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout.readline().startswith("connect ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()


# Options


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--mode x", "error: invalid --mode: "),
        ("--connections 1", "error: invalid --connections: '1' (must be an integer from 2 to 10000)"),
        ("--size 0", "error: invalid --size: '0' (must be an integer from 1 to 1073741824)"),
        ("--udp --uds path", "error: --udp conflicts with --uds"),
        ("--proxy-source 192.0.2.1:1", "error: proxy_source requires send_proxy"),
    ],
)
def test_check_invalid_option_is_one_line(options: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options.split()) == 2
    assert single_error_line(*capsys.readouterr()).startswith(error)


def test_check_of_another_mode_than_given_fails(check: Check) -> None:
    with HostedServer() as server:
        [_, mode] = check(server.port, "--mode", "message", "--json", code=1)
    assert (mode["check"], mode["result"], mode["seen"]) == ("mode", "failed", "mode stream")


def test_check_with_more_connections_than_descriptors_is_one_line() -> None:
    script = 'ulimit -n 40; exec "$@"'
    with HostedServer(mode="message") as server:
        done = run_process(["bash", "-c", script, "bash", *COMMAND, "--port", str(server.port), "--quiet"])
    assert done.returncode == 2
    assert "too many open files" in single_error_line(done.stdout, done.stderr)


# Peers with which nothing can be checked


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
    ("serve", "timeout", "seen"),
    [
        (accept_in_silence, "0.2", "nothing of 4 bytes, then nothing within 0.2 s"),
        (send_without_end, "10", r', from byte 0 on "\x00'),
        (send_lines_without_end, "10", ', from byte 0 on "0123456789'),
    ],
)
def test_check_of_a_peer_that_is_no_echo_server_fails_once(
    serve: Handler, timeout: str, seen: str, check: Check, faulty_server: MakeEchoServer
) -> None:
    connect, mode = check(faulty_server(handler=serve).port, "--timeout", timeout, "--json", code=1)
    assert (connect["check"], connect["result"]) == ("connect", "ok")
    assert (mode["check"], mode["result"]) == ("mode", "failed")
    assert seen in mode["seen"]
    assert mode["reason"]


def test_check_of_a_peer_that_resets_fails_once(
    faulty_server: MakeEchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reset can arrive while the client still connects."""
    code = main(["--port", str(faulty_server(handler=Peer.reset).port), "--json"])
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (last["result"], code) == ("failed", 3 if last["check"] == "connect" else 1)
    assert "reset" in last["seen"]


def test_check_of_a_closed_port_fails_once(closed_port: int) -> None:
    done = run_process([*COMMAND, "--port", str(closed_port)])
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == (
        f"connect       failed   expected a connection; seen cannot connect to 127.0.0.1:{closed_port}: "
        "connection refused: is the server running?\n"
    )


def test_check_of_an_unreachable_host_fails_once(check: Check, black_hole_address: tuple[str, int]) -> None:
    [result] = check(1, "--host", "missing.invalid", "--json", code=3)
    assert (result["check"], result["result"], result["reason"]) == ("connect", "failed", "check the host name")
    host, port = black_hole_address
    [result] = check(port, "--host", host, "--connect-timeout", "0.3", "--json", code=3)
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
    kind: TlsKind, timeout: str, seen: str, check: Check, tmp_path: Path, faulty_server: MakeEchoServer
) -> None:
    server = faulty_server(tls=kind)
    assert server.client_context is not None
    [authority] = server.client_context.get_ca_certs(binary_form=True)
    (tmp_path / "ca.pem").write_text(ssl.DER_cert_to_PEM_cert(authority))
    options = ("--server-hostname", "localhost", "--ssl-ca-certs", str(tmp_path / "ca.pem"))
    connect, tls = check(server.port, *options, "--connect-timeout", timeout, "--json", code=3)
    assert (connect["result"], tls["check"], tls["result"]) == ("ok", "tls", "failed")
    assert seen in tls["seen"]
