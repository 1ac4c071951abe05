"""A program that forks: its child has duplicates of all sockets of a server, and runs on after the server is closed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import TIMEOUT, ChildProcess, connect, is_closed, is_echoed, receive_all, run_process

from echo_async import sync
from echo_async.testing import HostedServer

PROGRAM = """
import asyncio, os, signal, sys, warnings
import echo_async
from echo_async import sync
from echo_async.loops import loop_factory
from echo_async.testing import HostedServer

warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork, where the process has threads
start, options = sys.argv[1], {"port": 0, "mode": "stream", **eval(sys.argv[2])}

def fork():
    sys.stdin.readline()
    if not (child := os.fork()):
        signal.pause()
    print(child, flush=True)
    sys.stdin.readline()

async def main():
    async with echo_async.serve(engine=engine, **options) as server:
        print(server.port, flush=True)
        await asyncio.to_thread(fork)
    print("closed", flush=True)

if start in ("sync", "hosted"):
    with sync.serve(**options) if start == "sync" else HostedServer(**options) as server:
        print(server.port, flush=True)
        fork()
    print("closed", flush=True)
else:
    engine, loop = start.split("-")
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(main())
"""


class ForkingProgram:
    """A program with a server, which forks and closes the server when it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        port = self._receive()
        self.address: Any = port if port == "None" else ("127.0.0.1", int(port))

    def _receive(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def _send(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def fork(self) -> int:
        self._send()
        return int(self._receive())

    def close_server(self) -> None:
        self._send()
        assert self._receive() == "closed"


@contextmanager
def forking(start: str, options: dict[str, Any]) -> Iterator[ForkingProgram]:
    command = [sys.executable, "-c", PROGRAM, start, repr(options)]
    with ChildProcess(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield ForkingProgram(process)
        finally:
            process.kill()


@contextmanager
def running_child(program: ForkingProgram) -> Iterator[None]:
    child = program.fork()
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)


STARTS = ["sync", "hosted", "streams-asyncio", "protocol-uvloop", "threads-asyncio"]


@pytest.mark.parametrize("start", STARTS)
def test_close_after_a_fork_ends_connections_and_frees_ports(start: str) -> None:
    with forking(start, {"udp": True}) as program, connect(program) as idle, connect(program) as half_closed:
        assert is_echoed(idle)
        assert is_echoed(half_closed)
        with running_child(program):
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
            with HostedServer(port=program.address[1], udp=True) as again, connect(again) as later:
                assert is_echoed(later)
                with socket.socket(type=socket.SOCK_DGRAM) as client:
                    client.settimeout(TIMEOUT)
                    client.connect(again.address)
                    client.send(b"datagram")
                    assert client.recv(65535) == b"datagram"


@pytest.mark.parametrize("start", STARTS[:3:2])
def test_close_after_a_fork_ends_handshakes(start: str) -> None:
    with (
        forking(start, {"proxy_protocol": "v1"}) as program,
        connect(program) as silent,
        connect(program) as invalid,
        running_child(program),
    ):
        invalid.sendall(b"no PROXY header\n")
        assert is_closed(invalid)
        program.close_server()
        assert is_closed(silent)


@pytest.mark.parametrize("start", STARTS[1:4:2])
def test_close_after_a_fork_ends_unix_connections(start: str, tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    with forking(start, {"uds": path}) as program:
        program.address = path
        os.link(path, tmp_path / "other.sock")  # the server removes the first
        with connect(program) as client:
            assert is_echoed(client)
            with running_child(program):
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


def test_close_of_an_inherited_socket_leaves_it_listening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with sync.serve(fd=os.dup(listener.fileno())):
            pass
        with socket.create_connection(listener.getsockname(), TIMEOUT):
            pass
