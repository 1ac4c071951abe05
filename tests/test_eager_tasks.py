"""The library in a program that starts its tasks eagerly: a task runs before ``create_task`` returns."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from clients import one_by_one
from support import LOOPS, TIMEOUT, fill, in_its_loop, run, wait_in_loop

import echo_async
from echo_async.config import EngineName, ServerOptions

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.eager_task_factory is new in Python 3.12")

HEADER = b"PROXY TCP4 192.0.2.7 192.0.2.8 4000 5000\r\n"
OPTIONS: list[ServerOptions] = [{}, {"proxy_protocol": "auto"}, {"mode": "identify"}]
FAULTS = {"delay=0.001,slice=2": 13, "close=5": 5, "stall=5": 5}  # and the bytes that a client receives


def run_eagerly(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main_with_factory() -> None:
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009
        async with asyncio.timeout(TIMEOUT):
            await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main_with_factory)


@pytest.fixture(params=["streams", "protocol", "threads"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    engine: EngineName = request.param
    return engine


def test_eager_server_serves_early_and_later_clients(engine: EngineName) -> None:
    async def serve(options: ServerOptions) -> None:
        header = HEADER if "proxy_protocol" in options else b""
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as early:
            early.connect(listener.getsockname())
            early.setblocking(False)
            early.sendall(header + b"early\n")
            given: ServerOptions = {"fd": os.dup(listener.fileno()), "engine": engine}
            async with echo_async.serve(**(given | options)) as server:
                for _ in range(3):
                    reader, writer = await asyncio.open_connection(*listener.getsockname())
                    writer.write(header + b"later\n")
                    assert b"later" in await reader.readline()
                    writer.close()
                    await writer.wait_closed()
                assert b"early" in await asyncio.get_running_loop().sock_recv(early, 4096)
            assert (server.stats.accepted, server.stats.failed) == (4, 0)

    for options in OPTIONS:
        run_eagerly(partial(serve, options))


def test_eager_client_and_server_with_tls_exchange_messages(
    engine: EngineName, certificate: Path, client_context: ssl.SSLContext
) -> None:
    expected = [str(number) for number in range(5)]

    async def main() -> None:
        async with (
            echo_async.serve(port=0, engine=engine, ssl_certfile=str(certificate), mode="stream") as server,
            echo_async.connect("localhost", server.address[1], ssl=client_context) as client,
        ):
            assert await client.echo("Hola!") == "Hola!"
            assert [each async for each in client.stream(one_by_one(expected))] == expected
            assert [each async for each in client.stream(expected)] == expected

    run_eagerly(main)


def test_eager_server_with_faults_applies_them(engine: EngineName) -> None:
    async def main() -> None:
        async with echo_async.serve(
            port=0, engine=engine, fault_sequence=list(FAULTS), timeout_graceful_shutdown=0.1
        ) as server:
            for size in FAULTS.values():
                reader, writer = await asyncio.open_connection(*server.address)
                writer.write(b"Hola Server!\n")
                assert await reader.readexactly(size) == b"Hola Server!\n"[:size]
                writer.close()
        assert server.stats.failed == 0

    run_eagerly(main)


def test_eager_server_closed_within_a_handshake_ends(engine: EngineName) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, engine=engine, proxy_protocol="auto") as server:
            reader, writer = await asyncio.open_connection(*server.address)
            server.close()
            assert await reader.read() == b""
            writer.close()

    run_eagerly(main)


def test_eager_handle_echo_serves() -> None:
    async def main() -> None:
        async with await asyncio.start_server(echo_async.handle_echo, "127.0.0.1", 0) as server:
            assert await echo_async.echo("Hola!", *server.sockets[0].getsockname()) == "Hola!"

    run_eagerly(main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("engine", ["streams", "protocol"])
@in_its_loop
async def test_eager_server_reads_nothing_while_it_stalls(engine: EngineName, loop: str) -> None:
    """uvloop starts to read after ``connection_made``, in which the eager task of the connection stalls."""
    asyncio.get_running_loop().set_task_factory(start_eagerly)
    async with (
        asyncio.timeout(TIMEOUT),
        echo_async.serve(port=0, engine=engine, fault="stall", timeout_graceful_shutdown=0.1) as server,
    ):
        with socket.create_connection(server.address) as client:
            await wait_in_loop(lambda: server.stats.faults == {"stall": 1})
            await asyncio.to_thread(fill, client)  # which ends when the server reads no more


def start_eagerly(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Do the same as ``eager_task_factory``, which not every Python accepts on uvloop."""
    return asyncio.Task(coroutine, loop=loop, **(options | {"eager_start": True}))
