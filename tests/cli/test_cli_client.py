"""``echo-async client``: messages, replies, failures, signals and exit codes."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import ExitStack
from subprocess import PIPE
from typing import Any, NamedTuple

import pytest
from support import TIMEOUT, ChildProcess, run_process, sends_at_once, wait_until

from echo_async.cli import stdin
from echo_async.cli.client import main
from echo_async.cli.stdin import has_stdin_lines
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")

COMMAND = [sys.executable, "-W", "error", "-m", "echo_async.client"]
DEFAULT = (0, b"Hola Server!\n", "")


class Done(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: bytes
    err: str


class Client:
    """Runs the command in this process; ``stdin`` is a file or a pipe, or there is none."""

    def __init__(self, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd, self._monkeypatch = capfdbinary, monkeypatch

    def __call__(self, server: HostedServer | int, *arguments: str, stdin: bytes | io.IOBase | None = None) -> Done:
        port = server if isinstance(server, int) else server.address[1]
        with tempfile.TemporaryFile() as file:
            if isinstance(stdin, bytes):
                file.write(stdin)
                file.seek(0)
                stdin = file
            self._monkeypatch.setattr(sys, "stdin", stdin)
            code = main(["--port", str(port), *arguments])
        out, err = self._capfd.readouterr()
        return Done(code, out, err.decode())


@pytest.fixture
def client(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(capfdbinary, monkeypatch)


@pytest.fixture
def terminal() -> Iterator[tuple[io.FileIO, io.TextIOWrapper]]:
    """Both ends of a terminal: that of the user, and that of a program."""
    primary, secondary = pty.openpty()
    with os.fdopen(primary, "rb", 0) as user, os.fdopen(secondary, "w", encoding="utf-8") as program:
        yield user, program


# Messages and replies


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_arguments_and_stdin_lines_are_messages(mode: Any, faulty_server: MakeEchoServer, client: Client) -> None:
    words = ["one", "", "ñandú 🎉", "two\nthree\n", os.fsdecode(b"\xff\xfe"), "-", "--", "--four"]
    received = b"one\n\n" + "ñandú 🎉\n".encode() + b"two\nthree\n\xff\xfe\n%b--four\n"
    assert client(faulty_server(mode=mode), *words, stdin=b"s") == (0, received % b"s\n", "")


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_stdin_lines_are_sent_as_messages(arguments: list[str], faulty_server: MakeEchoServer, client: Client) -> None:
    lines = b"one\n\xff\x00\n\n" + b"x" * 200_000 + b"\n" + b"line\n" * 20_000 + b"no newline at the end"
    assert client(faulty_server(), *arguments, stdin=lines) == (0, lines + b"\n", "")


def test_stdin_without_lines_sends_the_default(faulty_server: MakeEchoServer, client: Client) -> None:
    """A health check whose stdin is an empty pipe or file checks the server."""
    server = faulty_server(mode="message")
    for input in (None, b""):
        assert client(server, stdin=input) == DEFAULT
    assert client(server, "--json", "--quiet", stdin=b"").code == 0
    done = run_process(["sh", "-c", '"$@" <&-', "sh", *COMMAND, "--port", str(server.address[1])])
    assert (done.returncode, done.stdout.encode(), done.stderr) == DEFAULT
    assert client(server, "-", stdin=b"") == (0, b"", "")  # an argument
    assert server.received == 4 * [b"Hola Server!\n"]


def test_stdin_of_a_pipe_or_file_has_lines(terminal: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = map(os.fdopen, os.pipe(), "rw")
    with open(os.devnull) as closed:
        pass
    with reading, writing, open(os.devnull) as null, open(__file__) as file, socket.socket() as connected:
        for each, expected in (
            *((None, False), (closed, False), (null, False), (terminal[1], False)),
            *((reading, True), (file, True), (connected, True)),
        ):
            monkeypatch.setattr(sys, "stdin", each)
            assert has_stdin_lines() is expected, each


def test_replies_are_printed_before_stdin_ends(faulty_server: MakeEchoServer) -> None:
    server = faulty_server()
    with ChildProcess([*COMMAND, "--port", str(server.address[1]), "-"], stdin=PIPE, stdout=PIPE) as process:
        for line in (b"one\n", b"two\n", b"three\n", b"four\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == line
    assert process.returncode == 0


def test_client_command_line_overrides_environment(
    faulty_server: MakeEchoServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PORT": "1", "JSON": "1", "TIMEOUT": "5"}.items():
        monkeypatch.setenv(f"ECHO_ASYNC_{name}", value)
    assert json.loads(client(faulty_server(), "hola").out)["text"] == "hola"


def test_client_c_locale_sends_bytes_unchanged(faulty_server: MakeEchoServer) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    words = [*COMMAND, "--port", str(faulty_server().address[1]), "ñ 🎉"]
    done = run_process(words, env={**os.environ, **locale}, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ñ 🎉\n", "")


def test_replies_on_a_terminal_are_escaped(
    faulty_server: MakeEchoServer, client: Client, terminal: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    user, program = terminal
    monkeypatch.setattr(sys, "stdout", program)
    assert client(faulty_server(), os.fsdecode(b"\x1b[2J\xff\\"), "ñ\u202e").code == 0
    assert user.readline() + user.readline() == "\\x1b[2J\\xff\\\\\r\nñ\\u202e\r\n".encode()


def test_verbose_prints_each_step(faulty_server: MakeEchoServer, client: Client) -> None:
    server = faulty_server()
    done = client(server, "--verbose", "Hola")
    assert done.out == b"Hola\n"
    [connection] = server.connections
    host, port = connection.peer
    assert re.sub(r"[\d.]+ ms", "x ms", done.err).splitlines() == [
        f"* connecting to 127.0.0.1:{server.port}",
        f"* connected to 127.0.0.1:{server.port} from {host}:{port} in x ms",
        "* sending 5 bytes",
        "* reply 1: 5 bytes after x ms",
    ]


def test_json_prints_one_object_per_reply(faulty_server: MakeEchoServer, client: Client) -> None:
    def serve(peer: Peer) -> None:
        peer.send(peer.receive_line().replace(b"two", b"TWO"))

    done = client(faulty_server(handler=serve), "--json", "Hola Server!", "two", "\udcff")
    first, second, third = map(json.loads, done.out.splitlines())
    assert first.pop("seconds") > 0
    assert first == {"seq": 1, "bytes": 13, "text": "Hola Server!", "ok": True}
    assert second.keys() == {"seq", "ok", "error"}
    assert (second["seq"], second["ok"], second["error"]["kind"]) == (2, False, "mismatch")
    assert (third["seq"], third["text"]) == (3, "\\xff")
    assert done.code == 1


# Failures


def failure_of(done: Done, code: int) -> tuple[str, str]:
    """Return the kind and the text of the failure that a client with ``--json`` printed for its only message."""
    assert done.code == code
    [failure] = map(json.loads, done.out.splitlines())
    assert (failure["seq"], failure["ok"], failure["error"].keys()) == (1, False, {"kind", "message"})
    assert failure["error"]["message"] in done.err
    return failure["error"]["kind"], failure["error"]["message"]


def test_json_connect_failure_has_its_kind(
    client: Client, closed_port: int, black_hole_address: tuple[str, int], faulty_server: MakeEchoServer
) -> None:
    def close(peer: Peer) -> None:
        peer.receive_some()

    def send_text(peer: Peer) -> None:
        peer.receive_some()
        peer.send(b"220 mail server ready\r\n")

    for port, options, kind, reason in (
        (1, ["--host", "missing.invalid"], "dns", "check the host name"),
        (1, ["--host", "a..b"], "dns", "not a host name"),
        (7, ["--host", "255.255.255.255"], "unreachable", "cannot connect to 255.255.255.255:7"),
        (1, ["--uds", "/dev/null/socket"], "unreachable", "not a directory"),
        (1, ["--uds", "/missing"], "refused", "no such file or directory"),
        (closed_port, [], "refused", "connection refused"),
        (closed_port, ["--count", "2"], "refused", "connection refused"),
        (black_hole_address[1], ["--connect-timeout", "0.2"], "timeout", ""),
        (faulty_server(tls=True).address[1], ["--ssl"], "tls", "certificate verify failed"),
        (faulty_server(handler=close).address[1], ["--ssl"], "tls", ": TLS: "),
        (faulty_server(handler=send_text).address[1], ["--ssl"], "tls", ": TLS: "),
    ):
        error = failure_of(client(port, "--json", *options, "hola"), 3)
        assert (error[0], reason in error[1]) == (kind, True), error


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
def test_json_reply_failure_has_its_kind(kind: str, fault: str, client: Client, faulty_server: MakeEchoServer) -> None:
    server, timeout = faulty_server(fault=fault), "0.3" if kind == "late" else str(TIMEOUT)
    for sender in ([], ["--count", "1"]):
        assert failure_of(client(server, "--json", "--timeout", timeout, *sender, "hola"), 1)[0] == kind


def test_connection_refused_exits_with_3(closed_port: int, client: Client) -> None:
    error = f"error: cannot connect to 127.0.0.1:{closed_port}: connection refused; is the server running?\n"
    assert client(closed_port, "hola") == (3, b"", error)
    assert client(closed_port, "--quiet", "hola") == (3, b"", "")


def test_lost_late_and_different_replies_are_reported(faulty_server: MakeEchoServer, client: Client) -> None:
    server = faulty_server(fault_sequence="close=7;stall=4;corrupt")
    done = client(server, "--timeout", "1", *"123456789")
    assert (done.code, done.out) == (1, b"1\n2\n3\n5\n6\n9\n")
    lost, late, different = done.err.splitlines()
    assert re.fullmatch("error: message 4: .* lost after 1 of 2 bytes of the reply: .*", lost)
    assert re.fullmatch("error: message 7: reply timeout: no reply from .*", late)
    assert re.fullmatch(r'error: message 8: reply mismatch at byte \d: received ".+\\n", expected "8\\n".*', different)


def test_server_gone_between_messages_exits_with_3(
    faulty_server: MakeEchoServer, client: Client, until_the_end: ExitStack
) -> None:
    def serve(peer: Peer) -> None:
        peer.send(peer.receive_line())
        until_the_end.enter_context(server.refusing())

    server = faulty_server(handler=serve)
    done = client(server, "one", "two", "three")
    assert (done.code, done.out) == (3, b"one\n")
    assert "connection refused" in done.err


def test_server_gone_within_a_message_exits_with_1(
    faulty_server: MakeEchoServer, client: Client, until_the_end: ExitStack
) -> None:
    def serve(peer: Peer) -> None:
        peer.receive_line()
        until_the_end.enter_context(server.refusing())

    server = faulty_server(handler=serve)
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "w") as lines:
        print("one", "two", sep="\n", file=lines, flush=True)  # and stdin stays open
        done = client(server, "-", stdin=stdin)
    assert (done.code, done.out) == (1, b"")
    lost, gone = done.err.splitlines()
    assert "lost before the reply: closed by the server" in lost
    assert "connection refused" in gone


def test_client_invalid_option_exits_with_2(client: Client) -> None:
    """One of each kind; ``tests/test_config.py`` has the ranges."""
    for options, text in (
        ("--port=65536", "--port"),
        ("--port=", "--port"),
        ("--host=", "host"),
        ("--timeout=inf", "--timeout"),
        ("--retry=-1", "--retry"),
        ("--count=-1", "--count"),
        ("--count=2 a b", "--count"),
        ("--count=2 -", "--count"),
        ("--count=2 a\nb", "--count"),
        ("--interval=2", "--interval requires --count"),
        ("--size=10", "--size requires --udp"),
        ("--nonsense", "--nonsense"),
        ("--ssl-ca-certs=/nonexistent", "ssl_ca_certs"),
        ("--ssl-certfile=/nonexistent", "ssl_certfile"),
        ("--ssl-keyfile=/nonexistent", "ssl_keyfile"),
    ):
        done = client(1, *options.split(" "))
        assert (done.code, done.out) == (2, b""), options
        assert re.fullmatch("error: .*\n", done.err)
        assert text in done.err


# Standard streams


def test_stdout_closed_by_its_reader_exits_with_141(faulty_server: MakeEchoServer) -> None:
    line = '{ yes | "$@" -; echo "$?" >&2; } | head -1'
    done = run_process(["sh", "-c", line, "sh", *COMMAND, "--port", str(faulty_server().address[1])])
    assert (done.stdout, done.stderr) == ("y\n", "141\n")


def test_stream_closed_or_full_keeps_the_exit_code(
    faulty_server: MakeEchoServer, client: Client, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = faulty_server()
    for name, expected in (
        ("stdout", (0, b"", "")),
        ("stderr", (0, b"hola\n", "")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(sys, name, None)
            assert client(server, "hola") == expected
            assert client(closed_port, "hola").code == 3
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        done = client(server, "hola")
    assert done == (1, b"", "error: cannot write to stdout: no space left on device\n")


def test_stdin_that_cannot_be_read_exits_with_1(
    faulty_server: MakeEchoServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdin, "MAX_LINE_SIZE", 200_000)
    with open("/dev/zero", "rb") as zeros, open(os.devnull, "wb") as not_readable:
        for file, reason in (
            (zeros, "line too long: over 200000 bytes"),
            (not_readable, "bad file descriptor"),
            (None, "it is closed"),
        ):
            assert client(faulty_server(), "-", stdin=file) == (1, b"", f"error: cannot read stdin: {reason}\n")


def wait_for_bytes(pipe: Any, count: int) -> None:
    """Wait until a pipe has ``count`` unread bytes."""
    wait_until(lambda: int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder) >= count)


def test_nonblocking_stdout_receives_all_replies(faulty_server: MakeEchoServer) -> None:
    lines = b"line of text\n" * 20_000
    server = faulty_server(no_access_log=True)
    with tempfile.TemporaryFile() as stdin:
        stdin.write(lines)
        stdin.seek(0)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        words = [*COMMAND, "--port", str(server.address[1]), "-"]
        with ChildProcess(words, stdin=stdin, stdout=writing, stderr=PIPE) as process:
            os.close(writing)
            with open(reading, "rb") as replies:
                wait_for_bytes(reading, 30_000)  # the pipe is nearly full
                assert replies.read() == lines
            assert (process.stderr.read(), process.wait(TIMEOUT)) == (b"", 0)


# Ctrl-C


def test_ctrl_c_exits_with_130_and_no_output(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="drop")
    words = [*COMMAND, "--port", str(server.address[1]), "-"]
    with ChildProcess(words, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
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

    words = [*COMMAND, "--port", str(faulty_server(handler=serve).address[1]), "-"]
    with (
        ChildProcess(["yes"], stdout=PIPE) as lines,
        ChildProcess(words, stdin=lines.stdout, stdout=PIPE, stderr=PIPE) as process,
    ):
        wait_for_bytes(process.stdout, 60_000)  # the pipe is full
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert process.stderr.read() == b""
        lines.kill()


def test_ctrl_c_twice_at_once_prints_one_summary(faulty_server: MakeEchoServer) -> None:
    words = [*COMMAND, "--port", str(faulty_server().address[1]), "--count", "0", "--interval", "0"]
    with ChildProcess(words, stdout=PIPE, stderr=PIPE) as process:
        assert b"ECHO" in process.stdout.readline()
        assert b"seq=1 " in process.stdout.readline()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
        *_, counts, times = process.stdout.read().splitlines()
        assert re.match(rb"(\d+) sent, \1 received, 0 lost \(0%\)", counts)
        assert times.startswith(b"round trip min/avg/median/p99/max = ")
        assert process.stderr.read() == b""
    assert process.returncode in (0, -signal.SIGINT)  # the second ends a process that is about to exit


def test_ctrl_c_before_the_first_reply_prints_the_summary(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="drop")
    with ChildProcess([*COMMAND, "--port", str(server.address[1]), "--count", "0"], stdout=PIPE) as process:
        server.wait_for(messages=1, timeout=TIMEOUT)
        process.send_signal(signal.SIGINT)
        assert b"0 sent, 0 received, 0 lost (0%)" in process.stdout.read()
    assert process.returncode == 0


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
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        return
with interrupt.installed(), asyncio.Runner() as runner:
    runner.run(interrupt.cancel_on_interrupt(main()))
signal.raise_signal(signal.SIGINT)
"""
    done = run_process([sys.executable, "-c", code])
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


# --count


def test_count_prints_round_trips_and_summary(faulty_server: MakeEchoServer, client: Client) -> None:
    server = faulty_server()
    done = client(server, "--count", "3", "--interval", "0.01", "hola")
    name = "{}:{}".format(*server.address)
    text = re.sub(r"\d+(\.\d+)? ms", "t ms", re.sub(r"(?<== )[\d./]+", "t", done.out.decode()))
    assert text == (
        f"ECHO {name}: 5 bytes\n"
        f"5 bytes from {name}: seq=1 time=t ms\n"
        f"5 bytes from {name}: seq=2 time=t ms\n"
        f"5 bytes from {name}: seq=3 time=t ms\n"
        f"--- {name} echo statistics ---\n"
        "3 sent, 3 received, 0 lost (0%), time t ms\n"
        "round trip min/avg/median/p99/max = t ms\n"
    )
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_count_quiet_or_json_prints_less(mode: Any, faulty_server: MakeEchoServer, client: Client) -> None:
    server, count = faulty_server(mode=mode), ("--count", "10", "--interval", "0")
    done = client(server, *count, "--quiet")
    assert done.out.splitlines()[1].startswith(b"10 sent, 10 received, 0 lost")
    assert (done.code, done.err) == (0, "")
    done = client(server, *count, "--json")
    assert [json.loads(line)["seq"] for line in done.out.splitlines()] == list(range(1, 11))
    assert "10 sent, 10 received, 0 lost (0%)" in done.err


def test_count_continues_after_a_lost_reply(faulty_server: MakeEchoServer, client: Client) -> None:
    done = client(faulty_server(fault_sequence="close=21"), "--count", "20", "--interval", "0.01", "x")
    assert b"20 sent, 19 received, 1 lost (5%)" in done.out
    numbers = [int(number) for number in re.findall(rb"seq=(\d+) ", done.out)]
    assert numbers == [*range(1, 11), *range(12, 21)]
    assert re.fullmatch("error: message 11: .* lost after 1 of 2 bytes of the reply: .*\n", done.err)
    assert done.code == 1
