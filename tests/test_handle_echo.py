"""``handle_echo`` as the handler of ``asyncio.start_server``."""

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
    """Run a coroutine function on each event loop in debug mode, and call ``then`` when the loop is closed.

    The event loop must report no error, and no descriptor may stay open.
    """
    loop: LoopName = request.param
    run(lambda: asyncio.sleep(0), loop)  # opens descriptors that stay open

    def run_and_check(main: Callable[[], Awaitable[None]], then: Callable[[], None] = lambda: None) -> None:
        loop_errors: list[dict[str, Any]] = []
        descriptors = len(os.listdir("/proc/self/fd"))

        async def checked() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
            async with asyncio.timeout(TIMEOUT):
                await main()

        run(checked, loop)
        then()
        gc.collect()
        assert loop_errors == []
        assert len(os.listdir("/proc/self/fd")) == descriptors

    return run_and_check


@asynccontextmanager
async def start_server(handler: Any) -> AsyncIterator[tuple[str, int]]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()


@asynccontextmanager
async def open_client(address: tuple[str, int]) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*address)
    yield reader, writer
    writer.close()
    await writer.wait_closed()


async def wait_for_handlers() -> None:
    """Wait until every handler has ended."""
    if handlers := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(handlers)


def test_handle_echo_answers_one_message_and_closes(on_loop: OnLoop) -> None:
    message = "¡Hola Server! Esto es más largo que veinte bytes.\n".encode()

    async def main() -> None:
        async with start_server(echo_async.handle_echo) as address, open_client(address) as (reader, writer):
            writer.write(message + b"discarded")
            assert await reader.read() == message
        await wait_for_handlers()

    on_loop(main)


@pytest.mark.parametrize(("mode", "reply"), [("message", b"one\n"), ("stream", b"one\ntwo\n"), ("raw", None)])
def test_handle_echo_in_each_mode_answers_by_its_rules(on_loop: OnLoop, mode: Mode, reply: bytes | None) -> None:
    sent = b"one\ntwo\nunfinished"

    async def main() -> None:
        handler = partial(echo_async.handle_echo, mode=mode, chunk_size=3)
        async with start_server(handler) as address, open_client(address) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == (sent if reply is None else reply)
        await wait_for_handlers()

    on_loop(main)


def test_handle_echo_answers_ten_thousand_messages(on_loop: OnLoop) -> None:
    sent = b"".join(b"%d\n" % number for number in range(10_000))

    async def main() -> None:
        async with start_server(partial(echo_async.handle_echo, mode="stream")) as address:
            async with open_client(address) as (reader, writer):
                writer.write(sent)
                assert await reader.readexactly(len(sent)) == sent
            await wait_for_handlers()

    on_loop(main)


def test_handle_echo_message_too_long_closes_after_replies(on_loop: OnLoop) -> None:
    handler = partial(echo_async.handle_echo, mode="stream", limit_message_size=64)

    async def main() -> None:
        async with start_server(handler) as address, open_client(address) as (reader, writer):
            writer.write(b"x" * 63 + b"\n" + b"y" * 64 + b"\nnever\n")
            assert await reader.read() == b"x" * 63 + b"\n"
        await wait_for_handlers()

    on_loop(main)


@pytest.mark.parametrize(("sent", "option"), [(b"", "timeout_idle"), (b"begun", "timeout_message")])
def test_handle_echo_timeout_closes_the_connection(on_loop: OnLoop, sent: bytes, option: str) -> None:
    handler = partial(echo_async.handle_echo, **{option: 0.1})  # type: ignore[arg-type]

    async def main() -> None:
        async with start_server(handler) as address, open_client(address) as (reader, writer):
            writer.write(sent)
            assert await reader.read() == b""
        await wait_for_handlers()

    on_loop(main)


def test_handle_echo_write_timeout_closes_the_connection(on_loop: OnLoop) -> None:
    handler = partial(echo_async.handle_echo, mode="raw", chunk_size=65536, timeout_write=0.1)

    async def main() -> None:
        async with start_server(handler) as address:
            reader, writer = await asyncio.open_connection(*address, limit=1)
            with suppress(ConnectionError, RuntimeError):  # uvloop raises RuntimeError
                while True:
                    writer.write(bytes(65536))
                    await writer.drain()
            writer.transport.abort()
            await wait_for_handlers()
            del reader  # until here: the garbage collector would close the connection

    on_loop(main)


def test_handle_echo_reset_is_not_reported_to_the_loop(on_loop: OnLoop) -> None:
    async def main() -> None:
        async with start_server(partial(echo_async.handle_echo, mode="stream")) as address:
            for sent in (b"", b"begun", b"one\n" * 10_000):
                _, writer = await asyncio.open_connection(*address)
                writer.write(sent)
                writer.transport.abort()
                await asyncio.sleep(0)
            await wait_for_handlers()

    on_loop(main)


def test_handle_echo_invalid_option_raises_and_closes(on_loop: OnLoop) -> None:
    async def main() -> None:
        raised: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                echo_async.handle_echo(reader, writer, mode="loud")  # type: ignore[arg-type]
            except echo_async.ConfigError as error:
                raised.set_result(error)

        async with start_server(handle) as address, open_client(address) as (reader, _):
            with suppress(ConnectionResetError):
                assert await reader.read() == b""  # the connection is closed
            assert str(await raised).startswith("invalid mode: 'loud' ")

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
                assert receive_until_reset(client) in (b"", sent)

    on_loop(main, then)


def receive_until_reset(client: socket.socket) -> bytes:
    """Read until the end of the stream or a reset."""
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

        async with start_server(handle) as address:
            loop = asyncio.get_running_loop()
            with socket.create_connection(address) as client:
                client.setblocking(False)
                await loop.sock_sendall(client, b"x" * (size - 1) + b"\n")
                task = await started
                assert await loop.sock_recv(client, 1) == b"x"  # the server is sending the reply
                task.cancel()
                async with asyncio.timeout(TIMEOUT):
                    with pytest.raises(asyncio.CancelledError):
                        await task

    on_loop(main)


def test_handle_echo_canceled_while_reading_closes(on_loop: OnLoop) -> None:
    async def main() -> None:
        started: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

        def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            started.set_result(echo_async.handle_echo(reader, writer))

        async with start_server(handle) as address:
            reader, writer = await asyncio.open_connection(*address)
            task = await started
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        await wait_for_handlers()

    on_loop(main)
