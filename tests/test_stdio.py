"""Standard streams that cannot be written to: every command keeps its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import TIMEOUT, ChildProcess, run_process, server_process

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def run_with_full_stderr(*arguments: str) -> int:
    """Run a command whose stderr is a full device; return its exit code."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=full,
            env=BUFFERED,
            timeout=TIMEOUT,
        )
    return done.returncode


@pytest.mark.parametrize("options", [[], ["--workers", "2"], ["--threaded"]], ids=" ".join)
def test_server_exits_with_0_if_stderr_is_full(options: list[str]) -> None:
    """The log cannot be written, and the interpreter's last flush of it fails."""
    with (
        open("/dev/full", "wb") as full,
        ChildProcess(
            [sys.executable, "-m", "echo_async.server", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=full,
            env=BUFFERED,
        ) as process,
    ):
        assert process.stdout.readline().startswith(b"listening on ")
        process.terminate()
        assert process.wait(TIMEOUT) == 0


def test_client_exits_with_0_if_stderr_is_full() -> None:
    with server_process() as server:
        port = str(server.address[1])
        assert run_with_full_stderr("echo_async.client", "--port", port, "--verbose", "hola") == 0


def test_bench_unmet_expectation_exits_with_1_if_stderr_is_full() -> None:
    with server_process("--mode", "stream") as server:
        port = str(server.address[1])
        options = ["--mode", "stream", "--warmup", "0", "--duration", "0.01", "--expect", "rate>1e9"]
        assert run_with_full_stderr("echo_async.bench", "load", "--port", port, *options) == 1


def test_server_address_is_escaped_if_stdout_lacks_it(tmp_path: Path) -> None:
    with server_process("--uds", str(tmp_path / "ñ😀"), env={"PYTHONIOENCODING": "ascii"}) as server:
        assert server.startup_line == f"listening on {tmp_path}/\\xf1\\U0001f600\n"
        assert server.stop()[0] == 0


def test_bench_table_is_escaped_if_stdout_lacks_it() -> None:
    command = [sys.executable, "-m", "echo_async.bench", "compare", "--engines", "protocol", "--loops", "asyncio"]
    command += ["--sizes", "64", "--rounds", "1", "--warmup", "0", "--duration"]
    environment = {**BUFFERED, "PYTHONIOENCODING": "ascii"}
    for duration in ("0.05", "1", "10"):  # on a busy machine a short round may see no reply
        done = run_process([*command, duration], env=environment)
        if "no replies within" not in done.stderr:
            break
    assert (done.returncode, done.stderr) == (0, "")
    assert "CPU \\xb5s" in done.stdout
