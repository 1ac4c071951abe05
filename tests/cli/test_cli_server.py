"""``echo-async server``: output, signals and exit codes."""

from __future__ import annotations

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support import (
    LOOPS,
    MAX_DELAY,
    TIMEOUT,
    ChildProcess,
    Cli,
    ServerProcess,
    command_process,
    receive_all,
    receive_line,
    server_process,
)

import echo_async
from echo_async import sync

SERVER = (sys.executable, "-m", "echo_async.server")

# Event loops and threads handle signals in different ways.
VARIANTS = [*(("--loop", loop) for loop in LOOPS), ("--engine", "threads")]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=[name for _, name in VARIANTS])


def exchange(address: tuple[str, int], message: bytes) -> bytes:
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(message)
        return receive_all(client)


def assert_printable(lines: str) -> None:
    """Check that no control character or traceback was written."""
    for line in lines.splitlines():
        assert line.isprintable(), ascii(line)
    assert not re.search("[^\n -\U0010ffff]", lines)
    assert "Traceback" not in lines


CONTROL_CHARACTERS = (
    b"\x1b[2J\x1b]0;title\x07 \x9b31m \xc2\x85 \r2026-01-01 INFO fake \xe2\x80\xae %s %d {} \\x1b \xff\n"
)


def test_server_prints_address_to_stdout_and_log_to_stderr() -> None:
    """All that is known of a connection, at level ``debug``, and nothing that a terminal interprets."""
    options = ("--limit-message-size", "100", "--log-level", "debug", "--loop", "asyncio")
    messages = [b"a message of more than twenty bytes\n", "¡Ñandú! 😀\n".encode(), CONTROL_CHARACTERS]
    with server_process(*options, env={"PYTHONIOENCODING": "utf-8"}) as server:
        host, port = server.address
        assert server.startup_line == f"listening on 127.0.0.1:{port}\n"
        with server.connect() as client:
            name = "{}:{}".format(*client.getsockname())
            client.sendall(messages[0])
            assert receive_all(client) == messages[0]
        for message in messages[1:]:
            assert exchange((host, port), message) == message
        assert exchange((host, port), b"x" * 101) == b""
        log = server.stop(signal.SIGINT)
        assert server.process.stdout.read() == ""
    assert_printable(log)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ ", line) for line in log.splitlines())
    for event in (
        "DEBUG {} connection established\n",
        "DEBUG {} chunk received: 20 bytes: a message of more th\n",
        "DEBUG {} chunk received: 16 bytes: an twenty bytes\n",
        "INFO {} 36 bytes: a message of more than twenty bytes\n",
        "DEBUG {} connection closed: 1 messages, 36 bytes received, 36 bytes sent\n",
    ):
        assert " " + event.format(name) in log
    assert re.search(r" INFO 127\.0\.0\.1:\d+ 16 bytes: ¡Ñandú! 😀\n", log)
    assert re.search(r" WARNING 127\.0\.0\.1:\d+ message too long: over 100 bytes", log)
    assert len(re.findall(r"^\S+ \S+ INFO \S+ \d+ bytes: ", log, re.M)) == len(messages)
    size = sum(map(len, messages))
    assert f"messages={len(messages)} bytes_in={size + 101} bytes_out={size} " in log


def test_c_locale_serves_and_escapes_the_log() -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with server_process(env=environment) as server:
        message = "¡Ñandú! 😀\n".encode()
        assert exchange(server.address, message) == message
        log = server.stop()
    assert re.search(r" INFO 127\.0\.0\.1:\d+ 16 bytes: \\xa1\\xd1and\\xfa! \\U0001f600\n", log)


def test_unix_peer_path_is_escaped_in_the_log(tmp_path: Path) -> None:
    path = str(tmp_path / "echo")
    with server_process("--uds", path, "--log-level", "debug") as server:
        for number, name in enumerate(["\0evil\x1b[2J\n%s \u202e", str(tmp_path / "evil\x1b[2J\n%s \u202e")]):
            with socket.socket(socket.AF_UNIX) as client:
                client.bind(name)
                client.settimeout(TIMEOUT)
                client.connect(path)
                client.sendall(b"number %d\n" % number)
                assert receive_all(client) == b"number %d\n" % number
        log = server.stop()
    assert_printable(log)
    assert len(re.findall(r" INFO .*evil.* 9 bytes: number \d\n", log)) == 2


@each_variant
def test_first_signal_closes_idle_connections_and_answers_others(variant: tuple[str, str]) -> None:
    messages = b"".join(b"%d\n" % number for number in range(1000))
    with server_process(*variant, "--mode", "stream") as server, ExitStack() as clients:
        *idle, busy, last = [clients.enter_context(server.connect()) for _ in range(30)]
        last.sendall(b"one\n")
        assert last.recv(100) == b"one\n"  # the others were accepted before it
        busy.sendall(b"first half, ")
        last.sendall(messages)
        started = monotonic()
        server.process.send_signal(signal.SIGINT)
        assert [client.recv(1) for client in idle] == [b""] * 28
        busy.sendall(b"second half\n")
        assert receive_all(busy) == b"first half, second half\n"
        assert receive_all(last) == messages
        log = server.wait()
        assert monotonic() - started < MAX_DELAY
    assert_printable(log)
    assert " INFO SIGINT received: shutting down\n" in log
    assert "accepted=30 active=0 " in log
    assert not re.search("error|exception|never retrieved|destroyed", log, re.IGNORECASE)


@pytest.mark.parametrize(
    ("variant", "second"),
    [*zip(VARIANTS, (signal.SIGINT, signal.SIGTERM, signal.SIGINT), strict=True)],
    ids=["asyncio", "uvloop", "threads"],
)
def test_second_signal_aborts_connections(variant: tuple[str, str], second: signal.Signals) -> None:
    with server_process(*variant) as server, server.connect() as client, server.connect() as idle:
        client.sendall(b"no newline yet")
        server.process.send_signal(signal.SIGTERM)
        assert receive_all(idle) == b""  # the first signal was handled; the incomplete message delays the exit for 10 s
        assert server.process.poll() is None
        started = monotonic()
        log = server.stop(second)
        assert monotonic() - started < MAX_DELAY
    assert_printable(log)
    assert f" INFO {second.name} received: aborting connections\n" in log


@each_variant
def test_signals_after_the_stop_keep_exit_code_0(variant: tuple[str, str]) -> None:
    with ChildProcess([*SERVER, "--port", "0", *variant], stderr=subprocess.PIPE, text=True) as process:
        assert " server started: " in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        log = process.stderr.readline()
        while " server stopped: " not in log:
            log += process.stderr.readline()
        while process.returncode is None:  # while the interpreter exits
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.001)
        log += process.stderr.read()
    assert process.returncode == 0
    assert_printable(log)


# Makes stdin the controlling terminal of the session, then becomes the server.
WITH_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "echo_async.server", "--port", "0", "--mode", "stream", *sys.argv[2:]])
"""


@contextmanager
def server_on_terminal(handling: str, *args: str) -> Iterator[tuple[ServerProcess, int]]:
    """Start a server whose controlling terminal hangs up when the returned descriptor is closed."""
    master, terminal = pty.openpty()
    command = [sys.executable, "-c", WITH_TERMINAL, handling, *args]
    with command_process(command, stdin=terminal, start_new_session=True) as server:
        os.close(terminal)
        yield server, master


@pytest.mark.parametrize("kind", [[], ["--threaded"], ["--workers", "2"]], ids=" ".join)
def test_terminal_hang_up_drains_the_server(kind: list[str]) -> None:
    """SIGHUP that is sent otherwise closes no connection."""
    with server_on_terminal("default", *kind) as (server, master), server.connect() as client:
        client.sendall(b"first\nincomplete ")
        assert receive_line(client) == b"first\n"
        os.killpg(server.process.pid, signal.SIGHUP)  # workers included
        server.wait_for_log("SIGHUP received: nothing to reload")
        os.close(master)
        server.wait_for_log("SIGHUP received: shutting down")
        client.sendall(b"message\n")
        assert receive_line(client) == b"incomplete message\n"
        log = server.wait()
    assert "exited with code" not in log
    assert "server stopped: accepted=1 " in log


def test_terminal_hang_up_with_nohup_keeps_serving() -> None:
    with server_on_terminal("nohup") as (server, master), server.connect() as client:
        os.close(master)
        server.wait_for_log("SIGHUP received: nothing to reload")
        client.sendall(b"after\n")
        assert receive_line(client) == b"after\n"
        server.stop()


def test_failed_start_restores_signal_handlers(cli: Cli) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a program that measures coverage handles it
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for loop in LOOPS:
        cli.error(f"server --port 0 --host 999.1.1.1 --loop {loop}", code=3)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


CONFLICTS: list[tuple[dict[str, str], str, str]] = [
    ({"PORT": "1", "MODE": "stream", "LOG_FORMAT": "json"}, "--port 0", '"server started: mode stream, engine'),
    ({"LOG_FORMAT": "json"}, "--log-format text", " INFO server started: mode message, engine streams\n"),
    ({"THREADED": "1"}, "", "engine threads\n"),
    ({"THREADED": "1"}, "--engine protocol", "engine protocol\n"),
    ({"FAULT": "drop", "FAULT_SEED": "7"}, "--fault-sequence duplicate", " faults configured: duplicate, seed 7\n"),
    ({"LISTEN": "1 2", "UDS": "/missing/socket", "FD": "9"}, "--port 0", "server started: mode message, engine"),
    ({"PORT": "1", "HOST": "missing.invalid", "UDS": "a"}, "--listen 0,mode=raw", "server started: mode raw, engine"),
    ({"LISTEN": "127.0.0.1:0,mode=raw", "HOST": "::", "PORT": "1"}, "", "server started: mode raw, engine"),
    ({"LISTEN": " unix:a,mode=raw  0,udp "}, "", "listener a started: mode raw\n"),
    ({"UDP": "1", "UDP_ALLOW_FROM": "*"}, "--uds a", "server started: mode message, engine"),
]


def test_command_line_overrides_the_environment(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``run`` has the options of ``server``, with other defaults."""
    monkeypatch.chdir(tmp_path)
    for variables, options, logged in CONFLICTS:
        with monkeypatch.context() as environment:
            for name, value in variables.items():
                environment.setenv(f"ECHO_ASYNC_{name}", value)
            done = cli(f"run --log-level info {options} -- true")
        assert (done.code, logged in done.err) == (0, True)


@pytest.mark.parametrize("redirection", [">&PIPE", "2>&PIPE", "<&- >&- 2>&-"])
def test_server_without_a_standard_stream_serves(redirection: str, tmp_path: Path) -> None:
    """It is closed, or a pipe without a reader."""
    path, errors = str(tmp_path / "echo"), tmp_path / "errors"
    reading, writing = os.pipe()
    os.close(reading)
    shell = ["bash", "-c", f'exec "$@" {redirection.replace("PIPE", str(writing))}', "sh"]
    options: Any = {"stdout": subprocess.DEVNULL, "pass_fds": [writing]}
    with errors.open("wb") as log, ChildProcess([*shell, *SERVER, "--uds", path], stderr=log, **options) as process:
        os.close(writing)
        for message in ("one", "two"):
            assert sync.echo(message, uds=path, retry=TIMEOUT) == message
        process.terminate()
    assert process.returncode == 0
    assert_printable(errors.read_text())
    assert errors.read_text().count(" 4 bytes: ") == (0 if "2>" in redirection else 2)


def test_help_to_broken_pipe_exits_with_0() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with ChildProcess([*SERVER, "--help"], stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert process.communicate(timeout=TIMEOUT)[1] == b""
    assert process.returncode == 0


def test_help_fits_100_columns_and_has_the_exit_codes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = cli.output("server --help").splitlines()
    text = " ".join(" ".join(lines).split())
    assert "[env var: ECHO_ASYNC_PORT; default: 5500;" in text
    assert "default: (fits the descriptor limit)" in text
    assert "Exit codes: 0 " in text
    assert max(map(len, lines)) <= 100
    assert cli.output("server --version") == f"echo-async, version {echo_async.__version__}\n"
