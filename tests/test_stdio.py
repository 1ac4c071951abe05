"""Standard streams that cannot be written to: every command keeps its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import TIMEOUT, ChildProcess, server_process

from echo_async.testing import HostedServer

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=" ".join)
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


def test_client_exits_with_0_if_stderr_is_full(echo_server: HostedServer) -> None:
    command = [sys.executable, "-m", "echo_async.client", "--port", str(echo_server.port), "--verbose", "hola"]
    with (
        open("/dev/full", "wb") as full,
        ChildProcess(command, stdout=subprocess.PIPE, stderr=full, env=BUFFERED) as process,
    ):
        assert process.stdout.read() == b"hola\n"
    assert process.returncode == 0


def test_server_address_is_escaped_if_stdout_lacks_it(tmp_path: Path) -> None:
    with server_process("--uds", str(tmp_path / "ñ😀"), env={"PYTHONIOENCODING": "ascii"}) as server:
        assert server.startup_line == f"listening on {tmp_path}/\\xf1\\U0001f600\n"
        server.stop()
