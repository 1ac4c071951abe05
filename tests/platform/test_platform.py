"""Platforms that lack what Windows lacks: the library, the fixtures and the commands, in processes of their own."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import TIMEOUT, command_process, is_echoed, single_error_line

import echo_async

HERE = Path(__file__).parent
LIMITED = [sys.executable, "-W", "error", str(HERE / "limited.py")]
PACKAGE = Path(echo_async.__file__).parent
POSIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios", "tty"}


def run_limited(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([*LIMITED, *arguments], capture_output=True, text=True, timeout=2 * TIMEOUT, env=env)


def test_library_on_limited_platform_passes_smoke_tests() -> None:
    options = ["-q", "-W", "error", "-c", os.devnull, "--noconftest", "-p", "no:cacheprovider"]
    result = run_limited("pytest", *options, "-p", "echo_async.pytest_plugin", str(HERE / "smoke.py"))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("engine", ["streams", "protocol", "threads"])
def test_commands_on_limited_platform_exchange_messages(engine: str) -> None:
    command = [*LIMITED, "echo_async.server", "--port", "0", "--mode", "stream", "--engine", engine]
    with command_process(command) as server, server.connect() as connected:
        assert is_echoed(connected)
        client = run_limited("echo_async.client", "--port", str(server.address[1]), "hola", "ñ")
        assert (client.returncode, client.stdout, client.stderr) == (0, "hola\nñ\n", "")
        connected.close()
        code, log = server.stop(signal.SIGTERM)
    assert code == 0
    assert "SIGTERM received: shutting down" in log
    assert "server stopped: accepted=2" in log


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["echo_async.server", "--workers", "2"], "use --workers 2: this platform has no POSIX file descriptors"),
        (["echo_async.server", "--fd", "3"], "use fd: this platform has no POSIX file descriptors"),
        (["echo_async.server", "--uds", "echo.sock"], "use uds: this platform has no Unix sockets"),
        (["echo_async.client", "--uds", "echo.sock"], "use uds: this platform has no Unix sockets"),
        (["echo_async.bench", "load"], "run a benchmark: this platform has no POSIX file descriptors"),
    ],
)
def test_command_without_what_it_needs_is_one_line(arguments: list[str], missing: str) -> None:
    result = run_limited(*arguments)
    assert single_error_line(result.stdout, result.stderr) == f"error: cannot {missing}\n"
    assert result.returncode == 2


def test_modules_of_posix_are_imported_in_one_place() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and POSIX_ONLY & {each.name for each in node.names})
        or (isinstance(node, ast.ImportFrom) and node.module in POSIX_ONLY)
    }
    assert importers == {"compat.py"}
