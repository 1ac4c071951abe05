"""Platforms that lack what Windows lacks: the library, the fixtures and the commands, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from support import TIMEOUT, command_process, is_echoed, run_process

HERE = Path(__file__).parent
LIMITED = [sys.executable, "-W", "error", str(HERE / "limited.py")]


def run_limited(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([*LIMITED, *arguments], capture_output=True, text=True, timeout=2 * TIMEOUT, env=env)


def test_library_on_limited_platform_passes_smoke_tests() -> None:
    options = ["-W", "error", "-c", os.devnull, "--noconftest", "-o", f"pythonpath={HERE.parent}"]
    plugins = ["-p", "no:cacheprovider", "-p", "echo_async.pytest_plugin"]
    result = run_limited("pytest", "-q", *options, *plugins, str(HERE / "smoke.py"))
    assert result.returncode == 0, result.stdout + result.stderr


def test_commands_on_limited_platform_exchange_messages() -> None:
    command = [*LIMITED, "echo_async.server", "--port", "0", "--mode", "stream"]
    with command_process(command) as server, server.connect() as connected:
        assert is_echoed(connected)
        client = run_limited("echo_async.client", "--port", str(server.address[1]), "hola", "ñ")
        assert (client.returncode, client.stdout, client.stderr) == (0, "hola\nñ\n", "")
        connected.close()
        log = server.stop(signal.SIGTERM)
    assert "SIGTERM received: shutting down" in log
    assert "server stopped: accepted=2" in log


def test_command_without_what_it_needs_is_one_line() -> None:
    missing = {
        "server --workers 2": "use --workers 2: this platform has no POSIX file descriptors",
        "server --fd 3": "use fd: this platform has no POSIX file descriptors",
        "server --uds echo.sock": "use uds: this platform has no Unix sockets",
        "client --uds echo.sock": "use uds: this platform has no Unix sockets",
        "bench load": "run a benchmark: this platform has no POSIX file descriptors",
    }
    code = f"""
from limited import limit_platform
limit_platform()
from echo_async.cli.main import main
print(*(main(command.split()) for command in {list(missing)}))
"""
    done = run_process([*LIMITED[:-1], "-c", code], cwd=HERE)
    assert (done.returncode, done.stdout) == (0, "2 2 2 2 2\n")
    assert done.stderr == "".join(f"error: cannot {reason}\n" for reason in missing.values())
