"""``python -m echo_async.server`` as a process: output, signals and exit codes."""

from __future__ import annotations

import json
import os
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
from support import LOOPS, MAX_DELAY, TIMEOUT, ChildProcess, receive_all, server_process, single_error_line

import echo_async
from echo_async import sync
from echo_async.cli.server import main

SERVER = (sys.executable, "-m", "echo_async.server")

# Event loops and threads handle signals in different ways.
VARIANTS = [*(("--loop", loop) for loop in LOOPS), ("--engine", "threads")]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=[name for _, name in VARIANTS])


def run_server(*arguments: str | bytes, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a server that exits by itself."""
    command = [os.fsencode(each) for each in (*SERVER, *arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
    )


def exchange(address: tuple[str, int], message: bytes) -> bytes:
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(message)
        return receive_all(client)


@contextmanager
def port_in_use() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


def assert_printable(lines: str) -> None:
    """Check that no control character or traceback was written."""
    for line in lines.splitlines():
        assert line.isprintable(), ascii(line)
    assert not re.search("[^\n -\U0010ffff]", lines)
    assert "Traceback" not in lines


# Output


def test_server_prints_address_to_stdout_and_log_to_stderr() -> None:
    with server_process() as server:
        host, port = server.address
        assert server.startup_line == f"listening on 127.0.0.1:{port}\n"
        with server.connect() as client:
            client_port = client.getsockname()[1]
            client.sendall(b"Hola Server!\n")
            assert receive_all(client) == b"Hola Server!\n"
        assert exchange((host, port), "¡Ñandú! 😀\n".encode()) == "¡Ñandú! 😀\n".encode()
        code, log = server.stop(signal.SIGINT)
        assert code == 0
        assert server.process.stdout.read() == ""
    assert f" INFO 127.0.0.1:{client_port} 13 bytes: Hola Server!\n" in log
    assert re.search(r" INFO 127\.0\.0\.1:\d+ 16 bytes: ¡Ñandú! 😀\n", log)
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ ", line) for line in log.splitlines())
    assert log.count(" bytes: ") == 2
    assert "messages=2 bytes_in=29 bytes_out=29 " in log


def test_debug_log_shows_connections_and_chunks() -> None:
    with server_process("--log-level", "debug", "--loop", "asyncio") as server:
        exchange(server.address, b"a message of more than twenty bytes\n")
        for message in CONTROL_CHARACTERS[:-1]:
            exchange(server.address, message)
        _, log = server.stop()
    assert_printable(log)
    chunks = re.findall(r" DEBUG 127\.0\.0\.1:\d+ chunk received: (\d+) bytes: (.*)\n", log)
    assert chunks[:2] == [("20", "a message of more th"), ("16", "an twenty bytes")]
    name = r"\n\S+ \S+ DEBUG 127\.0\.0\.1:\d+ "
    assert len(re.findall(name + "connection established", log)) == len(CONTROL_CHARACTERS)
    assert re.search(name + "connection closed: 1 messages, 36 bytes received, 36 bytes sent\n", log)


def test_log_level_warning_without_problem_logs_nothing() -> None:
    with server_process("--log-level", "warning") as server:
        exchange(server.address, b"Hola Server!\n")
        assert server.stop() == (0, "")


CONTROL_CHARACTERS = [
    b"\x1b[2J\x1b]0;title\x07\n",
    b"nul\0 return\r tab\t backspace\x08 del\x7f\n",
    b"\x9b31m \xc2\x9b31m \xc2\x85 \xe2\x80\xa8 \x0b \x0c \x1c\n",
    "\u202eright to left\u2066 \u200f \ufeff\n".encode(),
    b"\xff\xfe\xed\xa0\x80\n",
    b"fake\r2026-01-01 00:00:00.000 INFO 10.0.0.1:1 5 bytes: fake\n",
    b"%s %d {} \\x1b \\\n",
    b"\x1b" * 100_000 + b"\n",
]


@pytest.mark.parametrize("format", ["text", "json"])
def test_control_characters_are_echoed_and_escaped_in_log(format: str) -> None:
    with server_process("--log-format", format, env={"PYTHONIOENCODING": "utf-8"}) as server:
        for message in CONTROL_CHARACTERS:
            assert exchange(server.address, message) == message
        code, log = server.stop()
    assert code == 0
    assert_printable(log)
    lines = [line for line in log.splitlines() if re.search(r"127\.0\.0\.1:\d+ \d+ bytes: ", line)]
    assert len(lines) == len(CONTROL_CHARACTERS)
    if format == "json":
        entries = [json.loads(line) for line in log.splitlines()]
        assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
        [message] = (entry for entry in entries if entry.get("bytes") == 16)
        assert (message["text"], message["level"]) == (r"%s %d {} \\x1b \\", "info")
        assert re.fullmatch(r"127\.0\.0\.1:\d+", message["client"])


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
        code, log = server.stop()
    assert code == 0
    assert_printable(log)
    assert len(re.findall(r" INFO .*evil.* 9 bytes: number \d\n", log)) == 2


def test_message_too_long_is_logged_and_not_answered() -> None:
    with server_process("--limit-message-size", "100", "--mode", "stream") as server:
        assert exchange(server.address, b"one\n" + b"x" * 1000 + b"\ntwo\n") == b"one\n"
        _, log = server.stop()
    assert re.search(r" WARNING 127\.0\.0\.1:\d+ message too long: over 100 bytes", log)
    assert log.count(" bytes: ") == 1


# Signals


@each_variant
def test_first_signal_closes_idle_connections_and_answers_others(variant: tuple[str, str]) -> None:
    messages = b"".join(b"%d\n" % number for number in range(1000))
    with server_process(*variant, "--mode", "stream") as server, ExitStack() as clients:
        *idle, busy, last = [clients.enter_context(server.connect()) for _ in range(100)]
        last.sendall(b"one\n")
        assert last.recv(100) == b"one\n"  # the others were accepted before it
        busy.sendall(b"first half, ")
        last.sendall(messages)
        started = monotonic()
        server.process.send_signal(signal.SIGINT)
        assert [client.recv(1) for client in idle] == [b""] * 98
        busy.sendall(b"second half\n")
        assert receive_all(busy) == b"first half, second half\n"
        assert receive_all(last) == messages
        code, log = server.wait()
        assert monotonic() - started < MAX_DELAY
    assert code == 0
    assert_printable(log)
    assert " INFO SIGINT received: shutting down\n" in log
    assert "accepted=100 active=0 " in log
    assert not re.search("error|exception|never retrieved|destroyed", log, re.IGNORECASE)


@each_variant
def test_incomplete_message_delays_exit_until_shutdown_timeout(variant: tuple[str, str]) -> None:
    with (
        server_process(*variant, "--timeout-graceful-shutdown", "0.5") as server,
        server.connect() as client,
        server.connect() as idle,
    ):
        client.sendall(b"no newline yet")
        started = monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert receive_all(idle) == b""
        code, log = server.wait()
        assert 0.4 < monotonic() - started < MAX_DELAY
    assert code == 0
    assert_printable(log)
    assert re.search(
        r" WARNING 127\.0\.0\.1:\d+ incomplete message: connection closed after 14 bytes without a newline\n", log
    )


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
        code, log = server.stop(second)
        assert monotonic() - started < MAX_DELAY
    assert code == 0
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


# Errors at startup


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    return single_error_line(done.stdout, done.stderr)


# Values that the command line converts, one of each type; tests/test_config.py has the ranges.
BAD_OPTIONS = [
    ("--port", "abc"),
    ("--port", ""),
    ("--mode", "echo"),
    ("--loop", "trio"),
    ("--workers", "0"),
    ("--limit-message-size", "1M"),
    ("--timeout-idle", "nan"),
    ("--timeout-idle", "soon"),
    ("--timeout-graceful-shutdown", "-0.5"),
    ("--log-level", "loud"),
    ("--host", ""),
    ("--uds", ""),
    ("--fault", "delay=0.1,rate=fast"),
    ("--fault-sequence", "reset;no-accept"),
    ("--fault-seed", "x"),
]


@pytest.mark.parametrize(("option", "value"), BAD_OPTIONS)
def test_invalid_value_is_reported_with_its_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with port_in_use() as port:
        monkeypatch.setenv("ECHO_ASYNC_PORT", port)
        assert main([f"{option}={value}"]) == 2
    assert single_error_line(*capsys.readouterr()).startswith(f"error: invalid {option}: {value!r} (")


def test_fault_on_the_command_line_overrides_the_environment() -> None:
    env = {"ECHO_ASYNC_FAULT": "drop", "ECHO_ASYNC_FAULT_SEED": "7"}
    with server_process("--fault-sequence", "duplicate", env=env) as server:
        assert exchange(server.address, b"one\n") == b"one\none\n"
        assert " faults configured: duplicate, seed 7\n" in server.stop()[1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--prot 80", "--port"),
        ("--threaded --engine protocol", "--threaded conflicts with --engine protocol"),
        ("--threaded --loop uvloop", "--loop uvloop"),
        ("5500", "5500"),
    ],
)
def test_invalid_arguments_are_one_line(arguments: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "0", *arguments.split()]) == 2
    assert reason in single_error_line(*capsys.readouterr())


def test_command_line_overrides_conflicting_environment(tmp_path: Path) -> None:
    env = {"ECHO_ASYNC_THREADED": "1", "ECHO_ASYNC_FD": "9", "ECHO_ASYNC_UDS": str(tmp_path / "echo")}
    for options, engine in (("--engine", "protocol"), "protocol"), (("--port", "0"), "threads"):
        with server_process(*options, env=env) as server:
            assert exchange(server.address, b"one\n") == b"one\n"
            code, log = server.stop()
        assert code == 0
        assert f"engine {engine}" in log


@pytest.mark.parametrize("host", ["no-such-host.invalid", b"\xff\xfe"], ids=ascii)
def test_unknown_host_exits_with_3_and_one_line(host: str | bytes) -> None:
    done = run_server("--port", "0", "--host", host)
    assert done.returncode == 3
    assert ascii(os.fsdecode(host))[1:-1] in error_line(done)


@pytest.mark.parametrize("loop", LOOPS)
def test_failed_start_restores_signal_handlers(loop: str, capsys: pytest.CaptureFixture[str]) -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of a program that measures coverage
    try:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert main(["--port", "0", "--host", "999.1.1.1", "--loop", loop]) == 3
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_loop_uvloop_not_installed_exits_with_3(tmp_path: Path) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError('No module named uvloop')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_server("--port", "0", "--loop", "uvloop", env={"PYTHONPATH": path})
    assert done.returncode == 3
    assert "uvloop" in error_line(done)
    with server_process(env={"PYTHONPATH": path}) as server:  # auto
        assert exchange(server.address, b"one\n") == b"one\n"


# The environment


def test_environment_is_used_and_command_line_overrides_it() -> None:
    with port_in_use() as port:
        env = {"ECHO_ASYNC_PORT": port, "ECHO_ASYNC_MODE": "stream", "ECHO_ASYNC_LOG_FORMAT": "json"}
        done = run_server(env=env)
        assert done.returncode == 3
        assert f" 127.0.0.1:{port}: address already in use" in error_line(done)
        with server_process("--log-format", "text", env=env) as server:  # with --port 0
            with server.connect() as client:
                client.sendall(b"one\n")
                assert client.recv(100) == b"one\n"
                client.sendall(b"two\n")
                assert client.recv(100) == b"two\n"
            _, log = server.stop()
    assert " bytes: two\n" in log
    assert "{" not in log


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "http"), ("PORT", "65536"), ("MODE", "echo"), ("TIMEOUT_IDLE", "-1"), ("NO_ACCESS_LOG", "perhaps")],
)
def test_invalid_environment_value_names_the_variable(
    name: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ECHO_ASYNC_{name}", value)
    assert main(["--host", "192.0.2.1"]) == 2
    assert single_error_line(*capsys.readouterr()).startswith(f"error: invalid ECHO_ASYNC_{name}: {value!r} (")


def test_environment_can_disable_the_access_log() -> None:
    with server_process(env={"ECHO_ASYNC_NO_ACCESS_LOG": "1"}) as server:
        exchange(server.address, b"Hola Server!\n")
        assert "Hola" not in server.stop()[1]


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_c_locale_serves_and_escapes_the_log() -> None:
    with server_process(env=C_LOCALE) as server:
        message = "¡Ñandú! 😀\n".encode()
        assert exchange(server.address, message) == message
        code, log = server.stop()
    assert code == 0
    assert re.search(r" INFO 127\.0\.0\.1:\d+ 16 bytes: \\xa1\\xd1and\\xfa! \\U0001f600\n", log)


def test_c_locale_error_line_is_ascii() -> None:
    done = run_server("--host", "ñ.invalid", "--port", "0", env=C_LOCALE)
    assert done.returncode == 3
    assert error_line(done).isascii()


# Closed and full output


@pytest.mark.parametrize(
    "redirection", ["<&-", ">&-", ">/dev/full", ">&PIPE", "2>/dev/full", "2>&PIPE", "<&- >&- 2>&-"]
)
def test_server_without_a_standard_stream_serves(redirection: str, tmp_path: Path) -> None:
    """It is closed, a full device, or a pipe without a reader."""
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


def test_error_without_stderr_is_not_printed_to_stdout() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *SERVER, "--port", "abc"], capture_output=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stdout) == (2, b"")


def test_help_to_broken_pipe_exits_with_0() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with ChildProcess([*SERVER, "--help"], stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert process.communicate(timeout=TIMEOUT)[1] == b""
    assert process.returncode == 0


# Addresses


def test_unix_socket_path_not_utf8_is_announced(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    with ChildProcess([*SERVER, "--uds", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert b"server started" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        announced, log = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert announced.startswith(b"listening on " + os.fsencode(tmp_path) + b"/")
    assert announced.count(b"\n") == 1
    assert b"Traceback" not in log


# Help and version


def test_help_fits_100_columns_and_has_the_exit_codes() -> None:
    done = run_server("--help", env={"PYTHONWARNINGS": "error"})
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert "[env var: ECHO_ASYNC_PORT; default: 5500;" in text
    assert "default: (fits the descriptor limit)" in text
    assert "Exit codes: 0 " in text
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_version_is_that_of_the_package() -> None:
    done = run_server("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"echo-async, version {echo_async.__version__}\n"
