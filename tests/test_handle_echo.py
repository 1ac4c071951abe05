"""``handle_echo`` in a server of the user's own: it keeps every rule of the wire, and ends with the event loop."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
from support import LOOPS, TIMEOUT, receive_all, run

import echo_async
from echo_async.config import Mode
from echo_async.loops import LoopName

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
OnLoop = Callable[..., None]


@pytest.fixture(params=LOOPS)
def on_loop(request: pytest.FixtureRequest) -> OnLoop:
    """Run a coroutine function on each event loop, in debug mode, ``then`` something without it.

    Nothing may be reported to the loop, and no descriptor left open.
    """
    loop: LoopName = request.param
    run(lambda: asyncio.sleep(0), loop)  # what a loop opens once for all

    def run_and_look(main: Callable[[], Awaitable[None]], then: Callable[[], None] = lambda: None) -> None:
        problems: list[dict[str, Any]] = []
        descriptors = len(os.listdir("/proc/self/fd"))

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
            async with asyncio.timeout(TIMEOUT):
                await main()

        run(watched, loop)
        then()
        gc.collect()
        assert problems == []
        assert len(os.listdir("/proc/self/fd")) == descriptors

    return run_and_look


@asynccontextmanager
async def served(handler: Any) -> AsyncIterator[tuple[str, int]]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()


@asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*address)
    yield reader, writer
    writer.close()
    await writer.wait_closed()


async def all_gone() -> None:
    """Wait until no handler runs any more."""
    if handlers := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(handlers)


def test_handle_echo_answers_one_message_and_closes(on_loop: OnLoop) -> None:
    message = "¡Hola Server! Esto es más largo que veinte bytes.\n".encode()

    async def main() -> None:
        async with served(echo_async.handle_echo) as address, connected(address) as (reader, writer):
            writer.write(message + b"discarded")
            assert await reader.read() == message
        await all_gone()

    on_loop(main)


@pytest.mark.parametrize(("mode", "reply"), [("message", b"one\n"), ("stream", b"one\ntwo\n"), ("raw", None)])
def test_handle_echo_in_each_mode_answers_by_its_rules(on_loop: OnLoop, mode: Mode, reply: bytes | None) -> None:
    sent = b"one\ntwo\nunfinished"

    async def main() -> None:
        handler = partial(echo_async.handle_echo, mode=mode, chunk_size=3)
        async with served(handler) as address, connected(address) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == (sent if reply is None else reply)
        await all_gone()

    on_loop(main)


def test_handle_echo_answers_ten_thousand_messages(on_loop: OnLoop) -> None:
    sent = b"".join(b"%d\n" % number for number in range(10_000))

    async def main() -> None:
        async with served(partial(echo_async.handle_echo, mode="stream")) as address:
            async with connected(address) as (reader, writer):
                writer.write(sent)
                assert await reader.readexactly(len(sent)) == sent
            await all_gone()

    on_loop(main)


def test_handle_echo_message_too_long_closes_after_replies(on_loop: OnLoop) -> None:
    handler = partial(echo_async.handle_echo, mode="stream", limit_message_size=64)

    async def main() -> None:
        async with served(handler) as address, connected(address) as (reader, writer):
            writer.write(b"x" * 63 + b"\n" + b"y" * 64 + b"\nnever\n")
            assert await reader.read() == b"x" * 63 + b"\n"
        await all_gone()

    on_loop(main)


@pytest.mark.parametrize(("sent", "option"), [(b"", "timeout_idle"), (b"begun", "timeout_message")])
def test_handle_echo_timeout_closes_the_connection(on_loop: OnLoop, sent: bytes, option: str) -> None:
    handler = partial(echo_async.handle_echo, **{option: 0.1})  # type: ignore[arg-type]

    async def main() -> None:
        async with served(handler) as address, connected(address) as (reader, writer):
            writer.write(sent)
            assert await reader.read() == b""
        await all_gone()

    on_loop(main)


def test_handle_echo_write_timeout_closes_the_connection(on_loop: OnLoop) -> None:
    handler = partial(echo_async.handle_echo, mode="raw", chunk_size=65536, timeout_write=0.1)

    async def main() -> None:
        async with served(handler) as address:
            reader, writer = await asyncio.open_connection(*address, limit=1)
            with suppress(ConnectionError, RuntimeError):  # uvloop says RuntimeError
                while True:
                    writer.write(bytes(65536))
                    await writer.drain()
            writer.transport.abort()
            await all_gone()
            del reader  # it had to live: a client that is collected closes

    on_loop(main)


def test_handle_echo_reset_is_not_reported_to_the_loop(on_loop: OnLoop) -> None:
    async def main() -> None:
        async with served(partial(echo_async.handle_echo, mode="stream")) as address:
            for sent in (b"", b"begun", b"one\n" * 10_000):
                _, writer = await asyncio.open_connection(*address)
                writer.write(sent)
                writer.transport.abort()
                await asyncio.sleep(0)
            await all_gone()

    on_loop(main)


def test_handle_echo_invalid_option_raises_and_closes(on_loop: OnLoop) -> None:
    async def main() -> None:
        problem: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                echo_async.handle_echo(reader, writer, mode="loud")  # type: ignore[arg-type]
            except echo_async.ConfigError as error:
                problem.set_result(error)

        async with served(handle) as address, connected(address) as (reader, _):
            with suppress(ConnectionResetError):
                assert await reader.read() == b""  # and not an open connection that nobody serves
            assert str(await problem).startswith("invalid mode: 'loud' ")

    on_loop(main)


@pytest.mark.parametrize("sent", [b"", b"begun", b"whole\n"])
def test_handle_echo_end_of_loop_closes_all_connections(on_loop: OnLoop, sent: bytes) -> None:
    clients: list[socket.socket] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(partial(echo_async.handle_echo, mode="stream"), "127.0.0.1", 0)
        for _ in range(10):
            clients.append(client := socket.create_connection(server.sockets[0].getsockname()))
            client.setblocking(False)
            await loop.sock_sendall(client, b"hello\n" + sent)
            assert await loop.sock_recv(client, 6) == b"hello\n"
        server.close()

    def then() -> None:
        for client in clients:
            client.settimeout(TIMEOUT)
            with client:
                assert everything(client) in (b"", sent)

    on_loop(main, then)


def everything(client: socket.socket) -> bytes:
    try:
        return receive_all(client)
    except ConnectionResetError:
        return b""


def test_handle_echo_canceled_while_sending_ends(on_loop: OnLoop) -> None:
    size = 12 * 1024 * 1024

    async def main() -> None:
        started: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

        def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            started.set_result(echo_async.handle_echo(reader, writer, limit_message_size=size, chunk_size=65536))

        async with served(handle) as address:
            loop = asyncio.get_running_loop()
            with socket.create_connection(address) as client:
                client.setblocking(False)
                await loop.sock_sendall(client, b"x" * (size - 1) + b"\n")
                task = await started
                assert await loop.sock_recv(client, 1) == b"x"  # the reply is on its way
                task.cancel()
                async with asyncio.timeout(TIMEOUT):
                    with pytest.raises(asyncio.CancelledError):
                        await task

    on_loop(main)


def test_handle_echo_canceled_while_reading_closes(on_loop: OnLoop) -> None:
    async def main() -> None:
        started: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            started.set_result(echo_async.handle_echo(reader, writer))

        async with served(connected) as address:
            reader, writer = await asyncio.open_connection(*address)
            task = await started
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        await all_gone()

    on_loop(main)
