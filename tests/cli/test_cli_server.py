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

import pytest
from support import LOOPS, MAX_DELAY, TIMEOUT, ChildProcess, receive_all, server_process, single_error_line, wait_until

import echo_async
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


def test_json_log_has_one_object_per_line() -> None:
    with server_process("--log-format", "json") as server:
        exchange(server.address, "¡Ñandú!\n".encode())
        code, log = server.stop()
    assert code == 0
    entries = [json.loads(line) for line in log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in entries)
    (message,) = (entry for entry in entries if entry["logger"] == "echo_async.access")
    assert (message["bytes"], message["text"], message["level"]) == (11, "¡Ñandú!", "info")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", message["client"])


def test_no_access_log_disables_message_lines() -> None:
    with server_process("--no-access-log") as server:
        assert exchange(server.address, b"Hola Server!\n") == b"Hola Server!\n"
        code, log = server.stop()
    assert code == 0
    assert "Hola" not in log
    assert "messages=1 " in log


def test_debug_log_shows_connections_and_chunks() -> None:
    with server_process("--log-level", "debug", "--loop", "asyncio") as server:
        exchange(server.address, b"a message of more than twenty bytes\n")
        _, log = server.stop()
    chunks = re.findall(r" DEBUG 127\.0\.0\.1:\d+ chunk received: (\d+) bytes: (.*)\n", log)
    assert chunks == [("20", "a message of more th"), ("16", "an twenty bytes")]
    assert len(re.findall(r" DEBUG 127\.0\.0\.1:\d+ connection established\n", log)) == 1
    assert (
        len(
            re.findall(
                r" DEBUG 127\.0\.0\.1:\d+ connection closed: 1 messages, 36 bytes received, 36 bytes sent\n", log
            )
        )
        == 1
    )


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
    message_lines = [line for line in log.splitlines() if re.search(r"127\.0\.0\.1:\d+ \d+ bytes: ", line)]
    assert len(message_lines) == len(CONTROL_CHARACTERS)


def test_control_characters_are_escaped_in_debug_log() -> None:
    with server_process("--log-level", "debug", "--mode", "raw") as server:
        with server.connect() as client:
            client.sendall(b"".join(CONTROL_CHARACTERS[:-1]))
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b"".join(CONTROL_CHARACTERS[:-1])
        _, log = server.stop()
    assert_printable(log)


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


def test_incomplete_message_is_logged_with_its_size() -> None:
    with server_process() as server:
        with server.connect() as client:
            client.sendall(b"no newline")
            client.shutdown(socket.SHUT_WR)
            assert receive_all(client) == b""
        _, log = server.stop()
    assert re.search(
        r" WARNING 127\.0\.0\.1:\d+ incomplete message: connection closed after 10 bytes without a newline\n", log
    )


def test_message_too_long_is_logged_and_not_answered() -> None:
    with server_process("--limit-message-size", "100", "--mode", "stream") as server:
        assert exchange(server.address, b"one\n" + b"x" * 1000 + b"\ntwo\n") == b"one\n"
        _, log = server.stop()
    assert re.search(r" WARNING 127\.0\.0\.1:\d+ message too long: over 100 bytes", log)
    assert log.count(" bytes: ") == 1


# Signals


@each_variant
def test_first_signal_closes_a_hundred_idle_connections(variant: tuple[str, str]) -> None:
    with server_process(*variant, "--mode", "stream") as server, ExitStack() as clients:
        connected = [clients.enter_context(server.connect()) for _ in range(100)]
        connected[-1].sendall(b"one\n")
        assert connected[-1].recv(100) == b"one\n"  # the others were accepted before it
        started = monotonic()
        code, log = server.stop(signal.SIGINT)
        assert monotonic() - started < MAX_DELAY
        assert code == 0
        assert [client.recv(1) for client in connected] == [b""] * 100
    assert_printable(log)
    assert " INFO SIGINT received: shutting down\n" in log
    assert "accepted=100 active=0 " in log
    assert not re.search("error|exception|never retrieved|destroyed", log, re.IGNORECASE)


@each_variant
def test_signal_after_messages_answers_all_of_them(variant: tuple[str, str]) -> None:
    with server_process(*variant, "--mode", "stream") as server:
        messages = b"".join(b"%d\n" % number for number in range(1000))
        with server.connect() as client:
            client.sendall(messages)
            server.process.send_signal(signal.SIGTERM)
            assert receive_all(client) == messages
        code, log = server.wait()
    assert code == 0
    assert_printable(log)


@each_variant
def test_signal_within_a_message_lets_it_complete(variant: tuple[str, str]) -> None:
    with server_process(*variant) as server:
        with server.connect() as client, server.connect() as idle:
            client.sendall(b"first half, ")
            server.process.send_signal(signal.SIGTERM)
            assert receive_all(idle) == b""  # the shutdown has begun
            client.sendall(b"second half\n")
            assert receive_all(client) == b"first half, second half\n"
        assert server.wait()[0] == 0


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
    assert "incomplete message: connection closed after 14 bytes" in log


@pytest.mark.parametrize(
    ("variant", "second"),
    [
        (VARIANTS[0], signal.SIGINT),
        (VARIANTS[1], signal.SIGTERM),
        (VARIANTS[2], signal.SIGINT),
        (VARIANTS[2], signal.SIGTERM),
    ],
    ids=["asyncio-2", "uvloop-15", "threads-2", "threads-15"],
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


def test_unknown_option_suggests_a_similar_one() -> None:
    done = run_server("--prot", "80")
    assert done.returncode == 2
    assert "--prot" in error_line(done)
    assert "--port" in error_line(done)


@pytest.mark.parametrize("options", [("--threaded", "--engine", "protocol"), ("--threaded", "--loop", "uvloop")])
def test_conflicting_options_are_both_reported(options: tuple[str, ...]) -> None:
    done = run_server("--port", "0", *options)
    assert done.returncode == 2
    assert f"{options[-2]} {options[-1]}" in error_line(done)
    assert "conflicts with" in error_line(done)


def test_command_line_overrides_conflicting_environment(tmp_path: Path) -> None:
    env = {"ECHO_ASYNC_THREADED": "1", "ECHO_ASYNC_FD": "9", "ECHO_ASYNC_UDS": str(tmp_path / "echo")}
    with server_process("--engine", "protocol", env=env) as server:
        assert exchange(server.address, b"one\n") == b"one\n"
        code, log = server.stop()
    assert code == 0
    assert "engine protocol" in log


def test_threaded_selects_the_threads_engine() -> None:
    with server_process("--threaded") as server:
        assert exchange(server.address, b"one\n") == b"one\n"
        code, log = server.stop()
    assert code == 0
    assert "engine threads" in log


def test_unexpected_argument_is_reported() -> None:
    done = run_server("5500")
    assert done.returncode == 2
    assert "5500" in error_line(done)


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


def test_port_in_use_exits_with_3_and_names_the_address() -> None:
    with port_in_use() as port:
        done = run_server("--port", port)
    assert done.returncode == 3
    assert f" 127.0.0.1:{port}: address already in use" in error_line(done)


def test_servers_started_together_on_a_unix_path_are_one(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for _ in range(3):  # the servers are killed, so that the socket is stale again
        with ExitStack() as stack:
            servers = [stack.enter_context(ChildProcess([*SERVER, "--uds", path], **options)) for _ in range(2)]
            for each in servers:
                stack.callback(each.kill)
            started, failed = sorted(servers, key=lambda server: server.stdout.readline(), reverse=True)
            assert failed.wait(TIMEOUT) == 3
            assert failed.stderr.read().startswith(f"error: cannot listen on {path}: address already in use; ")
            assert failed.stderr.read() == ""
            assert started.poll() is None
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
    assert os.listdir(tmp_path) == ["socket"]


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
        assert f":{port}: " in error_line(done)
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


class Shell:
    """A server on a Unix socket, started by a shell with a redirection."""

    def __init__(self, redirection: str, directory: Path) -> None:
        self.path = str(directory / "echo")
        self.errors = directory / "errors"
        command = 'exec "$@" ' + redirection
        with open(self.errors, "wb") as errors:
            words = ["/bin/sh", "-c", command, "sh", *SERVER, "--uds", self.path]
            self.process = ChildProcess(words, stdout=subprocess.PIPE, stderr=errors)

    def exchange(self, message: bytes) -> bytes:
        """Wait for the server, send ``message``, return the reply."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            wait_until(lambda: client.connect_ex(self.path) == 0 or self.process.poll() is not None)
            assert self.process.poll() is None, self.errors.read_text()
            client.sendall(message)
            return receive_all(client)

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(TIMEOUT)
        return code, self.errors.read_text()


@contextmanager
def server_with_redirection(redirection: str, directory: Path) -> Iterator[Shell]:
    shell = Shell(redirection, directory)
    with shell.process:
        try:
            yield shell
        finally:
            shell.process.kill()


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "<&-"])
def test_server_without_stdout_or_stdin_serves(redirection: str, tmp_path: Path) -> None:
    with server_with_redirection(redirection, tmp_path) as server:
        assert server.exchange(b"one\n") == b"one\n"
        code, log = server.stop()
    assert code == 0
    assert " 4 bytes: one\n" in log
    assert_printable(log)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "<&- >&- 2>&-"])
def test_server_without_stderr_serves(redirection: str, tmp_path: Path) -> None:
    with server_with_redirection(redirection, tmp_path) as server:
        assert server.exchange(b"one\n") == b"one\n"
        assert server.exchange(b"two\n") == b"two\n"
        assert server.stop() == (0, "")
        assert server.process.stdout.read() in (b"", f"listening on {server.path}\n".encode())


@pytest.mark.parametrize("broken", ["stdout", "stderr"])
def test_server_with_broken_pipe_serves(broken: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    path = str(tmp_path / "echo")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, broken: writer}
    with ChildProcess([*SERVER, "--uds", path], text=True, **streams) as process:
        os.close(writer)
        other = process.stderr if broken == "stdout" else process.stdout
        assert other.readline()  # the server has started
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            client.connect(path)
            client.sendall(b"one\n")
            assert receive_all(client) == b"one\n"
        process.send_signal(signal.SIGTERM)
        rest = other.read()
        assert process.wait(TIMEOUT) == 0
    assert "Traceback" not in rest
    assert "Exception ignored" not in rest


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


def test_unix_socket_is_announced_served_and_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "echo")
    with server_process("--uds", path) as server:
        assert server.startup_line == f"listening on {path}\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            client.connect(path)
            client.sendall(b"one\n")
            assert receive_all(client) == b"one\n"
        code, log = server.stop()
    assert code == 0
    assert " INFO unix client 4 bytes: one\n" in log
    assert not os.path.exists(path)


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


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_ipv6_address_is_announced_in_brackets() -> None:
    with server_process("--host", "::1") as server:
        assert re.fullmatch(r"listening on \[::1\]:\d+\n", server.startup_line)
        assert exchange(server.address, b"one\n") == b"one\n"
        _, log = server.stop()
    assert re.search(r" INFO \[::1\]:\d+ 4 bytes: one\n", log)


def test_host_name_prints_a_line_per_address() -> None:
    with server_process("--host", "localhost") as server:
        _, log = server.stop()
        announced = server.startup_line + server.process.stdout.read()
    addresses = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    assert announced.count("\n") == len(addresses)
    assert len({line.rpartition(":")[2] for line in announced.splitlines()}) == 1
    assert_printable(log)


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


def test_help_has_a_short_option(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for name in ("-h", "--help"):
        assert main([name]) == 0
        helps.append(capsys.readouterr())
    assert helps[0] == helps[1]
    assert helps[0].err == ""
