"""Starting, closing and canceling servers, repeatedly and without leaks."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import (
    LOOPS,
    TIMEOUT,
    Backend,
    connect,
    in_its_loop,
    is_echoed,
    receive_all,
    reset,
    run,
    serve_in_loop,
    wait_in_loop,
)

import echo_async
from echo_async import sync
from echo_async.engines.connection import Connection
from echo_async.loops import LoopName, loop_factory
from echo_async.server.listeners import ListenerConfig
from echo_async.server.server import start_server as start_in_loop

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_default_socket_timeout_does_not_apply_to_clients() -> None:
    before = socket.getdefaulttimeout()
    with sync.serve(port=0, mode="stream") as server, connect(server) as client:
        socket.setdefaulttimeout(0.05)
        try:
            with socket.create_connection(server.address, TIMEOUT) as other:
                assert is_echoed(other)
                other.settimeout(0.2)  # longer than the default timeout
                with pytest.raises(TimeoutError):
                    other.recv(1)
                other.settimeout(TIMEOUT)
                assert is_echoed(other)
        finally:
            socket.setdefaulttimeout(before)
        assert is_echoed(client)


@in_its_loop
async def test_start_canceled_leaves_no_descriptor(backend: Backend) -> None:
    async with serve_in_loop(backend) as server:  # the event loop has opened its own descriptors afterwards
        server.close()
        await server.wait_closed()
    before = sorted(os.listdir("/proc/self/fd"))
    for turns in range(6):
        listener = ListenerConfig(echo_async.ServerConfig(engine=backend.engine, port=0))
        starting = asyncio.ensure_future(start_in_loop([listener]))
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with suppress(asyncio.CancelledError):
            server = await starting
            server.close()
            await server.wait_closed()
        for _ in range(10):
            await asyncio.sleep(0)
        assert sorted(os.listdir("/proc/self/fd")) == before


@in_its_loop
async def test_close_called_repeatedly_is_idempotent(backend: Backend) -> None:
    async with serve_in_loop(backend) as server:
        server.close()
        await asyncio.gather(*(server.wait_closed() for _ in range(3)))
        server.close()
        server.abort()
        await server.wait_closed()
        await server.serve_forever()


@pytest.mark.parametrize("loop", LOOPS)
def test_close_before_the_loop_ends_closes_everything(loop: LoopName) -> None:
    """Nobody waits for the shutdown, so it is canceled: even then, no socket and no connection is left."""
    clients: list[socket.socket] = []

    async def main() -> None:
        server = await echo_async.serve(port=0, mode="stream")
        clients.append(socket.create_connection(server.address, TIMEOUT))
        await server.wait_for(active=1)
        server.close()

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(main())
    with clients[0] as client, suppress(ConnectionResetError):
        assert client.recv(1) == b""


@in_its_loop
async def test_serve_forever_canceled_closes_connections(backend: Backend) -> None:
    async with serve_in_loop(backend) as server:
        assert isinstance(server.address, tuple)
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(b"one\n")
        assert await reader.readline() == b"one\n"
        task = asyncio.create_task(server.serve_forever())
        await asyncio.sleep(0)
        task.cancel()
        assert await reader.read() == b""
        writer.close()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_server_restarted_200_times_leaves_no_resources(backend: Backend) -> None:
    """Start, serve and stop on the same port each time. The signal handlers of the program stay unchanged."""
    engine, loop = backend
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]

    async def serve_once(port: int) -> int:
        async with echo_async.serve(engine=engine, port=port) as server:
            assert await echo_async.echo("hello", *server.address) == "hello"
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert server.port is not None
        return server.port

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        port = 0
        for _ in range(50):
            port = runner.run(serve_once(port))
        gc.collect()
        threads, descriptors, before = threading.enumerate(), len(os.listdir("/proc/self/fd")), memory()
        for _ in range(150):
            assert runner.run(serve_once(port)) == port
        gc.collect()
        assert set(threading.enumerate()) <= set(threads)  # threads of trio may have ended
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert memory() - before < 5 * 1024 * 1024
        assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers


@pytest.mark.parametrize("loop", LOOPS)
@in_its_loop
async def test_task_canceled_before_its_first_step_closes(loop: LoopName) -> None:
    """Its coroutine runs nothing then, not even what stands in ``finally``."""

    def cancel_at_once(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        if "StreamConnection" in work.__qualname__:
            task.cancel()
        return task

    asyncio.get_running_loop().set_task_factory(cancel_at_once)
    async with serve_in_loop(Backend("streams", loop)) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(b"one\n")
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        await wait_in_loop(lambda: server.stats.active == 0)
        assert server.stats.accepted == 1
        server.close()
        await server.wait_closed()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("is_logged", [False, True], ids=["silent", "logged"])
@in_its_loop
async def test_connections_closed_leave_no_object(backend: Backend, is_logged: bool) -> None:
    """Nor one that waits for the garbage collector."""
    access_log = logging.getLogger("echo_async.access")
    access_log.setLevel(logging.INFO)
    access_log.propagate = False

    def exchange(address: tuple[str, int], count: int) -> None:
        for _ in range(count):
            with socket.create_connection(address, TIMEOUT) as client:
                assert is_echoed(client)
                assert receive_all(client) == b""

    def objects() -> Counter[str]:
        """Count the objects of this package by type."""
        types = (str(type(each)) for each in gc.get_objects())
        return Counter(each for each in types if "echo_async" in each)

    asyncio.get_running_loop().set_debug(False)  # which keeps tracebacks
    async with echo_async.serve(port=0, engine=backend.engine, no_access_log=not is_logged) as server:
        await asyncio.to_thread(exchange, server.address, 10)
        await wait_in_loop(lambda: server.stats.active == 0)
        gc.collect()
        before = objects()
        await asyncio.to_thread(exchange, server.address, 300)
        await wait_in_loop(lambda: server.stats.active == 0)
        assert (objects() - before).total() < 100  # the sweep keeps a list of those that it found open


@pytest.mark.usefixtures("no_garbage_collection")
def test_reply_to_a_reset_connection_leaves_no_object(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio keeps the error of the reply, whose traceback has the connection."""
    clients: list[socket.socket] = []

    def reset_client(record: logging.LogRecord) -> bool:
        """Between the message and its reply."""
        if "chunk received" in record.msg:
            reset(clients.pop())
        return True

    def count_connections() -> int:
        return sum(isinstance(each, Connection) for each in gc.get_objects())

    async def main() -> None:
        asyncio.get_running_loop().set_debug(False)  # which keeps tracebacks
        async with echo_async.serve(port=0, engine=backend.engine, mode="stream") as server:
            for _ in range(20):
                clients.append(connect(server))
                clients[0].sendall(b"one\n")
                await wait_in_loop(lambda: not clients and server.stats.active == 0)
            await wait_in_loop(lambda: count_connections() <= before)

    caplog.set_level(logging.DEBUG, "echo_async.server")
    monkeypatch.setattr(logging.getLogger("echo_async.server"), "filters", [reset_client])
    before = count_connections()
    run(main, backend.loop)


SIGTERM_DURING_STARTUP = """
import os, signal, sys
from echo_async import net
from echo_async.cli.server import main

bind = net.bind

def bind_after_sigterm(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return bind(*arguments)

net.bind = bind_after_sigterm
sys.exit(main(["--port", "0", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("options", [["--loop", "uvloop"], ["--engine", "threads"], ["--workers", "2"]], ids=" ".join)
def test_sigterm_during_startup_stops_the_server(options: list[str]) -> None:
    command = [sys.executable, "-c", SIGTERM_DURING_STARTUP, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert done.returncode == 0
    assert " SIGTERM received: shutting down\n" in done.stderr
    assert "Traceback" not in done.stderr
