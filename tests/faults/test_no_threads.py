"""No thread can be started: at the thread limit of the system, and in subinterpreters, which have no daemon threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
from support import LOOPS, TIMEOUT, Backend, run, single_error_line

import echo_async
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer

REASON = "can't start new thread"
UNRESOLVED = f"cannot resolve the host name: {REASON}; use an address"


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_start(thread: threading.Thread) -> None:
        raise RuntimeError(REASON)

    monkeypatch.setattr(threading.Thread, "start", fail_to_start)


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("loop", LOOPS)
def test_connect_without_threads_raises_connect_error(loop: str) -> None:
    with pytest.raises(echo_async.ConnectError) as caught:
        run(lambda: echo_async.echo("hola", "localhost"), loop)
    assert str(caught.value) == "cannot connect to localhost:5500: " + UNRESOLVED


@pytest.mark.usefixtures("no_threads")
def test_serve_without_threads_raises_start_error(backend: Backend) -> None:
    async def main() -> None:
        await echo_async.serve(host="localhost", port=0, engine=backend.engine)

    with pytest.raises(echo_async.StartError) as caught:
        run(main, backend.loop)
    assert str(caught.value) == "cannot listen on host 'localhost': " + UNRESOLVED


@pytest.mark.usefixtures("no_threads", "no_leaks")
@pytest.mark.parametrize("options", [{}, {"udp": True}, {"tls": True}], ids=str)
def test_hosted_server_without_threads_raises_start_error(options: dict[str, Any]) -> None:
    with pytest.raises(echo_async.StartError, match=f"cannot serve on threads: {REASON}; raise the thread"):
        HostedServer(**options)


COMMAND = """
import sys, threading

def fail_to_start(thread):
    raise RuntimeError("can't start new thread")

threading.Thread.start = fail_to_start
from echo_async.cli.main import main
sys.exit(main())
"""


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, input="hola\n", capture_output=True, text=True, timeout=TIMEOUT)


def test_commands_without_threads_print_one_error(make_echo_server: MakeEchoServer) -> None:
    host, port = make_echo_server().address
    for arguments, code, error in (
        (("client", "--host", "localhost", "hola"), 3, f": {UNRESOLVED}"),
        (("server", "--port", "0", "--engine", "threads"), 3, f"error: cannot serve on threads: {REASON}; raise the"),
        (("client", "--host", host, "--port", str(port), "-"), 1, f"error: cannot read stdin: {REASON}\n"),
    ):
        done = run_command(*arguments)
        assert error in single_error_line(done.stdout, done.stderr)
        assert done.returncode == code


SUBINTERPRETER = """
import sys

code = "import sys; sys.path[:0] = " + repr(sys.path) + sys.argv[1]
if sys.version_info >= (3, 14):
    from concurrent.interpreters import create
    create().exec(code)
elif sys.version_info >= (3, 13):
    import _interpreters
    failure = _interpreters.exec(_interpreters.create("isolated"), code)
    assert failure is None, failure
else:
    import _xxsubinterpreters
    _xxsubinterpreters.run_string(_xxsubinterpreters.create(isolated=True), code)
"""
CALL = """
import asyncio
import echo_async
from echo_async import sync
from echo_async.testing import HostedServer

async def serve(**options):
    async with echo_async.serve(port=0, **options) as server:
        return server.port

try:
    print("result:", {}, flush=True)
except echo_async.EchoError as error:
    print(type(error).__name__, error, flush=True)
"""


def run_in_subinterpreter(*calls: str) -> list[str]:
    """Evaluate calls in an isolated subinterpreter of a new process; return the results, or ``EchoError``s."""
    command = [sys.executable, "-c", SUBINTERPRETER, "".join(CALL.replace("{}", call) for call in calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    if sys.version_info[:2] != (3, 12):  # which crashes at exit if a subinterpreter has imported ssl, whatever it did
        assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_subinterpreter_works_or_raises() -> None:
    """Before Python 3.12, it has no threads at all."""
    asyncio_client, blocking_client, *servers = run_in_subinterpreter(
        "asyncio.run(echo_async.echo('hola', 'localhost', 1))",
        "sync.echo('hola', 'localhost', 1)",
        "asyncio.run(serve(host='localhost'))",
        "sync.serve(port=0).__exit__()",
        "HostedServer().close()",
    )
    has_threads = sys.version_info >= (3, 12)
    error = "ConnectError cannot connect to localhost:1: "
    assert asyncio_client.startswith(
        error + ("connection refused" if has_threads else "cannot resolve the host name: ")
    )
    assert blocking_client.startswith(error + "connection refused")
    assert len(servers) == 3
    assert all(each.startswith("result: " if has_threads else "StartError cannot ") for each in servers)
