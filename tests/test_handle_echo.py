"""``handle_echo`` as the handler of ``asyncio.start_server``."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import pytest
from support import LOOPS, TIMEOUT, on_each_loop, receive_all, run

import echo_async
from echo_async.compat import set_reset_on_close
from echo_async.config import Mode
from echo_async.loops import LoopName

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

pytestmark = pytest.mark.usefixtures("no_leaks")


@asynccontextmanager
async def start_server(handler: Any, **options: Any) -> AsyncIterator[tuple[str, int]]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0, **options)
    async with server:
        yield server.sockets[0].getsockname()
    if handlers := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(handlers)


@asynccontextmanager
async def open_client(address: tuple[str, int], **options: Any) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*address, **options)
    yield reader, writer
    writer.close()
    await writer.wait_closed()


class Transport(NamedTuple):
    """The options that make a server and a client use TLS, or none."""

    server: dict[str, Any]
    client: dict[str, Any]


@pytest.fixture(params=["plain", "tls"])
def transport(
    request: pytest.FixtureRequest, server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> Transport:
    if request.param == "plain":
        return Transport({}, {})
    return Transport({"ssl": server_context}, {"ssl": client_context, "server_hostname": "localhost"})


@on_each_loop
async def test_handle_echo_in_each_mode_answers_by_its_rules() -> None:
    sent = b"one\ntwo\nunfinished"
    replies: dict[Mode, bytes] = {"message": b"one\n", "stream": b"one\ntwo\n", "raw": sent}
    for mode, reply in replies.items():
        handler = partial(echo_async.handle_echo, mode=mode, chunk_size=3)
        async with start_server(handler) as address, open_client(address) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            assert await reader.read() == reply


@on_each_loop
async def test_handle_echo_timeout_closes_the_connection() -> None:
    for sent, option in ((b"", "timeout_idle"), (b"begun", "timeout_message")):
        handler = partial(echo_async.handle_echo, **{option: 0.1})  # type: ignore[arg-type]
        async with start_server(handler) as address, open_client(address) as (reader, writer):
            writer.write(sent)
            assert await reader.read() == b""


@on_each_loop
async def test_handle_echo_reset_is_not_reported_to_the_loop() -> None:
    async with start_server(partial(echo_async.handle_echo, mode="stream")) as address:
        for sent in (b"", b"begun", b"one\n" * 10_000):
            _, writer = await asyncio.open_connection(*address)
            writer.write(sent)
            writer.transport.abort()
            await asyncio.sleep(0)


@on_each_loop
async def test_handle_echo_invalid_option_raises_and_closes() -> None:
    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for options, error in (({"mode": "loud"}, "invalid mode: 'loud' "), ({"fault": "drop"}, "has neither faults")):
            with pytest.raises(echo_async.ConfigError, match=error):
                echo_async.handle_echo(reader, writer, **options)  # type: ignore[arg-type]
        handled.set_result(None)

    handled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with start_server(handle) as address, open_client(address) as (reader, _):
        with suppress(ConnectionResetError):
            assert await reader.read() == b""  # the connection is closed
        await handled


@pytest.mark.parametrize("loop", LOOPS)
def test_handle_echo_end_of_loop_closes_all_connections(loop: LoopName) -> None:
    clients: dict[socket.socket, bytes] = {}
    errors: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        server = await asyncio.start_server(partial(echo_async.handle_echo, mode="stream"), "127.0.0.1", 0)
        for sent in (b"", b"begun", b"whole\n") * 4:
            clients[client := socket.create_connection(server.sockets[0].getsockname())] = sent
            client.setblocking(False)
            await loop.sock_sendall(client, b"hello\n" + sent)
            assert await loop.sock_recv(client, 6) == b"hello\n"
        server.close()

    run(main, loop)
    for client, sent in clients.items():
        client.settimeout(TIMEOUT)
        with client, suppress(ConnectionResetError):
            assert receive_all(client) in (b"", sent)
    gc.collect()
    assert errors == []


@pytest.mark.parametrize("is_sending", [False, True])
@on_each_loop
async def test_handle_echo_canceled_ends(is_sending: bool) -> None:
    size = 12 * 1024 * 1024
    started: asyncio.Future[asyncio.Task[None]] = asyncio.get_running_loop().create_future()

    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        started.set_result(echo_async.handle_echo(reader, writer, limit_message_size=size, chunk_size=65536))

    async with start_server(handle) as address:
        loop = asyncio.get_running_loop()
        with socket.create_connection(address) as client:
            client.setblocking(False)
            if is_sending:
                await loop.sock_sendall(client, b"x" * (size - 1) + b"\n")
                assert await loop.sock_recv(client, 1) == b"x"
            task = await started
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if not is_sending:
                assert await loop.sock_recv(client, 1) == b""


def handle_after_line(**options: Any) -> Callable[..., Awaitable[None]]:
    """A handler that reads a line itself, calls ``handle_echo``, and waits until the connection is closed."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readline() == b"mine\n"
        await echo_async.handle_echo(reader, writer, mode="stream", **options)
        writer.close()
        await writer.wait_closed()

    return handle


@on_each_loop
async def test_handle_echo_after_a_read_echoes_the_rest(transport: Transport, caplog: pytest.LogCaptureFixture) -> None:
    """The StreamReader has buffered some of it, all of it, or so much that the transport is paused."""
    async with start_server(handle_after_line(chunk_size=1000), **transport.server) as address:
        for sent in (b"", b"one\n", b"on", b"x" * 63 + b"\n" + b"two\n" * 100_000):
            async with open_client(address, **transport.client) as (reader, writer):
                writer.write(b"mine\n" + sent)
                writer.write(b"e\nlast\n")
                assert await reader.readexactly(len(sent) + 7) == sent + b"e\nlast\n"
                if not transport.client:  # TLS of asyncio has no half-close
                    writer.write_eof()
                    assert await reader.read() == b""
    assert "eof_received" not in caplog.text


@on_each_loop
async def test_handle_echo_after_eof_echoes_what_is_buffered() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(10):  # everything is in the kernel: the event loop reads it, then its end
            await asyncio.sleep(0)
        await echo_async.handle_echo(reader, writer, mode="stream", chunk_size=3)

    async with start_server(handle) as address:
        for sent in (b"", b"one\ntwo\nunfinished"):
            with socket.create_connection(address) as client:
                client.sendall(sent)
                client.shutdown(socket.SHUT_WR)
                assert await asyncio.to_thread(receive_all, client) == sent[:8]


@on_each_loop
async def test_handle_echo_of_a_closed_connection_ends(transport: Transport) -> None:
    turns = count()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()
        for _ in range(next(turns)):  # until the reader learns that the connection is lost
            await asyncio.sleep(0)
        await echo_async.handle_echo(reader, writer)

    async with start_server(handle, **transport.server) as address:
        for _ in range(4):
            with suppress(ConnectionResetError):
                async with open_client(address, **transport.client) as (reader, _):
                    assert await reader.read() == b""


@on_each_loop
async def test_handle_echo_reset_client_ends_wait_closed() -> None:
    """The writer of the program learns of the lost connection."""
    handle = handle_after_line()
    ended = asyncio.Event()

    async def checked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionResetError):
            await handle(reader, writer)
        ended.set()

    async with start_server(checked) as address:
        with socket.create_connection(address) as client:
            client.sendall(b"mine\none\n")
            assert await asyncio.to_thread(client.recv, 4) == b"one\n"
            set_reset_on_close(client)
    assert ended.is_set()


@on_each_loop
async def test_handle_echo_of_another_reader_echoes_its_data() -> None:
    """The reader is not fed by the transport of the writer, but by something else, such as a filter."""

    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader = asyncio.StreamReader()
        task = echo_async.handle_echo(reader, writer, mode="stream", chunk_size=3)
        await asyncio.sleep(0)
        reader.feed_data(b"one\ntwo\n")
        reader.feed_eof()
        await task

    async with start_server(handle) as address, open_client(address) as (reader, _):
        assert await reader.read() == b"one\ntwo\n"
