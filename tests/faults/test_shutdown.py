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
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
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
    reset,
    sends_at_once,
    serve_in_loop,
    set_constant,
    wait_for,
    wait_in_loop,
)
from tls_client import TlsClient

import echo_async
from echo_async import sync
from echo_async.compat import is_ready
from echo_async.config import EngineName, ServerOptions
from echo_async.engines.context import Slot
from echo_async.engines.protocol import ProtocolConnection
from echo_async.engines.threads import ThreadConnection
from echo_async.engines.tls_socket import TlsSocket
from echo_async.engines.tls_transport import TlsTransport
from echo_async.loops import LoopName
from echo_async.server.registry import DRAIN_INTERVAL, Registry
from echo_async.tls import Certificates
from echo_async.wire.conversation import StreamConversation

pytestmark = pytest.mark.usefixtures("no_leaks")


def undelivered_bytes(client: socket.socket) -> int:
    """Return how many bytes that were sent have not reached the receive buffer of the server."""
    return int.from_bytes(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


MESSAGES = b"sixteen letters!\n" * 2000


@pytest.mark.parametrize("case", ["logged", "quiet", "slow reader"])
@in_its_loop
async def test_shutdown_answers_received_messages(
    backend: Backend, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages that the server has not read yet are answered, and each of them is logged."""
    caplog.set_level(logging.INFO, "echo_async")
    is_logged = case == "logged"
    options: ServerOptions = {"chunk_size": 20 if is_logged else 65536, "no_access_log": not is_logged}
    loop = asyncio.get_running_loop()
    async with serve_in_loop(backend, **options) as server:
        with await asyncio.to_thread(connect, server) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, MESSAGES[:17])
            assert await loop.sock_recv(client, 17) == MESSAGES[:17]
            if case == "slow reader":
                sent = await asyncio.to_thread(fill, client, MESSAGES)
            else:
                sent = client.send(MESSAGES)
                while undelivered_bytes(client):
                    pass
            arrived = sent - undelivered_bytes(client)
            server.close()
            client.shutdown(socket.SHUT_WR)
            client.settimeout(TIMEOUT)
            received = await asyncio.to_thread(receive_all, client)
        await server.wait_closed()
        assert len(received) % 17 == 0
        assert arrived - 16 <= len(received) <= sent
        assert (MESSAGES * (1 + sent // len(MESSAGES))).startswith(received)
        lines = [record for record in caplog.records if record.name == "echo_async.access"]
        assert len(lines) == (1 + len(received) // 17 if is_logged else 0)


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
            await wait_in_loop(lambda: is_ready([client]) and len(client.recv(2001, socket.MSG_PEEK)) == 2000)
            server.abort()
            await server.wait_closed()
            assert sum(each.name == "echo_async.access" for each in caplog.records) == 1000


@pytest.mark.parametrize("engine", ["streams", "protocol"])
@pytest.mark.parametrize("loop", LOOPS)
@in_its_loop
async def test_client_lost_during_log_keeps_turns(
    loop: LoopName, engine: EngineName, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first line of a reply that is not sent yet is logged when the client resets the connection."""
    monkeypatch.setattr("echo_async.engines.connection.LINES_PER_TURN", 1)
    caplog.set_level(logging.INFO, "echo_async.access")
    turn = 0
    turns: list[int] = []

    def note_turn(record: logging.LogRecord) -> bool:
        if not turns:
            reset(client)
        turns.append(turn)
        return True

    def has_ended() -> bool:
        nonlocal turn
        turn += 1
        return server.stats.accepted == 1 and not server.stats.active

    async with serve_in_loop(Backend(engine, loop), host="127.0.0.1", chunk_size=2**20) as server:
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        client.sendall(500 * (99 * b"a" + b"\n"))
        monkeypatch.setattr(logging.getLogger("echo_async.access"), "filters", [note_turn])
        await wait_in_loop(has_ended)
        server.close()
        await server.wait_closed()
    assert len(turns) > 50
    assert max(map(turns.count, turns)) <= 2  # the first two can share a turn


def test_close_with_buffered_replies_delivers_them(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads nothing until it has closed its sending side and the server has answered everything."""
    set_constant(monkeypatch, "DRAIN_THRESHOLD", 2**40)
    messages = MESSAGES * 100
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
        wait_for(server, active=0, messages=200_000)


@sends_at_once
@pytest.mark.parametrize("loop", LOOPS)
@in_its_loop
async def test_shutdown_during_flood_echoes_what_the_kernel_has_buffered(
    loop: LoopName, context: ssl.SSLContext | None, certificate: Path
) -> None:
    """In the engine ``protocol`` the event loop reads; the input that the kernel holds must still be answered."""
    messages = MESSAGES[:8500]
    registry, ended = Registry(echo_async.ServerConfig(mode="stream", no_access_log=True)), asyncio.Event()
    registry.on_empty = ended.set
    running = asyncio.get_running_loop()
    protocol: asyncio.Protocol = ProtocolConnection(registry, Slot())
    if context:
        server_context = Certificates(echo_async.ServerConfig(ssl_certfile=certificate)).context
        protocol = TlsTransport(server_context, protocol, running.create_future(), print)
    ours, theirs = socket.socketpair()
    connecting = asyncio.create_task(running.connect_accepted_socket(lambda: protocol, theirs))
    reader, writer = await asyncio.open_connection(
        sock=ours, ssl=context, server_hostname="localhost" if context else None
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


@pytest.mark.parametrize("case", ["aborted", "aborted with a backlog", "canceled"])
@in_its_loop
async def test_stop_with_incomplete_message_does_not_wait(backend: Backend, case: str) -> None:
    async with serve_in_loop(backend, timeout_graceful_shutdown=600) as server:
        with connect(server) as client:
            client.sendall(b"never finished")
            await wait_in_loop(lambda: case == "aborted with a backlog" or server.stats.bytes_in > 0)
            if case == "canceled":
                server.close()
                waiting = asyncio.create_task(server.wait_closed())
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            else:
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


def test_shutdown_ends_after_timeout(start_server: StartServer) -> None:
    """One client reads slowly, one not at all, one never ends its message: they are aborted after the timeout.

    The slow one does not wait for the reset, which the kernel may drop while the client's receive window is closed.
    """
    with (
        start_server(timeout_graceful_shutdown=0.2, chunk_size=65536, no_access_log=True) as server,
        connect(server) as stalled,
        connect(server) as slow,
        connect(server) as incomplete,
    ):
        incomplete.sendall(b"never finished")
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
        assert server.stats.lost >= 1


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


def test_tls_shutdown_waits_for_no_client(
    start_server: StartServer, client_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, half of a ClientHello, all of it, or everything but the close_notify has been received."""
    set_constant(monkeypatch, "LINGER_TIMEOUT_AT_STOP", 0.05)
    hello, client = TlsClient(client_context).hello(), TlsClient(client_context)
    with start_server(tls=True, timeout_graceful_shutdown=600) as server, ExitStack() as stack:
        *in_handshake, established = (stack.enter_context(connect(server)) for _ in range(4))
        client.handshake(established)
        established.sendall(client.record(b"a message\n"))
        wait_for(server, messages=1)
        in_handshake[1].sendall(hello[:50])
        in_handshake[2].sendall(hello)
        assert in_handshake[2].recv(1)  # the server has accepted all, and replied to the ClientHello
        start = monotonic()
        server.close()
        for each in in_handshake:
            with suppress(ConnectionError):
                receive_all(each)
        wait_for(server, active=0)
        assert monotonic() - start < MAX_DELAY
    assert (server.stats.tls_failures, server.stats.accepted) == (3, 1)


@contextmanager
def socket_pair(
    certificate: Path, client_context: ssl.SSLContext, kind: type[TlsSocket] = TlsSocket
) -> Iterator[tuple[TlsSocket, TlsClient, socket.socket]]:
    """Complete a handshake; yield the server's socket, the client, and the plain socket of the client."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        theirs.settimeout(TIMEOUT)
        secured, client = kind(ours, context, print), TlsClient(client_context)
        handshaking = threading.Thread(target=client.handshake, args=[theirs], daemon=True)
        handshaking.start()
        secured.handshake(TIMEOUT)
        handshaking.join(TIMEOUT)
        yield secured, client, theirs


def test_tls_finish_with_full_buffers_does_not_block(certificate: Path, client_context: ssl.SSLContext) -> None:
    """The sweep calls ``linger`` for every connection, so one with full buffers must not block it."""
    with socket_pair(certificate, client_context) as (secured, _, theirs):
        registry = Registry(echo_async.ServerConfig(mode="stream"))
        connection = ThreadConnection(registry, Slot("client"), secured)
        connection.establish()
        with suppress(BlockingIOError):
            while True:
                secured.plain.send(bytes(4096), socket.MSG_DONTWAIT)
        finishing = threading.Thread(target=connection.linger, daemon=True)
        finishing.start()
        finishing.join(MAX_DELAY)
        is_blocked = finishing.is_alive()
        theirs.close()
        finishing.join(TIMEOUT)
        assert not is_blocked


def test_tls_shutdown_and_read_never_overlap(certificate: Path, client_context: ssl.SSLContext) -> None:
    """OpenSSL does not allow two threads on one connection, and both calls release the GIL."""
    shutting_down, overlapped, waiting = threading.Event(), threading.Event(), threading.Event()

    class OverlapDetector(TlsSocket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            if flags == socket.MSG_PEEK and registry.stats.messages == 1:
                waiting.set()
            if shutting_down.is_set() and not flags & socket.MSG_PEEK:
                overlapped.set()
            return super().recv(size, flags)

        def shutdown(self, how: int) -> None:
            shutting_down.set()
            theirs.sendall(client.record(b"too late\n"))  # wakes the thread of the connection
            overlapped.wait(0.2)
            shutting_down.clear()
            super().shutdown(how)

    with socket_pair(certificate, client_context, OverlapDetector) as (secured, client, theirs):
        registry = Registry(echo_async.ServerConfig(mode="stream", no_access_log=True))
        connection = ThreadConnection(registry, Slot("client"), secured)
        connection.establish()
        serving = threading.Thread(target=connection.run, daemon=True)
        serving.start()
        theirs.sendall(client.record(b"in time\n"))
        assert waiting.wait(TIMEOUT)  # the thread waits for input
        connection.drain()
        theirs.shutdown(socket.SHUT_WR)
        serving.join(TIMEOUT)
        assert not serving.is_alive()
        assert not overlapped.is_set()
