"""``python -m echo_async.client`` as a process: pipes, signals and exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import termios
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import (
    TIMEOUT,
    ChildProcess,
    run_process,
    sends_at_once,
    single_error_line,
    wait_until,
)

from echo_async.cli.client import command, main
from echo_async.config import ClientOptions, Mode
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import Peer
from echo_async.testing.scripts import Handler

pytestmark = pytest.mark.usefixtures("no_leaks")

PIPES: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
COMMAND = [sys.executable, "-W", "error", "-m", "echo_async.client"]


def client(server: Any, *args: Any, **more: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command against a scripted server, with nothing on stdin unless it is given."""
    if "input" not in more:
        more.setdefault("stdin", subprocess.DEVNULL)
    command = [*COMMAND, "--port", str(server.address[1]), *args]
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT, **more)


def with_env(**values: str) -> dict[str, str]:
    return {**os.environ, **values}


# Messages and replies


def test_client_without_message_sends_the_default(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(mode="message")
    done = client(server)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hola Server!\n", b"")
    assert [each.messages for each in server.connections] == [[b"Hola Server!\n"]]


def test_stdin_closed_sends_the_default(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(mode="message")
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *COMMAND, "--port", str(server.address[1])],
        capture_output=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Hola Server!\n", b"")


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_arguments_are_sent_as_messages(faulty_server: MakeEchoServer, mode: Mode) -> None:
    server = faulty_server(mode=mode)
    done = client(server, "one", "", "ñandú 🎉", "two\nthree\n", b"\xff\xfe", "--", "--four")
    expected = "one\n\nñandú 🎉\ntwo\nthree\n".encode() + b"\xff\xfe\n--four\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, b"")


@pytest.mark.parametrize("args", [[], ["-"]])
def test_stdin_lines_are_sent_as_messages(faulty_server: MakeEchoServer, args: list[str]) -> None:
    server = faulty_server()
    done = client(server, *args, input=b"one\n\xff\x00\n\n" + b"x" * 200_000 + b"\nno newline at the end")
    assert done.stdout == b"one\n\xff\x00\n\n" + b"x" * 200_000 + b"\nno newline at the end\n"
    assert (done.returncode, done.stderr) == (0, b"")


def test_dash_between_arguments_sends_stdin_lines(faulty_server: MakeEchoServer) -> None:
    done = client(faulty_server(), "first", "-", "last", input=b"one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, b"first\none\ntwo\nlast\n")


def test_empty_stdin_as_argument_sends_nothing(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    done = client(server, "-", input=b"")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("args", [[], ["--json", "--quiet"]], ids=str)
def test_empty_stdin_without_argument_sends_the_default(
    faulty_server: MakeEchoServer, args: list[str], tmp_path: Path
) -> None:
    """A health check whose stdin is an empty pipe or file checks the server."""
    server = faulty_server(mode="message")
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as stdin:
        for more in ({"input": b""}, {"stdin": stdin}):
            done = client(server, *args, **more)
            assert done.returncode == 0
            assert b"Hola Server!" in done.stdout
    assert [each.messages for each in server.connections] == 2 * [[b"Hola Server!\n"]]


@pytest.mark.parametrize(("mode", "lines"), [("message", 300), ("stream", 100_000)])
def test_stdin_with_many_lines_is_echoed_completely(faulty_server: MakeEchoServer, mode: Mode, lines: int) -> None:
    text = "".join(f"{number}\n" for number in range(1, lines + 1)).encode()
    done = client(faulty_server(mode=mode), "-", input=text)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == text


def test_replies_are_printed_before_stdin_ends(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    command = [*COMMAND, "--port", str(server.address[1]), "-"]
    with ChildProcess(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for line in (b"one\n", b"two\n", b"three\n", b"four\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == line
    assert process.returncode == 0


def test_client_command_line_overrides_environment(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    environment = with_env(ECHO_ASYNC_PORT=str(server.address[1]), ECHO_ASYNC_JSON="1", ECHO_ASYNC_TIMEOUT="5")
    done = subprocess.run([*COMMAND, "hola"], env=environment, capture_output=True, timeout=TIMEOUT, check=True)
    assert json.loads(done.stdout)["text"] == "hola"
    environment["ECHO_ASYNC_PORT"] = "1"
    assert client(server, "hola", env=environment).returncode == 0


def test_client_c_locale_sends_bytes_unchanged(faulty_server: MakeEchoServer) -> None:
    environment = with_env(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="")
    done = client(faulty_server(), "ñ 🎉", env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ñ 🎉\n".encode(), b"")


def test_json_prints_one_object_per_reply(faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        peer.send(peer.receive_line().replace(b"two", b"TWO"))

    done = client(faulty_server(handler=serve), "--json", "Hola Server!", "two", b"\xff")
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert first.pop("seconds") > 0
    assert first == {"seq": 1, "bytes": 13, "text": "Hola Server!", "ok": True}
    assert second.keys() == {"seq", "ok", "error"}
    assert (second["seq"], second["ok"]) == (2, False)
    assert second["error"].keys() == {"kind", "message"}
    assert (third["seq"], third["text"]) == (3, "\\xff")
    assert done.returncode == 1


def failure_of(arguments: list[str], capfd: pytest.CaptureFixture[str], code: int) -> dict[str, str]:
    """Run the command with ``--json``, which fails at its only message; return the failure."""
    assert main(["--json", *arguments]) == code
    printed = capfd.readouterr()
    [failure] = map(json.loads, printed.out.splitlines())
    assert (failure["seq"], failure["ok"], failure["error"].keys()) == (1, False, {"kind", "message"})
    assert failure["error"]["message"] in printed.err
    error: dict[str, str] = failure["error"]
    return error


each_sender = pytest.mark.parametrize("sender", [["hola"], ["--count", "1", "hola"]], ids=["messages", "count"])


@each_sender
@pytest.mark.parametrize(
    ("kind", "reason", "address"),
    [
        ("dns", "check the host name", ["--host", "missing.invalid"]),
        ("dns", "not a host name", ["--host", "a..b"]),
        ("unreachable", "cannot connect to 255.255.255.255:7", ["--host", "255.255.255.255", "--port", "7"]),
        ("unreachable", "not a directory", ["--uds", "/dev/null/socket"]),
        ("refused", "no such file or directory", ["--uds", "/missing"]),
    ],
)
def test_json_address_failure_has_its_kind(
    kind: str, reason: str, address: list[str], sender: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    error = failure_of([*address, *sender], capfd, 3)
    assert error["kind"] == kind
    assert reason in error["message"]


@each_sender
def test_json_refused_connection_has_its_kind(
    closed_port: int, sender: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    error = failure_of(["--port", str(closed_port), *sender], capfd, 3)
    assert error["kind"] == "refused"
    assert "connection refused" in error["message"]


@each_sender
def test_json_connect_timeout_has_its_kind(
    black_hole_address: tuple[str, int], sender: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    error = failure_of(["--port", str(black_hole_address[1]), "--connect-timeout", "0.2", *sender], capfd, 3)
    assert error["kind"] == "timeout"


@each_sender
def test_json_untrusted_certificate_is_of_kind_tls(
    faulty_server: MakeEchoServer, sender: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    error = failure_of(["--port", str(faulty_server(tls=True).port), "--ssl", *sender], capfd, 3)
    assert error["kind"] == "tls"
    assert "certificate verify failed" in error["message"]


def close_at_once(peer: Peer) -> None:
    peer.receive_some()


def send_text(peer: Peer) -> None:
    peer.receive_some()
    peer.send(b"220 mail server ready\r\n")


@each_sender
@pytest.mark.parametrize("serve", [close_at_once, send_text])
def test_json_server_without_tls_is_of_kind_tls(
    serve: Handler, sender: list[str], faulty_server: MakeEchoServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server = faulty_server(handler=serve)
    error = failure_of(["--port", str(server.address[1]), "--ssl", *sender], capfd, 3)
    assert error["kind"] == "tls"
    assert ": TLS: " in error["message"]


@each_sender
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("closed", "close"),
        ("closed", "close=2"),
        ("reset", "reset"),
        pytest.param("reset", "reset=2", marks=sends_at_once),
        ("mismatch", "corrupt"),
        ("mismatch", "duplicate"),
        ("late", "drop"),
    ],
)
def test_json_reply_failure_has_its_kind(
    kind: str, fault: str, sender: list[str], faulty_server: MakeEchoServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server = faulty_server(fault=fault)
    error = failure_of(["--port", str(server.address[1]), "--timeout", "0.5", *sender], capfd, 1)
    assert error["kind"] == kind


def test_replies_on_a_terminal_are_escaped(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    primary, secondary = pty.openpty()
    with os.fdopen(primary, "rb", 0) as terminal:
        command: list[Any] = [*COMMAND, "--port", str(server.address[1]), b"\x1b[2J\xff\\", "ñ\u202e"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=secondary, timeout=TIMEOUT)
        os.close(secondary)
        assert terminal.read(1000) == "\\x1b[2J\\xff\\\\\r\nñ\\u202e\r\n".encode()
    assert done.returncode == 0


def test_stdin_terminal_sends_the_default(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    primary, secondary = pty.openpty()
    try:
        assert client(server, stdin=secondary).stdout == b"Hola Server!\n"
    finally:
        os.close(primary)
        os.close(secondary)


def test_verbose_prints_each_step(faulty_server: MakeEchoServer) -> None:
    done = client(faulty_server(), "--verbose", "Hola")
    assert done.stdout == b"Hola\n"
    steps = re.sub(rb"[\d.]+ ms", b"x ms", re.sub(rb":\d+", b"", done.stderr)).decode().splitlines()
    assert steps == [
        "* connecting to 127.0.0.1",
        "* connected to 127.0.0.1 in x ms",
        "* sending 5 bytes",
        "* reply 1: 5 bytes after x ms",
    ]


# Errors


def test_connection_refused_exits_with_3(closed_port: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", str(closed_port), "hola"]) == 3
    assert capfd.readouterr() == (
        "",
        f"error: cannot connect to 127.0.0.1:{closed_port}: connection refused; is the server running?\n",
    )
    assert main(["--port", str(closed_port), "--quiet", "hola"]) == 3
    assert capfd.readouterr() == ("", "")


def test_lost_reply_is_reported_and_sending_continues(faulty_server: MakeEchoServer) -> None:
    done = client(faulty_server(fault_sequence="close=7"), *"123456")
    assert done.stdout == b"1\n2\n3\n5\n6\n"
    assert re.fullmatch(rb"error: message 4: .* lost after 1 of 2 bytes of the reply: .*\n", done.stderr)
    assert done.returncode == 1


def test_late_and_different_replies_are_reported(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault_sequence="stall=14;corrupt")
    done = client(server, "--timeout", "0.5", "good 1", "good 2", "late", "good 4", "good 5")
    assert done.stdout == b"good 1\ngood 2\ngood 5\n"
    late, different = done.stderr.decode().splitlines()
    assert late.startswith("error: message 3: ")
    assert "reply timeout: no reply from" in late
    assert re.search(r'reply mismatch at byte \d: received ".+\\n", expected "good 4\\n"', different)
    assert done.returncode == 1


def test_server_gone_between_messages_exits_with_3(faulty_server: MakeEchoServer, until_the_end: ExitStack) -> None:
    def serve(peer: Peer) -> None:
        peer.send(peer.receive_line())
        until_the_end.enter_context(server.refusing())

    server = faulty_server(handler=serve)
    done = client(server, "one", "two", "three")
    assert done.stdout == b"one\n"
    assert b"connection refused" in done.stderr
    assert done.returncode == 3


def test_server_gone_within_a_message_exits_with_1(faulty_server: MakeEchoServer, until_the_end: ExitStack) -> None:
    def serve(peer: Peer) -> None:
        for _ in range(2):
            peer.send(peer.receive_line())
        peer.receive_line()
        until_the_end.enter_context(server.refusing())

    server = faulty_server(handler=serve)
    done = client(server, "--quiet", "one", "two", "three", "four")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"one\ntwo\n", b"")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--port", "-1"], "--port"),
        (["--port", "65536"], "--port"),
        (["--port", "0"], "--port"),
        (["--port", "abc"], "--port"),
        (["--port", ""], "--port"),
        (["--host", ""], "host"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "-1"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "inf"], "--timeout"),
        (["--connect-timeout", "soon"], "--connect-timeout"),
        (["--retry", "-1"], "--retry"),
        (["--count", "-1"], "--count"),
        (["--count", "2", "a", "b"], "--count"),
        (["--count", "2", "-"], "--count"),
        (["--count", "2", "a\nb"], "--count"),
        (["--interval", "2"], "--interval"),
        (["--nonsense"], "--nonsense"),
        (["--ssl-ca-certs", "/nonexistent"], "ssl_ca_certs"),
        (["--ssl-certfile", "/nonexistent"], "ssl_certfile"),
        (["--ssl-keyfile", "/nonexistent"], "ssl_keyfile"),
    ],
)
def test_client_invalid_option_exits_with_2(args: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert re.fullmatch(r"error: .*\n", stderr)
    assert text in stderr


def run_in_pipeline(*args: str, tail: str, server: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a shell pipeline; the last line of stderr is its exit code."""
    line = f'{{ "$@"; echo "$?" >&2; }} {tail}'
    command = ["sh", "-c", line, "sh", *COMMAND, "--port", str(server.address[1]), *args]
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT, input=b"x\n" * 100_000)


def test_stdout_closed_by_its_reader_exits_with_141(faulty_server: MakeEchoServer) -> None:
    done = run_in_pipeline("-", tail="| head -1", server=faulty_server())
    assert (done.stdout, done.stderr) == (b"x\n", b"141\n")


def test_stdout_closed_sends_the_message(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    assert run_in_pipeline("one", tail=">&-", server=server).stderr == b"0\n"
    assert [each.messages for each in server.connections] == [[b"one\n"]]


def test_stderr_closed_keeps_exit_code(faulty_server: MakeEchoServer, closed_port: int) -> None:
    line = '"$@" 2>&-; echo "$?"'
    for port, expected in ((faulty_server().address[1], b"hola\n0\n"), (closed_port, b"3\n")):
        words = ["sh", "-c", line, "sh", *COMMAND, "--verbose", "--port", str(port), "hola"]
        assert subprocess.run(words, capture_output=True, timeout=TIMEOUT).stdout == expected


def test_stdin_line_over_64_mib_exits_with_1(faulty_server: MakeEchoServer, capfd: pytest.CaptureFixture[str]) -> None:
    port = str(faulty_server().address[1])
    with open("/dev/zero", "rb") as zeros:
        assert subprocess.run([*COMMAND, "--port", port, "-"], stdin=zeros, timeout=TIMEOUT).returncode == 1
    assert single_error_line(*capfd.readouterr()) == "error: cannot read stdin: line too long: over 67108864 bytes\n"


def bytes_in_pipe(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize(("format", "unbuffered"), [([], "1"), (["--json"], "")])
def test_nonblocking_stdout_receives_all_replies(
    faulty_server: MakeEchoServer, tmp_path: Path, format: list[str], unbuffered: str
) -> None:
    lines = b"line of text\n" * 20_000
    (tmp_path / "lines").write_bytes(lines)
    server = faulty_server(no_access_log=True)
    with (tmp_path / "lines").open("rb") as stdin:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        words = [*COMMAND, "--port", str(server.address[1]), *format, "-"]
        env = with_env(PYTHONUNBUFFERED=unbuffered)
        with ChildProcess(words, stdin=stdin, stdout=writing, stderr=subprocess.PIPE, env=env) as process:
            os.close(writing)
            with open(reading, "rb") as replies:
                wait_until(lambda: bytes_in_pipe(reading) > 30_000)  # the pipe is nearly full
                received = replies.read()
            assert (process.stderr.read(), process.wait(TIMEOUT)) == (b"", 0)
    assert received.count(b"\n") == 20_000
    assert format or received == lines


def test_stdout_full_exits_with_1(faulty_server: MakeEchoServer) -> None:
    done = run_in_pipeline("one", tail=">/dev/full", server=faulty_server())
    assert done.stderr == b"error: cannot write to stdout: no space left on device\n1\n"


def test_stdin_unreadable_exits_with_1(faulty_server: MakeEchoServer) -> None:
    done = run_in_pipeline("-", tail="0>/dev/null", server=faulty_server())
    assert done.stderr == b"error: cannot read stdin: bad file descriptor\n1\n"
    done = run_in_pipeline("-", tail="<&-", server=faulty_server())
    assert done.stderr == b"error: cannot read stdin: it is closed\n1\n"


@pytest.mark.parametrize("args", [["hola"], ["-"]])
def test_ctrl_c_exits_with_130_and_no_output(faulty_server: MakeEchoServer, args: list[str]) -> None:
    server = faulty_server(fault="drop")
    command = [*COMMAND, "--port", str(server.address[1]), *args]
    with ChildProcess(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"hola\n")  # and stdin stays open
        process.stdin.flush()
        server.wait_for(messages=1, timeout=TIMEOUT)
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_ctrl_c_while_stdout_blocks_exits_with_130(faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        while data := peer.receive_some():
            peer.send(data)

    command = [*COMMAND, "--port", str(faulty_server(handler=serve).address[1]), "-"]
    with (
        ChildProcess(["yes"], stdout=subprocess.PIPE) as lines,
        ChildProcess(command, stdin=lines.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        unread = bytearray(4)
        while int.from_bytes(unread, sys.byteorder) < 60_000:  # the pipe is full
            fcntl.ioctl(process.stdout, termios.FIONREAD, unread)
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert process.stderr.read() == b""
        lines.kill()


def test_ctrl_c_twice_at_once_prints_one_summary(faulty_server: MakeEchoServer) -> None:
    command = [*COMMAND, "--port", str(faulty_server().address[1]), "--count", "0", "--interval", "0"]
    with ChildProcess(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        assert b"0 lost (0%)" in process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode in (0, -signal.SIGINT)  # the second ends a process that is about to exit


def test_ctrl_c_after_the_first_ends_the_exiting_process() -> None:
    """It prints no traceback, wherever the process is on its way out."""
    code = """
import asyncio, signal
from echo_async.cli.interrupt import ClientInterrupt
from echo_async.cli.output import Output
interrupt = ClientInterrupt(Output(quiet=True, verbose=False))
async def main():
    signal.raise_signal(signal.SIGINT)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return
with interrupt.installed(), asyncio.Runner() as runner:
    runner.run(interrupt.cancel_on_interrupt(main()))
signal.raise_signal(signal.SIGINT)
"""
    done = run_process([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_server_gone_before_stdin_ends_exits_with_1(faulty_server: MakeEchoServer, until_the_end: ExitStack) -> None:
    def serve(peer: Peer) -> None:
        peer.receive_line()
        until_the_end.enter_context(server.refusing())

    server = faulty_server(handler=serve)
    command = [*COMMAND, "--port", str(server.address[1]), "-"]
    with ChildProcess(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert process.wait(TIMEOUT) == 1
        lost, gone = process.stderr.read().splitlines()
        assert b"lost before the reply: closed by the server" in lost
        assert b"connection refused" in gone


def test_retry_waits_until_the_server_listens(bound_socket: socket.socket) -> None:
    command = [*COMMAND, "--port", str(bound_socket.getsockname()[1]), "--retry", "10", "--verbose", "hola"]
    with ChildProcess(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert any(b"; retrying in " in line for line in process.stderr)
        bound_socket.listen()
        with bound_socket.accept()[0] as connected:
            connected.sendall(connected.recv(100))
            assert process.stdout.read() == b"hola\n"
    assert process.returncode == 0


# --count


def test_count_prints_round_trips_and_summary(faulty_server: MakeEchoServer) -> None:
    done = client(faulty_server(), "--count", "3", "--interval", "0.01", "hola")
    text = re.sub(r":\d+", "", re.sub(r"\d+\.\d+", "t", done.stdout.decode()))
    assert re.sub(r"\d+ ms", "t ms", text) == (
        "ECHO 127.0.0.1: 5 bytes\n"
        "5 bytes from 127.0.0.1: seq=1 time=t ms\n"
        "5 bytes from 127.0.0.1: seq=2 time=t ms\n"
        "5 bytes from 127.0.0.1: seq=3 time=t ms\n"
        "--- 127.0.0.1 echo statistics ---\n"
        "3 sent, 3 received, 0 lost (0%), time t ms\n"
        "round trip min/avg/median/p99/max = t/t/t/t/t ms\n"
    ).replace("127.0.0.1", "t.t")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_count_receives_all_replies_in_either_mode(faulty_server: MakeEchoServer, mode: Mode) -> None:
    done = client(faulty_server(mode=mode), "--count", "10", "--interval", "0", "--quiet")
    assert b"10 sent, 10 received, 0 lost" in done.stdout
    assert b"seq=" not in done.stdout
    assert done.returncode == 0


def test_count_continues_after_a_lost_reply(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault_sequence="close=21")
    done = client(server, "--count", "20", "--interval", "0.01", "x")
    assert b"20 sent, 19 received, 1 lost (5%)" in done.stdout
    assert b"seq=10 " in done.stdout
    assert b"seq=11 " not in done.stdout
    assert b"seq=12 " in done.stdout
    assert re.fullmatch(rb"error: message 11: .* lost after 1 of 2 bytes of the reply: .*\n", done.stderr)
    assert done.returncode == 1


def test_count_with_json_prints_objects(faulty_server: MakeEchoServer) -> None:
    done = client(faulty_server(), "--count", "2", "--interval", "0", "--json")
    assert [json.loads(line)["seq"] for line in done.stdout.splitlines()] == [1, 2]
    assert b"2 sent, 2 received, 0 lost (0%)" in done.stderr


def test_ctrl_c_during_count_prints_the_summary(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    command = [*COMMAND, "--port", str(server.address[1]), "--count", "0", "--interval", "0.01"]
    with ChildProcess(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for line in process.stdout:
            if b"seq=5 " in line:
                process.send_signal(signal.SIGINT)
                break
        *_, counts, times = process.stdout.read().splitlines()
        assert re.match(rb"(\d+) sent, \1 received, 0 lost \(0%\)", counts)
        assert times.startswith(b"round trip min/avg/median/p99/max = ")
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_ctrl_c_before_the_first_reply_prints_the_summary(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="drop")
    command = [*COMMAND, "--port", str(server.address[1]), "--count", "0"]
    with ChildProcess(command, stdout=subprocess.PIPE) as process:
        server.wait_for(messages=1, timeout=TIMEOUT)
        process.send_signal(signal.SIGINT)
        assert b"0 sent, 0 received, 0 lost (0%)" in process.stdout.read()


def test_client_command_has_all_options_of_connect() -> None:
    of_the_command = {parameter.name for parameter in command.params}
    assert {"host", "port", *ClientOptions.__annotations__} <= of_the_command
