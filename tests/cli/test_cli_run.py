"""``echo-async run`` as a process: the server, the command, signals and exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import socket
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from typing import Any

import pytest
from support import (
    TIMEOUT,
    ChildProcess,
    has_exited,
    run_process,
    single_error_line,
    wait_exited,
    without_slow_callbacks,
)

from echo_async.cli.main import main

RUN = (sys.executable, "-W", "error", "-m", "echo_async", "run")
CLIENT = (sys.executable, "-m", "echo_async", "client")
PRINT_ADDRESS = 'echo "$ECHO_ASYNC_HOST" "$ECHO_ASYNC_PORT" "$ECHO_ASYNC_UDS"'
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


def run(*arguments: str, env: dict[str, str] | None = None, **more: Any) -> CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    done = run_process([*RUN, *arguments], env=environment, **more)
    done.stderr = without_slow_callbacks(done.stderr)
    return done


@contextmanager
def running(*arguments: str, **popen: Any) -> Iterator[ChildProcess]:
    """Run a command that prints ``started``, until the end of the block."""
    with ChildProcess([*RUN, *arguments], stdout=PIPE, stderr=PIPE, text=True, **popen) as process:
        assert process.stdout.readline() == "started\n"
        yield process


def finish(process: ChildProcess, data: str | None = None) -> tuple[str, str]:
    """Wait until the process exits; return the rest of its output, and its errors."""
    out, err = process.communicate(data, timeout=TIMEOUT)
    return out, without_slow_callbacks(err)


def children(process: int) -> dict[int, str]:
    """Return the command lines of the children of a process."""
    pids = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}


def worker_pids(process: ChildProcess) -> list[int]:
    return [pid for pid, line in children(process.pid).items() if "echo_async.service.worker" in line]


# The command and its environment


def test_run_keeps_the_password_of_the_key_from_the_command(certificate: Path, tmp_path: Path) -> None:
    """The server uses it. The command, and whatever it starts, does not see it."""
    key = tmp_path / "encrypted.pem"
    encrypt = ["openssl", "pkey", "-in", str(certificate), "-out", str(key), "-aes256", "-passout", "pass:secret"]
    run_process(encrypt)
    options = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    env = {"ECHO_ASYNC_SSL_KEYFILE_PASSWORD": "secret", "OTHER": "kept"}
    done = run(*options, "--", "sh", "-c", "env", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ECHO_ASYNC_PORT=" in done.stdout
    assert "OTHER=kept" in done.stdout
    assert "PASSWORD" not in done.stdout


@pytest.mark.parametrize("options", [["--workers", "2"], ["--threaded", "--mode", "stream"]])
def test_run_command_reaches_the_server(options: list[str]) -> None:
    done = run(*options, "--", *CLIENT, "one", "two")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


def test_run_gives_stdin_to_the_command() -> None:
    done = run("--", *CLIENT, "-", input="one\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


@pytest.mark.parametrize("separator", [["--"], []])
def test_run_exits_with_the_code_of_the_command(separator: list[str]) -> None:
    command = ("sh", "-c", 'echo "$@"; exit 7', "sh", "--mode", "x", "--", "--port")  # has options of its own
    done = run("--mode", "raw", *separator, *command)
    assert (done.returncode, done.stdout, done.stderr) == (7, "--mode x -- --port\n", "")


@pytest.mark.parametrize(("host", "connectable"), [("0.0.0.0", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")])
def test_run_host_is_connectable(host: str, connectable: str) -> None:
    done = run("--host", host, "--", "sh", "-c", f"{PRINT_ADDRESS}; exec $0 -m echo_async.client", sys.executable)
    address, reply = done.stdout.splitlines()
    assert address.startswith(f"{connectable} ")
    assert (done.returncode, reply) == (0, "Hola Server!")


def test_run_port_can_be_given(closed_port: int) -> None:
    variables = {"ECHO_ASYNC_PORT": str(closed_port)}
    for options, env in ((["--port", str(closed_port)], {}), ([], variables)):
        done = run(*options, "--", "sh", "-c", PRINT_ADDRESS, env=env)
        assert done.returncode == 3, "the port is reserved"
        assert f"cannot listen on 127.0.0.1:{closed_port}: address already in use" in done.stderr


def test_run_unix_socket_replaces_host_and_port(tmp_path: Path) -> None:
    env = {"ECHO_ASYNC_PORT": "1", "ECHO_ASYNC_HOST": "missing.invalid"}
    done = run("--uds", "echo.sock", "--", "sh", "-c", PRINT_ADDRESS, env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "  echo.sock\n", "")


@pytest.mark.parametrize(
    ("name", "encoding"), [("ñ😀.sock", "ascii"), ("a\\b.sock", "utf-8"), (os.fsdecode(b"\xf1.sock"), "utf-8")]
)
def test_run_unix_socket_can_have_any_name(name: str, encoding: str, tmp_path: Path) -> None:
    done = run("--uds", name, "--", *CLIENT, cwd=tmp_path, env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hola Server!\n", "")


def test_run_inherited_socket_is_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        done = run("--fd", str(number), "--", *CLIENT, pass_fds=[number])
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hola Server!\n", "")


def test_run_log_is_on_stderr() -> None:
    done = run("--log-level", "info", "--log-format", "json", "--", *CLIENT)
    assert (done.returncode, done.stdout) == (0, "Hola Server!\n")
    events = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert events[0] == "server started: mode message, engine streams"
    assert events[-1].startswith("server stopped: accepted=1 ")


# Servers in the command


@pytest.mark.parametrize(
    ("outer", "inner"), [([], ["--uds", "inner.sock"]), (["--host", "::1"], []), (["--uds", "outer.sock"], [])]
)
def test_run_in_run_has_a_server_of_its_own(outer: list[str], inner: list[str], tmp_path: Path) -> None:
    done = run(*outer, "--", *RUN, "--mode", "stream", *inner, "--", *CLIENT, "one", "two", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


@pytest.mark.parametrize("command", ["server", "run"])
def test_server_in_run_keeps_what_the_command_changed(command: str, closed_port: int) -> None:
    """The host is not that of ``run``, but the default."""
    server = f"{sys.executable} -m echo_async {command} {'-- true' if command == 'run' else ''}"
    done = run("--host", "::1", "--", "sh", "-c", f"ECHO_ASYNC_PORT={closed_port} {server}")
    assert done.returncode == 3, "the port is reserved"
    assert f"cannot listen on 127.0.0.1:{closed_port}: address already in use" in done.stderr


def test_run_command_does_not_get_the_address_options() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.fileno()
        done = run("--", "sh", "-c", "env", env={"ECHO_ASYNC_FD": str(number)}, pass_fds=[number])
    assert done.returncode == 0
    assert "ECHO_ASYNC_PORT=" in done.stdout
    assert "ECHO_ASYNC_FD=" not in done.stdout


# Errors


@pytest.mark.parametrize("arguments", [[], ["--"], ["--port", "0"], ["--port", "0", "--"]])
def test_run_without_command_exits_2(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 2
    assert "missing COMMAND" in single_error_line(*capfd.readouterr())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "x"], "invalid --port: 'x' (must be an integer from 0 to 65535)"),
        (["--threaded", "--engine", "streams"], "--threaded conflicts with --engine streams"),
        (["--missing"], "No such option"),
    ],
)
def test_run_invalid_option_exits_2(options: list[str], reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *options, "--", "true"]) == 2
    assert reason in single_error_line(*capfd.readouterr())


@pytest.mark.parametrize(
    ("command", "code", "reason"),
    [("/missing/command", 127, "no such file or directory"), ("/dev/null", 126, "permission denied")],
)
def test_run_command_that_cannot_start_is_one_line(command: str, code: int, reason: str) -> None:
    done = run("--", command)
    assert done.returncode == code
    assert single_error_line(done.stdout, done.stderr) == f"error: cannot run {command}: {reason}; check the command\n"


# Signals


def test_run_forwards_signals_to_the_command() -> None:
    with running("--", sys.executable, "-c", REPORT_SIGNALS) as process:
        for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGINT"):
            process.send_signal(getattr(signal, name))
            assert process.stdout.readline() == f"{name}\n"
        process.terminate()
        out, err = finish(process)
    assert (process.returncode, out, err) == (5, "SIGTERM\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_run_signal_that_ends_the_command_exits_128_plus_n(number: signal.Signals) -> None:
    with running("--", "sh", "-c", "echo started; exec sleep 60") as process:
        pids = list(children(process.pid))
        process.send_signal(number)
        _, err = finish(process)
    assert (process.returncode, err) == (128 + number, "")
    assert all(map(has_exited, pids))


def test_run_ctrl_c_in_the_terminal_reaches_the_command_once() -> None:
    primary, secondary = pty.openpty()
    with (
        os.fdopen(primary, "r") as terminal,
        ChildProcess(
            [*RUN, "--", sys.executable, "-c", REPORT_SIGNALS],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the terminal of the new session
        ) as process,
    ):
        os.close(secondary)
        assert terminal.readline() == "started\n"
        for _ in range(2):
            os.write(primary, b"\x03")
            assert terminal.readline() == "^CSIGINT\n"

        process.terminate()
        assert terminal.readline() == "SIGTERM\n"
        assert process.wait(TIMEOUT) == 5


def test_run_signal_ignored_by_nohup_stays_ignored() -> None:
    script = f"trap '' HUP; echo started; exec {sys.executable} -c 'import signal; signal.sigwait([signal.SIGTERM])'"
    with running("--", "sh", "-c", script, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        process.terminate()
        finish(process)
    assert process.returncode == 128 + signal.SIGTERM


# The server


def test_run_server_that_fails_ends_the_command(tmp_path: Path) -> None:
    module = tmp_path / "failing.py"
    module.write_text("from asyncio import new_event_loop")
    options = ("--workers", "2", "--loop", "failing:new_event_loop", "--log-level", "critical")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with running(*options, "--", "sh", "-c", "echo started; exec sleep 60", env=env) as process:
        pids = list(children(process.pid))
        module.unlink()
        os.kill(worker_pids(process)[0], signal.SIGKILL)
        _, err = finish(process)
    assert process.returncode == 3
    assert err.endswith("error: cannot start a worker: it exited or timed out; see the error above\n")
    assert all(map(has_exited, pids))


def test_run_worker_that_is_killed_is_replaced() -> None:
    script = f"echo started; read line; {sys.executable} -m echo_async.client --retry 10 hola"
    with running("--workers", "2", "--log-level", "critical", "--", "sh", "-c", script, stdin=PIPE) as process:
        for worker in worker_pids(process):
            os.kill(worker, signal.SIGKILL)
        assert finish(process, "go\n") == ("hola\n", "")
    assert process.returncode == 0


def test_run_killed_leaves_no_worker() -> None:
    with running("--workers", "2", "--", sys.executable, "-c", REPORT_SIGNALS) as process:
        workers = worker_pids(process)
        [command] = set(children(process.pid)) - {*workers}
        process.kill()
        wait_exited(*workers)
        os.kill(command, signal.SIGTERM)


def test_run_answers_what_the_command_left_behind() -> None:
    """The graceful shutdown at the end: a client in the background still gets its reply."""
    client = "exec 3<>/dev/tcp/127.0.0.1/$ECHO_ASYNC_PORT; echo hola >&3; cat <&3"
    done = run("--", "bash", "-c", f"({client}) & exec 3<>/dev/tcp/127.0.0.1/$ECHO_ASYNC_PORT; exec 3>&-; wait")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hola\n", "")
