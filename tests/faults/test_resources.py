"""Too few descriptors or threads, or none: at the limits of the system, and in subinterpreters."""

from __future__ import annotations

import errno
import logging
import os
import platform
import resource
import select
import selectors
import socket
import ssl
import sys
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support import (
    LOOPS,
    MAX_DELAY,
    Backend,
    connect,
    count_events,
    counters,
    is_echoed,
    log_lines,
    receive_all,
    receive_exactly,
    run,
    run_process,
    server_process,
    single_error_line,
)

import echo_async
from echo_async import sync
from echo_async.testing import HostedServer

pytestmark = pytest.mark.usefixtures("no_leaks")

REASON = "can't start new thread"
UNRESOLVED = f"cannot resolve the host name: {REASON}; use an address"


def test_thread_start_failure_refuses_only_that_client(
    context: ssl.SSLContext | None, certificate: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start_thread = threading.Thread.start
    refused = [RuntimeError(REASON), MemoryError(), RuntimeError(REASON)]

    def start(self: threading.Thread) -> None:
        if self.name == "echo-async client" and refused:
            raise refused.pop()
        start_thread(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with sync.serve(port=0, ssl_certfile=str(certificate) if context else None) as server:
        for _ in range(3):
            with connect(server) as client, suppress(ConnectionError):
                assert receive_all(client) == b""
        with connect(server, context) as client:
            assert is_echoed(client)
        assert server.stats.refused == 3
        assert server.stats.accepted == 1
    lines = log_lines(caplog, logging.WARNING)
    assert lines[0] == f"accept failed: {REASON}; retrying in 0.1 s"
    assert sum(map(count_events, lines)) == 3


def test_start_without_descriptors_fails_without_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_open() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(selectors, "DefaultSelector", fail_to_open)
    with pytest.raises(echo_async.StartError, match="too many open files"):
        sync.serve(port=0)
    assert sorted(os.listdir("/proc/self/fd")) == before


OPTIONS = [["--loop", "asyncio"], ["--loop", "uvloop"], ["--engine", "threads"]]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_descriptors_exhausted_serves_some_and_recovers(options: list[str]) -> None:
    """With 64 descriptors and 200 clients, the server serves some, counts the others, and uses no CPU time."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    arguments = (*options, "--mode", "stream", "--no-access-log")
    with server_process(*arguments, preexec_fn=limit) as server, ExitStack() as clients:
        start = monotonic()
        served = []
        for _ in range(200):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError):
                client.sendall(b"hello\n")
                if client.recv(100) == b"hello\n":
                    served.append(client)
        assert 16 <= len(served) < 64

        def cpu() -> float:
            tasks = Path(f"/proc/{server.process.pid}/task").glob("*/schedstat")
            return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

        cpu_before, idle_start = cpu(), monotonic()
        assert select.select(served, [], [], 0.4)[0] == []
        assert cpu() - cpu_before < 0.05 * (monotonic() - idle_start)
        for client in served:
            assert is_echoed(client)
        for client in served:
            client.close()
        room_since = monotonic()
        served_later: list[socket.socket] = []
        while len(served_later) < len(served):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError, AssertionError):
                if is_echoed(client):
                    served_later.append(client)
        assert monotonic() - room_since < MAX_DELAY
        seconds = monotonic() - start
        log = server.stop()
    assert "Traceback" not in log
    counted = counters(log)
    assert counted["accepted"] == len(served) + len(served_later)
    assert counted["refused"] >= 200 - len(served)
    lines = [line for line in log.splitlines() if " WARNING " in line or " ERROR " in line]
    assert 1 <= len(lines) <= 2 + seconds  # one of them at the stop
    assert sum(count_events(line) for line in lines if "connection refused" in line) == counted["refused"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="relies on its malloc")
@pytest.mark.parametrize("loop", LOOPS)
def test_large_messages_reuse_the_same_memory(loop: str) -> None:
    """Memory that is returned to the kernel for each message costs a page fault per 4 KiB of the next one."""
    message = b"x" * (1024 * 1024 - 1) + b"\n"

    def usage() -> tuple[int, int]:
        """Return the page faults, and the resident memory in bytes."""
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[7]), int(fields[21]) * resource.getpagesize()

    with server_process("--engine", "protocol", "--loop", loop, "--mode", "stream", "--no-access-log") as server:
        _, memory_before = usage()
        with server.connect() as client:
            for number in range(40):
                if number == 20:
                    faults_before, _ = usage()
                client.sendall(message)
                assert receive_exactly(client, len(message)) == message
            faults, memory = usage()
        assert (faults - faults_before) / 20 < 64
        assert memory - memory_before < 8 * 1024 * 1024


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_start(thread: threading.Thread) -> None:
        raise RuntimeError(REASON)

    monkeypatch.setattr(threading.Thread, "start", fail_to_start)


@pytest.mark.usefixtures("no_threads")
def test_host_name_without_threads_raises(backend: Backend) -> None:
    with pytest.raises(echo_async.ConnectError) as not_connected:
        run(lambda: echo_async.echo("hola", "localhost"), backend.loop)
    assert str(not_connected.value) == "cannot connect to localhost:5500: " + UNRESOLVED

    async def main() -> None:
        await echo_async.serve(host="localhost", port=0, engine=backend.engine)

    with pytest.raises(echo_async.StartError) as not_started:
        run(main, backend.loop)
    assert str(not_started.value) == "cannot listen on host 'localhost': " + UNRESOLVED


@pytest.mark.usefixtures("no_threads")
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


def test_commands_without_threads_print_one_error(echo_server: HostedServer) -> None:
    host, port = echo_server.address
    for arguments, code, error in (
        (("client", "--host", "localhost", "hola"), 3, f": {UNRESOLVED}"),
        (("server", "--port", "0", "--engine", "threads"), 3, f"error: cannot serve on threads: {REASON}; raise the"),
        (("client", "--host", host, "--port", str(port), "-"), 1, f"error: cannot read stdin: {REASON}\n"),
    ):
        done = run_process([sys.executable, "-c", COMMAND, *arguments], "hola\n")
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
    done = run_process(command)
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
