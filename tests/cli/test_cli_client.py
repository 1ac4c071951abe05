"""``echo-async client``: messages, replies, failures, signals and exit codes."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import sys
import tempfile
import termios
from contextlib import ExitStack
from subprocess import PIPE
from typing import Any

import pytest
from support import TIMEOUT, ChildProcess, Cli, Done, run_process, sends_at_once, wait_until

from echo_async.cli import ping, stdin
from echo_async.cli.interrupt import ClientInterrupt
from echo_async.cli.output import Output
from echo_async.cli.ping import RoundTrips
from echo_async.cli.stdin import has_stdin_lines
from echo_async.config import Mode
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")

MODES: list[Mode] = ["message", "stream"]


def command(server: HostedServer, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "echo_async.client", "--port", str(server.port), *arguments]


@pytest.mark.parametrize("mode", MODES)
def test_arguments_and_stdin_lines_are_messages(mode: Mode, faulty_server: MakeEchoServer, cli: Cli) -> None:
    words = ["one", "", "ñandú 🎉", "two\nthree\n", "\udcff\udcfe", "-", "--", "--four"]
    received = "one\n\nñandú 🎉\ntwo\nthree\n\udcff\udcfe\ns\n--four\n"
    assert cli(f"client --port {faulty_server(mode=mode).port}", *words, stdin=b"s") == (0, received, "")


@pytest.mark.parametrize("arguments", ["", "-"])
def test_stdin_lines_are_sent_as_messages(arguments: str, faulty_server: MakeEchoServer, cli: Cli) -> None:
    lines = b"one\n\xff\x00\n\n" + b"x" * 200_000 + b"\n" + b"line\n" * 20_000 + b"no newline at the end"
    done = cli(f"client --port {faulty_server().port} {arguments}", stdin=lines)
    assert done == (0, os.fsdecode(lines + b"\n"), "")


def test_stdin_without_lines_sends_the_default(faulty_server: MakeEchoServer, cli: Cli) -> None:
    """A health check whose stdin is an empty pipe or file checks the server."""
    server = faulty_server(mode="message")
    for input in (None, b""):
        assert cli(f"client --port {server.port}", stdin=input) == (0, "Hola Server!\n", "")
    assert cli(f"client --port {server.port} --json --quiet", stdin=b"").code == 0
    done = run_process(["sh", "-c", '"$@" <&-', "sh", *command(server)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hola Server!\n", "")
    assert cli(f"client --port {server.port} -", stdin=b"") == (0, "", "")  # an argument
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
    with ChildProcess(command(faulty_server(), "-"), stdin=PIPE, stdout=PIPE) as process:
        for line in (b"one\n", b"two\n", b"three\n", b"four\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == line
    assert process.returncode == 0


def test_client_c_locale_sends_bytes_unchanged(faulty_server: MakeEchoServer) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = run_process(command(faulty_server(), "ñ 🎉"), env={**os.environ, **locale}, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ñ 🎉\n", "")


def test_replies_on_a_terminal_are_escaped(
    faulty_server: MakeEchoServer, cli: Cli, terminal: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    user, program = terminal
    monkeypatch.setattr(sys, "stdout", program)
    assert cli(f"client --port {faulty_server().port}", "\x1b[2J\udcff\\", "ñ\u202e").code == 0
    assert user.readline() + user.readline() == "\\x1b[2J\\xff\\\\\r\nñ\\u202e\r\n".encode()


def test_verbose_prints_each_step(faulty_server: MakeEchoServer, cli: Cli) -> None:
    server = faulty_server()
    done = cli(f"client --port {server.port} --verbose Hola")
    assert done.out == "Hola\n"
    [connection] = server.connections
    host, port = connection.peer
    assert re.sub(r"[\d.]+ ms", "x ms", done.err).splitlines() == [
        f"* connecting to 127.0.0.1:{server.port}",
        f"* connected to 127.0.0.1:{server.port} from {host}:{port} in x ms",
        "* sending 5 bytes",
        "* reply 1: 5 bytes after x ms",
    ]


def test_json_prints_one_object_per_reply(faulty_server: MakeEchoServer, cli: Cli) -> None:
    def serve(peer: Peer) -> None:
        peer.send(peer.receive_line().replace(b"two", b"TWO"))

    done = cli(f"client --port {faulty_server(handler=serve).port} --json", "Hola Server!", "two", "\udcff")
    first, second, third = map(json.loads, done.out.splitlines())
    assert first.pop("seconds") > 0
    assert first == {"seq": 1, "bytes": 13, "text": "Hola Server!", "ok": True}
    assert second.keys() == {"seq", "ok", "error"}
    assert (second["seq"], second["ok"], second["error"]["kind"]) == (2, False, "mismatch")
    assert (third["seq"], third["text"]) == (3, "\\xff")
    assert done.code == 1


def failure_of(done: Done, code: int) -> tuple[str, str]:
    """Return the kind and the text of the failure that a client with ``--json`` printed for its only message."""
    assert done.code == code
    [failure] = map(json.loads, done.out.splitlines())
    assert (failure["seq"], failure["ok"], failure["error"].keys()) == (1, False, {"kind", "message"})
    assert failure["error"]["message"] in done.err
    return failure["error"]["kind"], failure["error"]["message"]


def test_json_connect_failure_has_its_kind(
    cli: Cli, closed_port: int, black_hole_address: tuple[str, int], faulty_server: MakeEchoServer
) -> None:
    def close(peer: Peer) -> None:
        peer.receive_some()

    def send_text(peer: Peer) -> None:
        peer.receive_some()
        peer.send(b"220 mail server ready\r\n")

    for options, kind, reason in (
        ("--host missing.invalid", "dns", "check the host name"),
        ("--host a..b", "dns", "not a host name"),
        ("--host 255.255.255.255 --port 7", "unreachable", "cannot connect to 255.255.255.255:7"),
        ("--uds /dev/null/socket", "unreachable", "not a directory"),
        ("--uds /missing", "refused", "no such file or directory"),
        (f"--port {closed_port}", "refused", "connection refused"),
        (f"--port {closed_port} --count 2", "refused", "connection refused"),
        (f"--port {black_hole_address[1]} --connect-timeout 0.2", "timeout", ""),
        (f"--port {faulty_server(tls=True).port} --ssl", "tls", "certificate verify failed"),
        (f"--port {faulty_server(handler=close).port} --ssl", "tls", ": TLS: "),
        (f"--port {faulty_server(handler=send_text).port} --ssl", "tls", ": TLS: "),
    ):
        error = failure_of(cli(f"client --json {options} hola"), 3)
        assert (error[0], reason in error[1]) == (kind, True), error
    assert cli(f"client --quiet --port {closed_port} hola") == (3, "", "")


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
def test_json_reply_failure_has_its_kind(kind: str, fault: str, cli: Cli, faulty_server: MakeEchoServer) -> None:
    server, timeout = faulty_server(fault=fault), 0.3 if kind == "late" else TIMEOUT
    for sender in ("", "--count 1"):
        done = cli(f"client --port {server.port} --json --timeout {timeout} {sender} hola")
        assert failure_of(done, 1)[0] == kind


def test_lost_late_and_different_replies_are_reported(faulty_server: MakeEchoServer, cli: Cli) -> None:
    server = faulty_server(fault_sequence="close=7;stall=4;corrupt")
    done = cli(f"client --port {server.port} --timeout 1", *"123456789")
    assert (done.code, done.out) == (1, "1\n2\n3\n5\n6\n9\n")
    lost, late, different = done.err.splitlines()
    assert re.fullmatch("error: message 4: .* lost after 1 of 2 bytes of the reply: .*", lost)
    assert re.fullmatch("error: message 7: reply timeout: no reply from .*", late)
    assert re.fullmatch(r'error: message 8: reply mismatch at byte \d: received ".+\\n", expected "8\\n".*', different)


@pytest.mark.parametrize(
    ("has_replied", "code", "out", "errors"),
    [
        (True, 3, "one\n", "error: .*refused.*\n"),
        (False, 1, "", "error: .*: closed by the server\nerror: .*refused.*\n"),
    ],
)
def test_server_gone_is_reported_by_the_exit_code(
    has_replied: bool,
    code: int,
    out: str,
    errors: str,
    faulty_server: MakeEchoServer,
    cli: Cli,
    until_the_end: ExitStack,
) -> None:
    """Gone between two messages, or within the first one."""

    def serve(peer: Peer) -> None:
        line = peer.receive_line()
        if has_replied:
            peer.send(line)
        until_the_end.enter_context(server.refusing())

    server = faulty_server(handler=serve)
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "w") as lines:
        print("one", "two", sep="\n", file=lines, flush=True)  # and stdin stays open
        done = cli(f"client --port {server.port} -", stdin=stdin)
    assert (done.code, done.out) == (code, out)
    assert re.fullmatch(errors, done.err)


def test_stdout_closed_by_its_reader_exits_with_141(faulty_server: MakeEchoServer) -> None:
    line = '{ yes | "$@" -; echo "$?" >&2; } | head -1'
    done = run_process(["sh", "-c", line, "sh", *command(faulty_server())])
    assert (done.stdout, done.stderr) == ("y\n", "141\n")


def test_stream_closed_or_full_keeps_the_exit_code(
    faulty_server: MakeEchoServer, cli: Cli, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"client --port {faulty_server().port} hola"
    for name, out in (("stdout", ""), ("stderr", "hola\n")):
        with monkeypatch.context() as patched:
            patched.setattr(sys, name, None)
            assert cli(line) == (0, out, "")
            assert cli(f"client --port {closed_port} hola").code == 3
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.error(line, code=1) == "error: cannot write to stdout: no space left on device\n"


def test_stdin_that_cannot_be_read_exits_with_1(
    faulty_server: MakeEchoServer, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdin, "MAX_LINE_SIZE", 200_000)
    with open("/dev/zero", "rb") as zeros, open(os.devnull, "wb") as not_readable:
        for file, reason in (
            (zeros, "line too long: over 200000 bytes"),
            (not_readable, "bad file descriptor"),
            (None, "it is closed"),
        ):
            done = cli(f"client --port {faulty_server().port} -", stdin=file)
            assert done == (1, "", f"error: cannot read stdin: {reason}\n")


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
        with ChildProcess(command(server, "-"), stdin=stdin, stdout=writing, stderr=PIPE) as process:
            os.close(writing)
            with open(reading, "rb") as replies:
                wait_for_bytes(reading, 30_000)  # the pipe is nearly full
                assert replies.read() == lines
            assert (process.stderr.read(), process.wait(TIMEOUT)) == (b"", 0)


def test_ctrl_c_exits_with_130_and_no_output(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="drop")
    with ChildProcess(command(server, "-"), stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
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

    server = faulty_server(handler=serve)
    with (
        ChildProcess(["yes"], stdout=PIPE) as lines,
        ChildProcess(command(server, "-"), stdin=lines.stdout, stdout=PIPE, stderr=PIPE) as process,
    ):
        wait_for_bytes(process.stdout, 60_000)  # the pipe is full
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert process.stderr.read() == b""
        lines.kill()


def test_ctrl_c_within_a_callback_does_not_disturb_it() -> None:
    """What a callback is about to complete is not canceled meanwhile."""
    errors: list[Any] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        reply = loop.create_future()

        def complete() -> None:
            signal.raise_signal(signal.SIGINT)
            reply.set_result(None)

        loop.call_soon(complete)
        await reply
        await loop.create_future()

    before = signal.getsignal(signal.SIGINT)
    interrupt = ClientInterrupt(Output(quiet=True, verbose=False))
    try:
        with interrupt.installed(), asyncio.Runner() as runner, pytest.raises(asyncio.CancelledError):
            runner.run(interrupt.cancel_on_interrupt(main()))
    finally:
        signal.signal(signal.SIGINT, before)
    assert errors == []


def test_ctrl_c_twice_at_once_prints_one_summary(faulty_server: MakeEchoServer) -> None:
    words = command(faulty_server(), "--count", "0", "--interval", "0")
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
    with ChildProcess(command(server, "--count", "0"), stdout=PIPE) as process:
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


@pytest.mark.parametrize("mode", MODES)
def test_count_prints_round_trips_and_summary(mode: Mode, faulty_server: MakeEchoServer, cli: Cli) -> None:
    server = faulty_server(mode=mode)
    name = f"127.0.0.1:{server.port}"
    line = f"client --port {server.port} --count 3 --interval 0.01 hola"
    summary = (
        f"--- {name} echo statistics ---\n"
        "3 sent, 3 received, 0 lost (0%), time t ms\n"
        "round trip min/avg/median/p99/max = t ms\n"
    )
    replies = "".join(f"5 bytes from {name}: seq={number} time=t ms\n" for number in (1, 2, 3))
    assert without_times(cli.output(line)) == f"ECHO {name}: 5 bytes\n{replies}{summary}"
    assert without_times(cli.output(f"{line} --quiet")) == summary
    done = cli(f"{line} --json")
    assert [json.loads(line)["seq"] for line in done.out.splitlines()] == [1, 2, 3]
    assert without_times(done.err) == summary


def without_times(text: str) -> str:
    return re.sub(r"\d+(\.\d+)? ms", "t ms", re.sub(r"(?<== )[\d./]+", "t", text))


def test_count_continues_after_a_lost_reply(faulty_server: MakeEchoServer, cli: Cli) -> None:
    done = cli(f"client --port {faulty_server(fault_sequence='close=21').port} --count 20 --interval 0.01 x")
    assert "20 sent, 19 received, 1 lost (5%)" in done.out
    numbers = [int(number) for number in re.findall(r"seq=(\d+) ", done.out)]
    assert numbers == [*range(1, 11), *range(12, 21)]
    assert re.fullmatch("error: message 11: .* lost after 1 of 2 bytes of the reply: .*\n", done.err)
    assert done.code == 1


def times(trips: RoundTrips) -> list[float]:
    line = trips.summary("server").splitlines()[-1]
    return [float(time) for time in line.rpartition(" = ")[2].removesuffix(" ms").split("/")]


def test_summary_of_round_trips_has_counts_and_times() -> None:
    trips = RoundTrips()
    trips.sent = 1
    heading, counts = trips.summary("server").splitlines()
    assert heading == "--- server echo statistics ---"
    assert counts.startswith("1 sent, 0 received, 1 lost (100%), time ")
    trips.add(0.001)
    assert times(trips) == [1] * 5
    for milliseconds in range(100, 1, -1):
        trips.add(milliseconds / 1000)
    assert times(trips) == [1, 50.5, 50, 99, 100]
    trips.sent = 300
    assert trips.lost == 200
    assert trips.summary("server").splitlines()[1].startswith("300 sent, 100 received, 200 lost (66.7%), time ")


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "MAX_SAMPLES", 1000)
    trips = RoundTrips()
    for number in range(10_000):
        trips.add(0.001 if number % 2 else 0.003)
    assert len(trips._samples) == 1000
    least, average, _, p99, most = times(trips)
    assert (least, average, p99, most) == (1, 2, 3, 3)
