"""``echo-async run``: the server, the command, signals and exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from support import (
    TIMEOUT,
    ChildProcess,
    Cli,
    Done,
    child_processes,
    has_exited,
    run_process,
    wait_exited,
    without_slow_callbacks,
)

RUN = (sys.executable, "-W", "error", "-m", "echo_async", "run")
CLIENT = (sys.executable, "-m", "echo_async", "client")
PRINT_ADDRESS = ("sh", "-c", 'echo "$ECHO_ASYNC_HOST" "$ECHO_ASYNC_PORT" "$ECHO_ASYNC_UDS"')
# Reports that it runs, and every signal that it gets. They are blocked, so that none is lost before it is waited for.
REPORT_SIGNALS = """
import signal, sys
signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
name = "started"
while name != "SIGTERM":
    print(name, flush=True)
    name = signal.Signals(signal.sigwait(signals)).name
print(name)
sys.exit(5)
"""
Run = Callable[..., Done]


@pytest.fixture
def run(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``echo-async run`` in this process, in a directory of its own; return its output with that of the command."""
    monkeypatch.chdir(tmp_path)
    return partial(cli, "run")


@contextmanager
def running(*arguments: str, **popen: object) -> Iterator[ChildProcess]:
    """Run a command that prints ``started``, until the end of the block."""
    with ChildProcess([*RUN, *arguments], stdout=PIPE, stderr=PIPE, text=True, **popen) as process:
        assert process.stdout.readline() == "started\n"
        yield process


def finish(process: ChildProcess) -> tuple[str, str]:
    """Wait until the process exits; return the rest of its output, and its errors."""
    out, err = process.communicate(timeout=TIMEOUT)
    return out, without_slow_callbacks(err)


def worker_pids(process: ChildProcess) -> list[int]:
    command_lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in child_processes(process.pid)}
    return [pid for pid, line in command_lines.items() if "echo_async.service.worker" in line]


def test_run_keeps_server_options_from_the_command(
    run: Run, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server uses the password of the key, and the descriptor. The command, and what it starts, gets neither."""
    encrypt = ["openssl", "pkey", "-in", str(certificate), "-out", "key.pem", "-aes256", "-passout", "pass:secret"]
    run_process(encrypt)
    monkeypatch.setenv("ECHO_ASYNC_SSL_KEYFILE_PASSWORD", "secret")
    monkeypatch.setenv("OTHER", "kept")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("ECHO_ASYNC_FD", str(os.dup(listener.fileno())))
        done = run("--ssl-certfile", str(certificate), "--ssl-keyfile", "key.pem", "--", "sh", "-c", "env")
        address = f"ECHO_ASYNC_PORT={listener.getsockname()[1]}\n"
    assert (done.code, done.err) == (0, "")
    assert address in done.out
    assert "OTHER=kept" in done.out
    assert "PASSWORD" not in done.out
    assert "ECHO_ASYNC_FD=" not in done.out


def test_run_gives_stdin_to_the_command() -> None:
    done = run_process([*RUN, "--", *CLIENT, "-"], input="one\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


def test_run_exits_with_the_code_of_the_command(run: Run) -> None:
    command = ("sh", "-c", 'echo "$@"; exit 7', "sh", "--mode", "x", "--", "--port")  # has options of its own
    for separator in (["--"], []):
        assert run("--mode", "raw", *separator, *command) == (7, "--mode x -- --port\n", "")


def test_run_host_is_connectable(run: Run) -> None:
    for host, connectable in (("0.0.0.0", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")):
        done = run("--host", host, "--", *PRINT_ADDRESS)
        assert (done.code, done.out.split()[0]) == (0, connectable)


def test_run_port_can_be_given(closed_port: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use = f"cannot listen on 127.0.0.1:{closed_port}: address already in use"
    for options in (["--port", str(closed_port)], []):
        done = run(*options, "--", "true")
        assert (done.code, in_use in done.err) == (3, True)
        monkeypatch.setenv("ECHO_ASYNC_PORT", str(closed_port))


def test_run_unix_socket_replaces_host_and_port(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHO_ASYNC_PORT", "1")
    monkeypatch.setenv("ECHO_ASYNC_HOST", "missing.invalid")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert run("--uds", "echo.sock", "--", *PRINT_ADDRESS) == (0, "  echo.sock\n", "")
    assert run("--uds", os.fsdecode(b"a\\\xf1.sock"), "--", *CLIENT) == (0, "Hola Server!\n", "")


def test_run_listen_gives_the_first_address(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"ECHO_ASYNC_UDS=first.sock", "ECHO_ASYNC_RUN_UDS=first.sock"}
    for options in (["--listen", "unix:first.sock,mode=stream", "--listen", "0"], []):
        done = run(*options, "--", "sh", "-c", "env | grep ^ECHO_ASYNC_")
        assert (done.code, {*done.out.split()}, done.err) == (0, variables, "")
        monkeypatch.setenv("ECHO_ASYNC_LISTEN", "unix:first.sock,mode=stream 0")


def test_run_log_is_on_stderr(run: Run) -> None:
    done = run("--log-level", "info", "--log-format", "json", "--", "true")
    assert (done.code, done.out) == (0, "")
    events = [json.loads(line)["message"] for line in done.err.splitlines()]
    assert events[0] == "server started: mode message, engine streams"
    assert events[-1].startswith("server stopped: accepted=0 ")


@pytest.mark.parametrize("outer", [["--host", "::1"], ["--uds", "outer.sock"]])
def test_run_in_run_has_a_server_of_its_own(outer: list[str], run: Run) -> None:
    done = run(*outer, "--", *RUN, "--mode", "raw", "--", "sh", "-c", f"{PRINT_ADDRESS[2]}; exit 7")
    assert (done.code, done.err) == (7, "")
    assert done.out.startswith("127.0.0.1 ")


def test_server_in_run_keeps_what_the_command_changed(closed_port: int, run: Run) -> None:
    """The host is not that of ``run``, but the default."""
    script = f"ECHO_ASYNC_PORT={closed_port} exec {sys.executable} -m echo_async.server"
    done = run("--host", "::1", "--", "sh", "-c", script)
    assert done.code == 3, "the port is reserved"
    assert f"cannot listen on 127.0.0.1:{closed_port}: address already in use" in done.err


def test_run_command_that_cannot_start_is_one_line(run: Run) -> None:
    for command, code, reason in (
        ("/missing/command", 127, "no such file or directory"),
        ("/dev/null", 126, "permission denied"),
    ):
        assert run("--", command) == (code, "", f"error: cannot run {command}: {reason}; check the command\n")


def test_run_forwards_signals_to_the_command() -> None:
    with running("--", sys.executable, "-c", REPORT_SIGNALS) as process:
        for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGINT"):
            process.send_signal(getattr(signal, name))
            assert process.stdout.readline() == f"{name}\n"
        process.terminate()
        out, err = finish(process)
    assert (process.returncode, out, err) == (5, "SIGTERM\n", "")


def test_run_signal_that_ends_the_command_exits_128_plus_n() -> None:
    with running("--", "sh", "-c", "echo started; exec sleep 60") as process:
        pids = child_processes(process.pid)
        process.send_signal(signal.SIGHUP)
        _, err = finish(process)
    assert (process.returncode, err) == (128 + signal.SIGHUP, "")
    assert all(map(has_exited, pids))


def test_run_ctrl_c_in_the_terminal_reaches_the_command_once(terminal: tuple[Any, Any]) -> None:
    user, program = terminal
    command = [*RUN, "--", sys.executable, "-c", REPORT_SIGNALS]
    options = {
        **dict.fromkeys(("stdin", "stdout", "stderr"), program),
        "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the terminal of the new session
    }
    with ChildProcess(command, **options) as process:
        assert user.readline() == b"started\r\n"
        for _ in range(2):
            os.write(user.fileno(), b"\x03")
            assert user.readline() == b"^CSIGINT\r\n"
        process.terminate()
        assert user.readline() == b"SIGTERM\r\n"
        assert process.wait(TIMEOUT) == 5


def test_run_signal_ignored_by_nohup_stays_ignored() -> None:
    script = f"trap '' HUP; echo started; exec {sys.executable} -c 'import signal; signal.sigwait([signal.SIGTERM])'"
    with running("--", "sh", "-c", script, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        process.terminate()
        finish(process)
    assert process.returncode == 128 + signal.SIGTERM


def test_run_server_that_fails_ends_the_command(tmp_path: Path) -> None:
    module = tmp_path / "failing.py"
    module.write_text("from asyncio import new_event_loop")
    options = ("--workers", "2", "--loop", "failing:new_event_loop", "--log-level", "critical")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with running(*options, "--", "sh", "-c", "echo started; exec sleep 60", env=env) as process:
        pids = child_processes(process.pid)
        module.unlink()
        os.kill(worker_pids(process)[0], signal.SIGKILL)
        _, err = finish(process)
    assert process.returncode == 3
    assert err.endswith("error: cannot start a worker: it exited or timed out; see the error above\n")
    assert all(map(has_exited, pids))


def test_run_killed_leaves_no_worker() -> None:
    with running("--workers", "2", "--", sys.executable, "-c", REPORT_SIGNALS) as process:
        workers = worker_pids(process)
        [command] = set(child_processes(process.pid)) - {*workers}
        process.kill()
        wait_exited(*workers)
        os.kill(command, signal.SIGTERM)


def test_run_answers_what_the_command_left_behind(run: Run) -> None:
    """The graceful shutdown at the end: a client in the background still gets its reply."""
    client = "exec 3<>/dev/tcp/127.0.0.1/$ECHO_ASYNC_PORT; echo hola >&3; cat <&3"
    script = f"({client}) & exec 3<>/dev/tcp/127.0.0.1/$ECHO_ASYNC_PORT; exec 3>&-; wait"
    assert run("--", "bash", "-c", script) == (0, "hola\n", "")
