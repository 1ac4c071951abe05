"""Clients that flood the server, or read nothing, are limited, and starve no other."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trustme
from support import (
    LOOPS,
    TIMEOUT,
    StartServer,
    connect,
    fill,
    in_its_loop,
    is_echoed,
    log_lines,
    receive_all,
    set_constant,
    wait_for,
    wait_in_loop,
    wait_until,
)
from tls_client import APPLICATION_DATA, V1_3, WITHOUT_DATA, MakeRecord, RecordWriter, TlsClient, make_context

import echo_async
from echo_async.config import EngineName, Mode
from echo_async.engines.connection import CHUNKS_PER_TURN
from echo_async.engines.context import Slot
from echo_async.engines.protocol import LARGE_READS_PER_TURN
from echo_async.engines.threads import ThreadConnection
from echo_async.loops import LoopName
from echo_async.server.registry import Registry
from echo_async.wire.tls_layer import MAX_DATA_SIZE, RECORDS_PER_TURN

pytestmark = pytest.mark.usefixtures("no_leaks")

serve_quietly = partial(echo_async.serve, port=0, mode="stream", no_access_log=True)
each_engine = pytest.mark.parametrize(("engine", "loop"), [("streams", "asyncio"), ("protocol", "uvloop")])


class Samples(list[int]):
    """What ``read`` returns in each iteration of the running event loop, as long as the block runs."""

    def __init__(self, read: Callable[[], int]) -> None:
        super().__init__([0])
        self._read = read
        self._loop = asyncio.get_running_loop()

    def _sample(self) -> None:
        self.append(self._read())
        self._next = self._loop.call_soon(self._sample)

    def __enter__(self) -> Samples:
        self._sample()
        return self

    def __exit__(self, *exception: object) -> None:
        self._next.cancel()
        self.append(self._read())

    def max_share(self) -> int:
        """Return the largest increase in one iteration."""
        return max(after - before for before, after in pairwise(self))


async def exchange(server: echo_async.EchoServer, flood: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Send ``flood``; return at least as many lines of replies."""
    options: Any = {"ssl": context, "server_hostname": "localhost"} if context else {}
    reader, writer = await asyncio.open_connection(*server.address, **options)
    writer.write(flood)
    replies, missing = bytearray(), flood.count(b"\n")
    while missing > 0 and (data := await reader.read(65536)):
        replies += data
        missing -= data.count(b"\n")
    writer.close()
    await writer.wait_closed()
    return bytes(replies)


SHARES = {"streams": CHUNKS_PER_TURN * 20, "protocol": 256 * 1024}
"""Bytes of complete messages that one client gets in a turn; ``protocol`` reads four times that without a newline."""


@pytest.mark.parametrize(
    ("engine", "loop", "context", "fault", "line"),
    [
        ("streams", "asyncio", False, None, b""),
        ("streams", "uvloop", True, None, b""),
        ("protocol", "asyncio", False, None, b""),
        ("protocol", "uvloop", True, None, b"one message of 20 b\n"),
        ("protocol", "uvloop", False, "close=100000000", b""),
    ],
    indirect=["context"],
)
@in_its_loop
async def test_flood_from_one_client_is_read_in_limited_shares(
    engine: EngineName,
    loop: LoopName,
    context: ssl.SSLContext | None,
    fault: str | None,
    line: bytes,
    certificate: Path,
) -> None:
    """In one event loop iteration the server reads a limited number of bytes from one client."""
    size = 400_000 if engine == "streams" else 4_000_000
    flood = line * (size // 20) or b"x" * (size - 1) + b"\n"
    share = SHARES[engine] if line or engine == "streams" else LARGE_READS_PER_TURN * SHARES[engine]
    if context and engine == "protocol":
        share += MAX_DATA_SIZE  # of a record that was incomplete before
    ssl_certfile = certificate if context else None
    async with serve_quietly(engine=engine, limit_message_size=size, fault=fault, ssl_certfile=ssl_certfile) as server:
        with Samples(lambda: server.stats.bytes_in) as received:
            assert await exchange(server, flood, context) == flood
        assert received.max_share() <= share
        assert received[-1] == len(flood)


@pytest.mark.parametrize(("mode", "is_logged", "loop"), [("stream", True, "asyncio"), ("identify", False, "uvloop")])
@in_its_loop
async def test_flood_is_drained_in_limited_shares_at_a_stop(mode: Mode, is_logged: bool, loop: LoopName) -> None:
    """What the kernel has buffered at a stop is read as before: in shares."""
    async with echo_async.serve(port=0, mode=mode, engine="protocol", no_access_log=not is_logged) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            await wait_in_loop(lambda: server.stats.accepted == 1)
            sent = fill(client)
            with Samples(lambda: server.stats.bytes_in) as received:
                server.close()
                await asyncio.to_thread(receive_all, client)
                await server.wait_closed()
        assert received.max_share() <= LARGE_READS_PER_TURN * 256 * 1024
        assert 256 * 1024 < received[-1] <= sent


@pytest.mark.parametrize("fault", [None, "duplicate"])
@each_engine
@in_its_loop
async def test_flood_in_identify_mode_is_answered_in_shares(
    engine: EngineName, loop: LoopName, fault: str | None
) -> None:
    """In one event loop iteration the server sends a limited number of replies, however many messages it has read."""
    async with serve_quietly(mode="identify", engine=engine, fault=fault) as server:
        with Samples(lambda: server.stats.bytes_out) as sent:
            replies = await exchange(server, b"\n" * 3_000)
        assert sent.max_share() <= 1000 * (replies.index(b"\n") + 1)


@each_engine
@in_its_loop
async def test_flood_of_short_messages_is_logged_in_shares(
    engine: EngineName, loop: LoopName, caplog: pytest.LogCaptureFixture
) -> None:
    """One read can contain thousands of messages. In one iteration the server logs at most 1,000 of them."""
    flood = b"\n" * 5_000
    caplog.set_level(logging.INFO, "echo_async.access")
    async with echo_async.serve(port=0, mode="stream", engine=engine, chunk_size=65536) as server:
        with Samples(lambda: len(caplog.records)) as written:
            assert await exchange(server, flood) == flood
            await wait_in_loop(lambda: len(caplog.records) == len(flood))
        assert written.max_share() <= 1000


@each_engine
@in_its_loop
async def test_sweep_of_many_connections_is_done_in_slices(
    engine: EngineName, loop: LoopName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections time out together. In one event loop iteration the sweep closes some of them."""
    monkeypatch.setattr("echo_async.server.sweeper.SLICE", 5)
    async with echo_async.serve(port=0, mode="stream", engine=engine, timeout_idle=0.3) as server:
        with Samples(lambda: server.stats.timeouts_idle) as timed_out:
            # On a busy machine, some time out before all are connected.
            clients = [await asyncio.open_connection(*server.address) for _ in range(40)]
            await asyncio.gather(*(reader.read() for reader, _ in clients))
        for _, writer in clients:
            writer.close()
        assert timed_out[-1] == len(clients)
        assert timed_out.max_share() <= 2 * 5  # a slice may be late


StartFlood = Callable[..., RecordWriter]


@pytest.fixture
def start_flood(authority: trustme.CA, tmp_path: Path) -> StartFlood:
    """Complete the handshake of a client; return what encrypts the rest."""

    def start(connected: socket.socket, version: ssl.TLSVersion = V1_3) -> RecordWriter:
        client = TlsClient(make_context(authority, version, tmp_path / "keys"))
        client.handshake(connected)
        return RecordWriter(client, tmp_path / "keys")

    return start


def test_records_without_data_end_the_connection(
    start_server: StartServer, start_flood: StartFlood, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    names = []
    with start_server(tls=True) as server, connect(server, client_context) as healthy:
        assert is_echoed(healthy)
        for kind in ("requested key update", "renegotiation"):
            make_record, version = WITHOUT_DATA[kind]
            with connect(server) as flooding, suppress(ConnectionError):
                names.append("{}:{}".format(*flooding.getsockname()))
                writer = start_flood(flooding, version)
                flooding.sendall(b"".join(make_record(writer) for _ in range(100)))
                receive_all(flooding)
            wait_for(server, active=1, ended={"tls_failed": len(names)})
            assert server.stats.tls_failures == len(names)
            assert is_echoed(healthy)
    assert log_lines(caplog, logging.WARNING) == [
        f"{name} TLS error, connection aborted: 17 records in a row without data" for name in names
    ]


def data(writer: RecordWriter) -> bytes:
    return writer.record(APPLICATION_DATA, b"\n")


def key_update_and_data(writer: RecordWriter) -> bytes:
    return writer.key_update(is_requested=True) + data(writer)


@pytest.mark.parametrize(("engine", "loop"), [("streams", "asyncio"), ("protocol", LOOPS[-1])])
@pytest.mark.parametrize(("make_record", "share"), [(data, RECORDS_PER_TURN), (key_update_and_data, 1)])
@in_its_loop
async def test_small_records_are_read_in_limited_shares(
    make_record: MakeRecord, share: int, engine: EngineName, loop: LoopName, start_flood: StartFlood, certificate: Path
) -> None:
    """In one event loop iteration the server processes a limited number of records."""
    async with serve_quietly(engine=engine, ssl_certfile=str(certificate)) as server:
        with connect(server) as flooding:
            writer = await asyncio.to_thread(start_flood, flooding)
            flooding.sendall(b"".join(make_record(writer) for _ in range(200)))
            with Samples(lambda: server.stats.bytes_in) as received:
                await wait_in_loop(lambda: received[-1] >= 200)
        assert received.max_share() <= share


def test_answers_to_key_updates_that_are_not_read_time_out(start_server: StartServer, start_flood: StartFlood) -> None:
    with start_server(tls=True, timeout_write=0.3) as server, socket.socket() as flooding:
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        flooding.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        flooding.settimeout(TIMEOUT)
        flooding.connect(server.address)
        writer = start_flood(flooding)
        with suppress(ConnectionError):
            for _ in range(300):
                updates = b"".join(writer.key_update(is_requested=True) for _ in range(16))
                flooding.sendall(updates + writer.record(APPLICATION_DATA, b"x"))
        wait_for(server, timeouts_write=1, active=0)


def test_handshake_in_single_bytes_times_out(
    start_server: StartServer, client_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = TlsClient(client_context).hello()
    with start_server(tls=True) as server, connect(server, client_context) as healthy:
        assert is_echoed(healthy)
        set_constant(monkeypatch, "HANDSHAKE_TIMEOUT", 0.5)
        with connect(server) as trickling, suppress(ConnectionError):
            for byte in hello[:-1]:
                trickling.sendall(bytes([byte]))
                if select.select([trickling], [], [], 0.01)[0]:
                    break
            receive_all(trickling)
        wait_for(server, timeouts_handshake=1)
        assert is_echoed(healthy)


def test_slow_reader_receives_ten_mebibytes_unchanged(
    start_server: StartServer, context: ssl.SSLContext | None
) -> None:
    pattern = Random(5500).randbytes(10 * 1024 * 1024)
    options: Any = {"mode": "raw", "chunk_size": 65536, "tls": context is not None}
    with start_server(**options) as server, connect(server, context) as client:
        client.setblocking(False)  # one thread sends and receives: OpenSSL does not allow two threads on one connection
        would_block = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
        unsent, received, seen = memoryview(pattern), bytearray(), -1
        while len(received) < len(pattern):
            while seen != (seen := server.stats.bytes_in):  # until backpressure stops the server
                with suppress(*would_block):
                    while unsent:
                        unsent = unsent[client.send(unsent[:65536]) :]
                select.select([], [], [], 0.005)
            select.select([client], [], [], 0.005)  # TLS can hold data when the socket has none
            with suppress(*would_block):
                for _ in range(40):
                    received += client.recv(65536)
        assert received == pattern


def test_large_reply_being_sent_reports_unsent_bytes() -> None:
    """The write timeout needs it: any progress restarts the timeout."""
    ours, theirs = socket.socketpair()
    size = 8 * 1024 * 1024
    config = echo_async.ServerConfig(chunk_size=65536, limit_message_size=size, no_access_log=True)
    connection = ThreadConnection(Registry(config), Slot(), theirs)
    connection.establish()
    thread = threading.Thread(target=connection.run, daemon=True)
    with ours, theirs:
        thread.start()
        ours.sendall(bytes(size - 1) + b"\n")
        left = size
        while left:
            if left == size // 2:
                wait_until(lambda: connection.unsent() < size)
            left -= len(ours.recv(min(65536, left), socket.MSG_WAITALL))
        ours.shutdown(socket.SHUT_WR)
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert connection.unsent() == 0


class WaitingSocket(socket.socket):
    """Counts the reads that wait for input."""

    waits = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        self.waits += not flags & socket.MSG_DONTWAIT
        return super().recv(size, flags)


def test_thread_reads_chunks_that_have_arrived_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with ours, WaitingSocket(fileno=theirs.detach()) as accepted:
        ours.sendall(59 * b"x" + b"\n")
        ours.shutdown(socket.SHUT_WR)
        connection = ThreadConnection(Registry(echo_async.ServerConfig(mode="stream", chunk_size=20)), Slot(), accepted)
        connection.establish()
        connection.run()
        assert ours.recv(100) == 59 * b"x" + b"\n"
        assert accepted.waits == 0
