"""A program that ends while something of the library is open: its own error and exit code, at once."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support import MAX_DELAY, TIMEOUT, ChildProcess, is_closed, is_echoed

PROGRAM = """
import asyncio, sys
import echo_async
from echo_async import sync
from echo_async.loops import loop_factory
from echo_async.testing import HostedServer

start, options = sys.argv[1], {"port": 0, "mode": "stream", **eval(sys.argv[2])}

def fail():
    raise RuntimeError("a bug of the program")

async def main():
    server, read = await echo_async.serve(engine=engine, **options), asyncio.Event()
    print(server.port, flush=True)
    asyncio.get_running_loop().add_reader(0, read.set)
    await read.wait()
    fail()

if start in ("sync", "hosted"):
    server = sync.serve(**options) if start == "sync" else HostedServer(**options)
    print(server.port, flush=True)
    sys.stdin.readline()
    fail()
else:
    engine, loop = start.split("-")
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(main())
"""


class Program:
    """A program that serves until it gets a line, and then fails."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self._port = int(process.stdout.readline())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), TIMEOUT)

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Let the program fail, or send it a signal; return its exit code and its output on stderr."""
        start = monotonic()
        if number is not None:
            self._process.send_signal(number)
        _, stderr = self._process.communicate("" if number else "\n", timeout=TIMEOUT)
        assert monotonic() - start < MAX_DELAY
        return self._process.returncode, stderr


@contextmanager
def running(start: str, options: dict[str, Any], *, program: str = PROGRAM) -> Iterator[Program]:
    with ChildProcess(
        [sys.executable, "-c", program, start, repr(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Program(process)
        finally:
            process.kill()


def assert_reported_once(stderr: str, error: str) -> None:
    """Check that the error of the program is the only one. Log lines about its clients may follow."""
    lines = stderr.splitlines()
    assert lines.count(error) == 1, stderr
    assert not re.search("ignored|never retrieved|Fatal", stderr), stderr


@pytest.mark.parametrize(
    ("start", "options"),
    [
        ("sync", {}),
        ("sync", {"fault": "stall=6"}),
        ("hosted", {"udp": True}),
        ("streams-asyncio", {"udp": True}),
        ("streams-uvloop", {"fault": "stall=6"}),
        ("protocol-uvloop", {}),
        ("threads-asyncio", {}),
    ],
    ids=str,
)
def test_program_that_fails_with_open_clients_ends(start: str, options: dict[str, Any]) -> None:
    with running(start, options) as program, program.connect() as idle, program.connect() as incomplete:
        assert is_echoed(idle, b"Hola!\n")
        incomplete.sendall(b"no newline")
        code, stderr = program.end()
        assert is_closed(idle)
        assert is_closed(incomplete)
    assert code == 1
    assert_reported_once(stderr, "RuntimeError: a bug of the program")


@pytest.mark.parametrize(
    ("start", "has_tls"),
    [("sync", True), ("hosted", False), ("streams-asyncio", True), ("protocol-uvloop", False)],
)
def test_program_that_fails_within_a_handshake_ends(start: str, has_tls: bool, certificate: Path) -> None:
    options = {"ssl_certfile": str(certificate)} if has_tls else {"proxy_protocol": "auto"}
    with running(start, options) as program, program.connect() as silent, program.connect() as incomplete:
        incomplete.sendall(b"\x16\x03" if has_tls else b"PROXY ")
        code, stderr = program.end()
        assert is_closed(silent)
        assert is_closed(incomplete)
    assert code == 1
    assert_reported_once(stderr, "RuntimeError: a bug of the program")


@pytest.mark.parametrize("start", ["hosted", "streams-uvloop", "protocol-asyncio"])
def test_program_interrupted_with_an_open_server_ends(start: str) -> None:
    with running(start, {"mode": "stream"}) as program, program.connect() as client:
        assert is_echoed(client)  # in debug mode, asyncio reports a connection that it is about to establish
        code, stderr = program.end(signal.SIGINT)
        assert is_closed(client)
    assert code == -signal.SIGINT
    assert_reported_once(stderr, "KeyboardInterrupt")


def test_pytest_with_an_open_server_reports_and_ends(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("""
from echo_async.testing import HostedServer

def test_leaves_a_server_open():
    server = HostedServer(udp=True)
    assert server.port is None
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=tmp_path)
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    assert "Traceback" not in done.stderr


THREAD_PROGRAM = """
import sys, threading, time
from echo_async import sync

def fail_later():
    sys.stdin.readline()
    raise RuntimeError("a bug of the program")

server = sync.serve(port=0, mode="stream")
print(server.port, flush=True)
threading.Thread(target=fail_later).start()
while not server.stats.messages:  # Python 3.12 starts no thread once the main thread has ended
    time.sleep(0.01)
"""


def test_server_stays_open_for_a_thread_of_the_program() -> None:
    with running("sync", {}, program=THREAD_PROGRAM) as program, program.connect() as client:
        assert is_echoed(client)  # the main thread may have ended before or after this
        assert is_echoed(client)
        code, stderr = program.end()
        assert is_closed(client)
    assert code == 0
    assert_reported_once(stderr, "RuntimeError: a bug of the program")


SUBINTERPRETER_PROGRAM = """
import _interpreters
interpreter = _interpreters.create()
failure = _interpreters.exec(interpreter, '''
import asyncio
import echo_async
from echo_async import sync
from echo_async.testing import HostedServer

async def main():
    async with echo_async.serve(host="localhost", port=0) as server:
        assert await echo_async.echo("Hola!", "localhost", server.port) == "Hola!"

asyncio.run(main())
server = HostedServer(udp=True, mode="stream")
client = sync.connect(*server.address)
assert client.echo("Hola!") == "Hola!"
''')
assert failure is None, failure
_interpreters.destroy(interpreter)
print("ended")
"""


@pytest.mark.skipif(sys.version_info < (3, 13), reason="asyncio and ssl crash in a subinterpreter of Python 3.12")
def test_subinterpreter_with_an_open_server_ends() -> None:
    command = [sys.executable, "-c", SUBINTERPRETER_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


RESOLVER_PROGRAM = """
import asyncio, socket, threading
import echo_async
resolving = threading.Event()

def never_resolve(*args, flags=0, **options):
    if flags & socket.AI_NUMERICHOST:
        raise socket.gaierror
    resolving.set()
    threading.Event().wait()

socket.getaddrinfo = never_resolve

async def main():
    starting = asyncio.ensure_future({}(host="example.org"))
    await asyncio.to_thread(resolving.wait)
    raise RuntimeError("a bug of the program")

asyncio.run(main())
"""


@pytest.mark.parametrize("function", ["echo_async.serve", "echo_async.connect"])
def test_program_that_fails_while_resolving_ends(function: str) -> None:
    code = RESOLVER_PROGRAM.format(function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert_reported_once(done.stderr, "RuntimeError: a bug of the program")
