"""Standard streams that cannot be written to: every command keeps its exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest
from support import ChildProcess, server_process

from echo_async.testing import HostedServer

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@contextmanager
def without_stderr(*command: str) -> Iterator[ChildProcess]:
    """Run a command whose stderr is full: the log cannot be written, and the interpreter's last flush of it fails."""
    with (
        open("/dev/full", "wb") as full,
        ChildProcess([sys.executable, "-m", *command], stdout=PIPE, stderr=full, env=BUFFERED) as process,
    ):
        yield process
    assert process.returncode == 0


@pytest.mark.parametrize("options", [[], ["--workers", "2"]], ids=" ".join)
def test_server_exits_with_0_if_stderr_is_full(options: list[str]) -> None:
    with without_stderr("echo_async.server", "--port", "0", *options) as process:
        assert process.stdout.readline().startswith(b"listening on ")
        process.terminate()


def test_client_exits_with_0_if_stderr_is_full(echo_server: HostedServer) -> None:
    with without_stderr("echo_async.client", "--port", str(echo_server.port), "--verbose", "hola") as process:
        assert process.stdout.read() == b"hola\n"


def test_server_address_is_escaped_if_stdout_lacks_it(tmp_path: Path) -> None:
    with server_process("--uds", str(tmp_path / "ñ😀"), env={"PYTHONIOENCODING": "ascii"}) as server:
        assert server.startup_line == f"listening on {tmp_path}/\\xf1\\U0001f600\n"
        server.stop()
