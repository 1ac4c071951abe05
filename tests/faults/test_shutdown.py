"""Graceful shutdown and abort, in every state of a connection."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import ssl
import sys
import termios
import threading
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support import (
    LOOPS,
    MAX_DELAY,
    TIMEOUT,
    Backend,
    StartServer,
    connect,
    fill,
    in_its_loop,
    receive_all,
    receive_exactly,
    sends_at_once,
    serve_in_loop,
    set_constant,
    wait_for,
    wait_in_loop,
)

import echo_async
from echo_async import sync
from echo_async.compat import is_readable
from echo_async.config import ServerOptions
from echo_async.engines.context import Slot
from echo_async.engines.protocol import ProtocolConnection
from echo_async.engines.tls_transport import TlsTransport
from echo_async.loops import LoopName
from echo_async.server.registry import DRAIN_INTERVAL, Registry
from echo_async.tls import Certificates
from echo_async.wire.conversation import StreamConversation

pytestmark = pytest.mark.usefixtures("no_leaks")


def undelivered_bytes(client: socket.socket) -> int:
    """Return how many bytes that were sent have not reached the receive buffer of the server."""
    return int.from_bytes(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


@pytest.mark.parametrize(("chunk_size", "no_access_log"), [(20, False), (65536, True)], ids=["logged", "quiet"])
@in_its_loop
async def test_shutdown_answers_received_messages(
    backend: Backend, chunk_size: int, no_access_log: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages that the server has not read yet are answered, and each of them is logged."""
    caplog.set_level(logging.INFO, "echo_async")
    messages = b"sixteen letters!\n" * 2000
    options: ServerOptions = {"chunk_size": chunk_size, "no_access_log": no_access_log}
    loop = asyncio.get_running_loop()
    async with serve_in_loop(backend, **options) as server:
        with await asyncio.to_thread(connect, server) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, b"hello\n")
            assert await loop.sock_recv(client, 6) == b"hello\n"
            sent = client.send(messages)
            while undelivered_bytes(client):
                pass
            server.close()
            client.shutdown(socket.SHUT_WR)
            client.settimeout(TIMEOUT)
            whole = sent - sent % 17
            assert await asyncio.to_thread(receive_all, client) == messages[:whole]
        await server.wait_closed()
        lines = [record for record in caplog.records if record.name == "echo_async.access"]
        assert len(lines) == (0 if no_access_log else 1 + whole // 17)


@in_its_loop
async def test_abort_logs_the_messages_that_were_answered(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So does a shutdown that takes longer than its timeout."""
    monkeypatch.setattr("echo_async.engines.connection.LINES_PER_TURN", 1)
    caplog.set_level(logging.INFO, "echo_async")
    async with serve_in_loop(backend) as server:
        with await asyncio.to_thread(connect, server) as client:
            client.sendall(b"a\n" * 1000)
            client.setblocking(False)
            await wait_in_loop(lambda: is_readable([client]) and len(client.recv(2001, socket.MSG_PEEK)) == 2000)
            server.abort()
            await server.wait_closed()
            assert sum(each.name == "echo_async.access" for each in caplog.records) == 1000


def test_close_with_buffered_replies_delivers_them(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads nothing until it has closed its sending side and the server has answered everything."""
    set_constant(monkeypatch, "DRAIN_THRESHOLD", 2**40)
    messages = b"sixteen letters!\n" * 200_000
    with start_server(no_access_log=True, chunk_size=65536) as server, connect(server) as client:
        sending = threading.Thread(target=client.sendall, args=[messages], daemon=True)
        sending.start()
        if server.config.engine != "streams":  # the other engines continue to read when the client reads
            assert receive_exactly(client, len(messages)) == messages
        sending.join(TIMEOUT)
        client.shutdown(socket.SHUT_WR)
        if server.config.engine == "streams":
            wait_for(server, bytes_in=len(messages))
            assert receive_exactly(client, len(messages)) == messages
        assert client.recv(1) == b""
        wait_for(server, active=0)


@sends_at_once
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@in_its_loop
async def test_shutdown_during_flood_echoes_what_the_kernel_has_buffered(
    loop: LoopName, tls: bool, certificate: Path, client_context: ssl.SSLContext
) -> None:
    """In the engine ``protocol`` the event loop reads; the input that the kernel holds must still be answered."""
    messages = b"sixteen letters!\n" * 500
    registry, ended = Registry(echo_async.ServerConfig(mode="stream", no_access_log=True)), asyncio.Event()
    registry.on_empty = ended.set
    running = asyncio.get_running_loop()
    protocol: asyncio.Protocol = ProtocolConnection(registry, Slot())
    if tls:
        context = Certificates(echo_async.ServerConfig(ssl_certfile=certificate)).context
        protocol = TlsTransport(context, protocol, running.create_future(), print)
    ours, theirs = socket.socketpair()
    connecting = asyncio.create_task(running.connect_accepted_socket(lambda: protocol, theirs))
    reader, writer = await asyncio.open_connection(
        sock=ours, ssl=client_context if tls else None, server_hostname="localhost" if tls else None
    )
    await connecting
    try:
        async with asyncio.timeout(TIMEOUT):
            writer.write(b"one\n")
            assert await reader.readline() == b"one\n"
            writer.write(messages)  # sends immediately
            registry.drain()
            received = await reader.readexactly(len(messages))
            while not reader.at_eof():
                if not writer.is_closing():
                    writer.write(messages)
                received += await reader.read(65536)
                registry.sweep()
        assert received.startswith(messages)
        assert len(received) % 17 == 0
    finally:
        writer.transport.abort()
        registry.abort()
        async with asyncio.timeout(TIMEOUT):
            await ended.wait()


@in_its_loop
async def test_shutdown_with_slow_reader_answers_received_messages(backend: Backend) -> None:
    async with serve_in_loop(backend, chunk_size=65536) as server:
        with await asyncio.to_thread(connect, server) as client:
            client.setblocking(False)
            client.send(b"sixteen letters!\n")  # so that the connection is accepted before the rest is sent
            received = await asyncio.get_running_loop().sock_recv(client, 17)
            sent = 0
            with suppress(BlockingIOError):
                while True:
                    sent += client.send(b"sixteen letters!\n" * 1000)
                    await asyncio.sleep(0)
            arrived = len(received) + sent - undelivered_bytes(client)
            server.close()
            client.shutdown(socket.SHUT_WR)
            client.settimeout(TIMEOUT)
            received += await asyncio.to_thread(receive_all, client)
        await server.wait_closed()
        assert len(received) >= arrived - arrived % 17


@in_its_loop
async def test_shutdown_from_within_a_connection_sends_its_reply(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_constant(monkeypatch, "LINGER_TIMEOUT_AT_STOP", 0.05)
    receive = StreamConversation.receive
    servers: list[echo_async.EchoServer] = []

    def stop(self: StreamConversation, data: bytes) -> bytes:
        servers[0].close()
        return receive(self, data)

    monkeypatch.setattr(StreamConversation, "receive", stop)
    async with serve_in_loop(backend) as server:
        servers.append(server)
        with connect(server) as client:
            client.sendall(b"stop\n")
            await server.wait_closed()
            assert receive_all(client) == b"stop\n"


@in_its_loop
async def test_shutdown_between_two_clients_answers_the_second(backend: Backend) -> None:
    async with serve_in_loop(backend) as server:
        first = connect(server)
        first.sendall(b"one\n")
        await wait_in_loop(lambda: server.stats.messages == 1)
        first.close()
        with connect(server) as second:
            second.sendall(b"first half, ")
            server.close()
            await wait_in_loop(lambda: all(each.fileno() == -1 for each in server.sockets))
            second.sendall(b"second half\n")
            await wait_in_loop(lambda: server.stats.active == 0 or server.stats.messages == 2)
            assert second.recv(100) == b"first half, second half\n"
        await server.wait_closed()


@in_its_loop
async def test_shutdown_canceled_aborts_connections(backend: Backend) -> None:
    async with serve_in_loop(backend, timeout_graceful_shutdown=600) as server:
        with connect(server) as client:
            client.sendall(b"never finished")
            await wait_in_loop(lambda: server.stats.bytes_in > 0)
            server.close()
            waiting = asyncio.create_task(server.wait_closed())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting


@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "in the backlog"])
@in_its_loop
async def test_abort_with_incomplete_message_does_not_wait(backend: Backend, accepted: bool) -> None:
    async with serve_in_loop(backend, timeout_graceful_shutdown=600) as server:
        with connect(server) as client:
            client.sendall(b"never finished")
            await wait_in_loop(lambda: not accepted or server.stats.bytes_in > 0)
            server.abort()
            await server.wait_closed()


@in_its_loop
async def test_abort_while_clients_connect_closes_every_socket(backend: Backend) -> None:
    """One that is lost while it is accepted is closed by the garbage collector, with a ResourceWarning."""

    async def connect_to(address: tuple[str, int]) -> None:
        with suppress(ConnectionError):
            reader, writer = await asyncio.open_connection(*address)
            with closing(writer):
                await reader.read()

    async with serve_in_loop(backend, fault="delay=0") as server:
        clients = [asyncio.create_task(connect_to(server.address)) for _ in range(30)]
        await asyncio.sleep(0)
        server.abort()
        await server.wait_closed()
        await asyncio.gather(*clients)


def test_shutdown_with_slow_readers_ends_after_timeout(start_server: StartServer) -> None:
    """One client reads slowly and another not at all; both are aborted after ``timeout_graceful_shutdown``.

    The slow one does not wait for the reset, which the kernel may drop while the client's receive window is closed.
    """
    with (
        start_server(timeout_graceful_shutdown=0.2, chunk_size=65536, no_access_log=True) as server,
        connect(server) as stalled,
        connect(server) as slow,
    ):
        for client in (stalled, slow):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            fill(client)
        start = monotonic()
        server.close()
        with suppress(ConnectionError):
            slow.settimeout(0.01)
            while server.stats.active:
                with suppress(TimeoutError):
                    slow.recv(100)
        wait_for(server, active=0)
        assert monotonic() - start < MAX_DELAY


def test_stop_of_threads_ends_while_clients_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a client that connects again and again keeps the server from closing its port."""
    accept, accepted, closing_begins = socket.socket.accept, 0, threading.Event()

    def connect_and_accept(listener: socket.socket) -> tuple[socket.socket, Any]:
        nonlocal accepted
        closing_begins.wait(TIMEOUT)
        accepted += 1
        if accepted < 1000:  # the backlog is not empty after this
            connect(server).close()
        return accept(listener)

    with sync.serve(port=0, backlog=1) as server:
        monkeypatch.setattr(socket.socket, "accept", connect_and_accept)
        connect(server).close()
        server.close()
        closing_begins.set()
        server.wait_closed()
    assert accepted < 1000


def test_stop_of_threads_sweeps_by_time_and_not_per_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the end of thousands of connections takes time that grows with their square."""
    sweeps: list[float] = []
    sweep = Registry.sweep

    def counted_sweep(self: Registry, *arguments: Any) -> None:
        sweeps.append(monotonic())
        sweep(self, *arguments)

    with sync.serve(port=0, mode="stream", timeout_graceful_shutdown=0.2) as server, ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(server)).sendall(b"incomplete")
        wait_for(server, bytes_in=2000)
        monkeypatch.setattr(Registry, "sweep", counted_sweep)
        start = monotonic()
        server.close()
        server.wait_closed()
        seconds = monotonic() - start
    assert server.stats.lost == 200
    assert len(sweeps) <= 3 + seconds / DRAIN_INTERVAL
