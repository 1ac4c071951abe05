"""``echo-async check`` as a process: lines, JSON, terminals, exit codes, and peers that are no echo servers."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import ssl
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess
from typing import Any

import pytest
import trustme
import wrong_servers as wrong
from support import ChildProcess, over_socket, run_process, single_error_line

from echo_async.check.checks import CHECKS
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer
from echo_async.testing.scripts import Handler

pytestmark = pytest.mark.usefixtures("no_leaks")

COMMAND = [sys.executable, "-W", "error", "-m", "echo_async", "check"]
QUICK = ("--connections", "5", "--size", "20000", "--idle", "0.1")
NOT_RUN_IN_STREAM = {"tls", "udp"}


def check(*args: str, **options: Any) -> CompletedProcess[str]:
    return run_process([*COMMAND, *args], **options)


def results(done: CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


# Output


def test_check_prints_one_line_per_check() -> None:
    with HostedServer() as server:
        done = check("--port", str(server.port), *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == [each.name for each in CHECKS if each.name not in NOT_RUN_IN_STREAM]
    assert lines[1] == ["mode", "ok", "stream"]
    assert {line[0] for line in lines if line[1] == "skipped"} == {"close", "identity"}


def test_check_json_prints_one_object_per_check() -> None:
    with HostedServer(udp=True) as server:
        done = check("--port", str(server.port), "--udp", "--json", *QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    assert [each["check"] for each in results(done)] == [each.name for each in CHECKS if each.name != "tls"]
    for each in results(done):
        assert list(each) == ["check", "result", "expected", "seen", "reason", "seconds"]
        assert each["result"] in ("ok", "skipped")
        assert (each["reason"] is None) is (each["result"] == "ok")


def test_check_failure_names_expected_seen_and_reason(faulty_server: MakeEchoServer) -> None:
    done = check("--port", port_of(faulty_server, wrong.strip_carriage_returns), *QUICK)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if " failed " in line]
    assert line.startswith(
        "bytes         failed   expected every byte value and every size unchanged; "
        r'seen 255 instead of 256 bytes, from byte 12 on "\x0e\x0f\x10'
    )
    assert line.endswith(": something removes carriage returns, as strip() and text mode do")


def port_of(faulty_server: MakeEchoServer, handler: wrong.Handler) -> str:
    shared = wrong.Server()
    return str(faulty_server(handler=over_socket(partial(handler, shared))).address[1])


def test_check_quiet_prints_failures_only(faulty_server: MakeEchoServer) -> None:
    done = check("--quiet", "--port", port_of(faulty_server, wrong.strip_carriage_returns), *QUICK)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["bytes"]
    with HostedServer() as server:
        done = check("--quiet", "--port", str(server.port), *QUICK)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("environment", "has_colors"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_check_on_a_terminal_shows_progress(environment: dict[str, str], has_colors: bool) -> None:
    primary, secondary = pty.openpty()
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    with HostedServer() as server:
        command = [*COMMAND, "--port", str(server.port), *QUICK]
        with ChildProcess(command, stdout=secondary, env=variables | environment) as process:
            os.close(secondary)
            output = read_terminal(primary)
            assert process.wait(20) == 0
    assert "half-close ...\rhalf-close " in output
    assert ("\x1b[32mok" in output) is has_colors
    assert ("\x1b" in output) is has_colors


def read_terminal(descriptor: int) -> str:
    output = b""
    try:
        while data := os.read(descriptor, 65536):
            output += data
    except OSError:  # the process has closed the terminal
        pass
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
    server = faulty_server(handler=accept_in_silence)
    command = [*COMMAND, "--port", str(server.address[1])]
    with ChildProcess(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True) as process:
        assert process.stdout.readline().startswith("connect ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert "Traceback" not in process.stderr.read()


def test_check_of_a_name_shows_the_address() -> None:
    with HostedServer() as server:
        done = check("--host", "localhost", "--port", str(server.port), *QUICK)
    assert re.match(
        rf"connect +ok +127\.0\.0\.1:{server.port}, name resolved in \d+\.\d ms, connected in \d+\.\d ms\n", done.stdout
    )


# Options


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--mode x", "error: invalid --mode: "),
        ("--connections 1", "error: invalid --connections: '1' (must be an integer from 2 to 10000)"),
        ("--udp --uds path", "error: --udp conflicts with --uds"),
        ("--proxy-source 192.0.2.1:1", "error: proxy_source requires send_proxy"),
    ],
)
def test_check_invalid_option_is_one_line(options: str, error: str) -> None:
    done = check(*options.split())
    assert done.returncode == 2
    assert single_error_line(done.stdout, done.stderr).startswith(error)


def test_check_of_another_mode_than_given_fails() -> None:
    with HostedServer() as server:
        done = check("--port", str(server.port), "--mode", "message", "--json")
    assert done.returncode == 1
    assert [(each["check"], each["result"], each["seen"]) for each in results(done)][1:] == [
        ("mode", "failed", "mode stream")
    ]


def test_check_with_more_connections_than_descriptors_is_one_line() -> None:
    script = 'ulimit -n 40; exec "$@"'
    with HostedServer() as server:
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
    ("serve", "seen"),
    [
        (accept_in_silence, "nothing of 4 bytes, then nothing within 1 s"),
        (send_without_end, r', from byte 0 on "\x00'),
        (send_lines_without_end, ', from byte 0 on "0123456789'),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_check_of_a_peer_that_is_no_echo_server_fails_once(
    serve: Handler, seen: str, faulty_server: MakeEchoServer
) -> None:
    done = check("--port", str(faulty_server(handler=serve).address[1]), "--timeout", "1", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    connect, mode = results(done)
    assert (connect["check"], connect["result"]) == ("connect", "ok")
    assert (mode["check"], mode["result"]) == ("mode", "failed")
    assert seen in mode["seen"]
    assert mode["reason"]


def test_check_of_a_peer_that_resets_fails_once(faulty_server: MakeEchoServer) -> None:
    """The reset can arrive while the client still connects."""
    done = check("--port", str(faulty_server(handler=Peer.reset).address[1]), "--json")
    [*_, last] = results(done)
    assert (last["result"], done.returncode) == ("failed", 3 if last["check"] == "connect" else 1)
    assert "reset" in last["seen"]


def test_check_of_a_closed_port_fails_once(closed_port: int) -> None:
    done = check("--port", str(closed_port))
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == (
        f"connect       failed   expected a connection; seen cannot connect to 127.0.0.1:{closed_port}: "
        "connection refused: is the server running?\n"
    )


def test_check_of_an_unknown_name_fails_once() -> None:
    done = check("--host", "missing.invalid", "--json")
    assert done.returncode == 3
    [result] = results(done)
    assert (result["check"], result["result"], result["reason"]) == ("connect", "failed", "check the host name")


def test_check_of_an_address_without_an_answer_fails_once(black_hole_address: tuple[str, int]) -> None:
    host, port = black_hole_address
    done = check("--host", host, "--port", str(port), "--connect-timeout", "0.3", "--json")
    assert done.returncode == 3
    [result] = results(done)
    assert result["seen"].endswith("timed out after 0.3 s")


@pytest.mark.parametrize("certificate", ["expired", "of another name", "none"])
def test_check_of_an_invalid_certificate_fails_once(
    certificate: str, tmp_path: Path, faulty_server: MakeEchoServer
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    name = "other.example" if certificate == "of another name" else "localhost"
    end = datetime.now(UTC) - timedelta(days=1) if certificate == "expired" else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name, not_after=end).configure_cert(context)

    def serve(peer: Peer) -> None:
        if certificate != "none":
            with suppress(ssl.SSLError):
                peer.start_tls(context)
        accept_in_silence(peer)

    options = ("--server-hostname", "localhost", "--ssl-ca-certs", str(tmp_path / "ca.pem"), "--connect-timeout", "1")
    done = check("--port", str(faulty_server(handler=serve).address[1]), *options, "--json")
    assert (done.returncode, done.stderr) == (3, "")
    connect, tls = results(done)
    assert (connect["result"], tls["check"], tls["result"]) == ("ok", "tls", "failed")
    expected = {"expired": "has expired", "of another name": "Hostname mismatch", "none": "timed out after 1 s"}
    assert expected[certificate] in tls["seen"]
