"""A program that ends, or forks, while something of the library is open: its own exit code, at once, and free ports."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from time import monotonic
from typing import Any

import pytest
from support import MAX_DELAY, TIMEOUT, ChildProcess, connect, is_closed, is_echoed, receive_all, run_process

from echo_async.testing import HostedServer

PROGRAM = """
import asyncio, os, signal, sys, warnings
import echo_async
from echo_async import sync
from echo_async.loops import loop_factory
from echo_async.testing import HostedServer

warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork, where the process has threads
start, options = sys.argv[1], {"port": 0, "mode": "stream", **eval(sys.argv[2])}

def handle(command):
    "Return whether it is to close the server."
    if command == "fail\\n":
        raise RuntimeError("a bug of the program")
    if command == "fork\\n":
        child = os.fork()
        if not child:
            signal.pause()
        print(child, flush=True)
    return command == "close\\n"

async def main():
    server, commands = await echo_async.serve(engine=engine, **options), asyncio.Queue()
    print(server.port, flush=True)
    asyncio.get_running_loop().add_reader(0, lambda: commands.put_nowait(sys.stdin.readline()))
    while True:
        if handle(await commands.get()):
            server.close()
            await server.wait_closed()
            print("closed", flush=True)

if start in ("sync", "hosted"):
    server = sync.serve(**options) if start == "sync" else HostedServer(**options)
    print(server.port, flush=True)
    while True:
        if handle(sys.stdin.readline()):
            server.close()
            if start == "sync":
                server.wait_closed()
            print("closed", flush=True)
else:
    engine, loop = start.split("-")
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(main())
"""


class Program:
    """A program with a server, which takes commands."""

    def __init__(self, process: ChildProcess) -> None:
        self._process = process
        port = self._receive()
        self.address: Any = port if port == "None" else ("127.0.0.1", int(port))

    def _receive(self) -> str:
        line: str = self._process.stdout.readline()
        return line.rstrip("\n")

    def _send(self, command: str) -> None:
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def end(self, *clients: socket.socket, code: int = 1, number: int | None = None) -> None:
        """Let the program fail, or send it a signal: it ends at once, as without clients, whose connections end."""
        start = monotonic()
        if number is not None:
            self._process.send_signal(number)
        _, stderr = self._process.communicate("" if number else "fail\n", timeout=TIMEOUT)
        assert monotonic() - start < MAX_DELAY
        assert all(map(is_closed, clients))
        assert self._process.returncode == code
        assert_reported_once(stderr, "KeyboardInterrupt" if number else "RuntimeError: a bug of the program")

    @contextmanager
    def forked(self) -> Iterator[None]:
        """Fork. The child runs until the end of the block."""
        self._send("fork")
        child = int(self._receive())
        yield
        os.kill(child, signal.SIGKILL)

    def close_server(self) -> None:
        self._send("close")
        assert self._receive() == "closed"


@contextmanager
def running(start: str, options: dict[str, Any], *, program: str = PROGRAM) -> Iterator[Program]:
    command = [sys.executable, "-c", program, start, repr(options)]
    with ChildProcess(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as process:
        yield Program(process)
        process.kill()


def assert_reported_once(stderr: str, error: str) -> None:
    """Check that the error of the program is the only one. Log lines about its clients may follow."""
    lines = stderr.splitlines()
    assert lines.count(error) == 1, stderr
    assert not re.search("ignored|never retrieved|Fatal", stderr), stderr


@pytest.mark.parametrize(
    ("start", "options"),
    [
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
    with running(start, options) as program, connect(program) as idle, connect(program) as incomplete:
        assert is_echoed(idle, b"Hola!\n")
        incomplete.sendall(b"no newline")
        program.end(idle, incomplete)


@pytest.mark.parametrize(
    ("start", "has_tls"),
    [("sync", True), ("hosted", False), ("streams-asyncio", True), ("protocol-uvloop", False)],
)
def test_program_that_fails_within_a_handshake_ends(start: str, has_tls: bool, certificate: Path) -> None:
    options = {"ssl_certfile": str(certificate)} if has_tls else {"proxy_protocol": "auto"}
    with running(start, options) as program, connect(program) as silent, connect(program) as incomplete:
        incomplete.sendall(b"\x16\x03" if has_tls else b"PROXY ")
        program.end(silent, incomplete)


@pytest.mark.parametrize("start", ["hosted", "streams-uvloop", "protocol-asyncio"])
def test_program_interrupted_with_an_open_server_ends(start: str) -> None:
    with running(start, {}) as program, connect(program) as client:
        assert is_echoed(client)  # in debug mode, asyncio reports a connection that it is about to establish
        program.end(client, code=-signal.SIGINT, number=signal.SIGINT)


def test_pytest_with_an_open_server_reports_and_ends(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("""
from echo_async.testing import HostedServer

def test_leaves_a_server_open():
    server = HostedServer(udp=True)
    assert server.port is None
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = run_process(command, cwd=tmp_path, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    assert "Traceback" not in done.stderr


BLOCKED_PROGRAM = """
import logging, socket, threading
from echo_async import sync

class BlockingHandler(logging.Handler):
    def handle(self, record):  # which holds no lock, unlike emit
        if threading.current_thread().name == "echo-async UDP":
            blocked.set()
            threading.Event().wait()

blocked = threading.Event()
log = logging.getLogger("echo_async")
log.setLevel(logging.DEBUG)
log.addHandler(BlockingHandler())
server = sync.serve(port=0, udp=True)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.sendto(b"one", server.address)
    blocked.wait()
"""


def test_program_whose_log_blocks_the_thread_of_udp_ends() -> None:
    done = run_process([sys.executable, "-c", BLOCKED_PROGRAM])
    assert (done.returncode, done.stderr) == (0, "")


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
    with running("sync", {}, program=THREAD_PROGRAM) as program, connect(program) as client:
        assert is_echoed(client)  # the main thread may have ended before or after this
        assert is_echoed(client)
        program.end(client, code=0)


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
    done = run_process([sys.executable, "-c", SUBINTERPRETER_PROGRAM])
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
    done = run_process([sys.executable, "-c", RESOLVER_PROGRAM.format(function)])
    assert done.returncode == 1
    assert_reported_once(done.stderr, "RuntimeError: a bug of the program")


# The program forks: its child has duplicates of all sockets of a server, and runs on after the server is closed


@pytest.mark.parametrize("start", ["sync", "hosted", "streams-asyncio", "protocol-uvloop", "threads-asyncio"])
def test_close_after_a_fork_ends_connections_and_frees_ports(start: str, reserved_port: int) -> None:
    with (
        running(start, {"udp": True, "port": reserved_port}) as program,
        connect(program) as idle,
        connect(program) as half_closed,
    ):
        assert is_echoed(idle)
        assert is_echoed(half_closed)
        with program.forked():
            half_closed.shutdown(socket.SHUT_WR)
            assert receive_all(half_closed) == b""
            assert is_echoed(idle)
            program.close_server()
            assert is_closed(idle)
            with pytest.raises(ConnectionRefusedError):
                connect(program)
            with socket.socket(type=socket.SOCK_DGRAM) as client:
                client.connect(program.address)
                client.send(b"late")
                with pytest.raises(ConnectionRefusedError):
                    client.recv(65535)
            with HostedServer(port=reserved_port, udp=True) as again, connect(again) as later:
                assert is_echoed(later)
                with socket.socket(type=socket.SOCK_DGRAM) as client:
                    client.settimeout(TIMEOUT)
                    client.connect(again.address)
                    client.send(b"datagram")
                    assert client.recv(65535) == b"datagram"


@pytest.mark.parametrize("start", ["sync", "streams-asyncio"])
def test_close_after_a_fork_ends_handshakes(start: str) -> None:
    with (
        running(start, {"proxy_protocol": "v1"}) as program,
        connect(program) as silent,
        connect(program) as invalid,
        program.forked(),
    ):
        invalid.sendall(b"no PROXY header\n")
        assert is_closed(invalid)
        program.close_server()
        assert is_closed(silent)


@pytest.mark.parametrize("start", ["hosted", "protocol-uvloop"])
def test_close_after_a_fork_ends_unix_connections(start: str, tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    with running(start, {"uds": path}) as program:
        program.address = path
        os.link(path, tmp_path / "other.sock")  # the server removes the first
        with connect(program) as client:
            assert is_echoed(client)
            with program.forked():
                program.close_server()
                assert is_closed(client)
                with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
                    late.connect(str(tmp_path / "other.sock"))


CHILD_PROGRAM = """
import os, sys, warnings
from echo_async import sync
from echo_async.testing import HostedServer

warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork, where the process has threads
start, is_closed = sync.serve if sys.argv[1] == "sync" else HostedServer, sys.argv[2] == "closed"
server = start(port=0, mode="stream", udp=True)
if not (child := os.fork()):
    if is_closed:
        server.close()
        if sys.argv[1] == "sync":
            server.wait_closed()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
with sync.connect(*server.address) as client:
    assert client.echo("Hola!") == "Hola!"
"""


@pytest.mark.parametrize(("start", "is_closed"), [("sync", "closed"), ("hosted", "closed"), ("hosted", "open")])
def test_forked_child_that_ends_leaves_the_server(start: str, is_closed: str) -> None:
    done = run_process([sys.executable, "-c", CHILD_PROGRAM, start, is_closed])
    assert (done.returncode, done.stderr) == (0, "")
