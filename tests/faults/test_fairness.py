"""One client that floods the server does not starve the others."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support import fill, in_its_loop, receive_all, wait_in_loop

import echo_async
from echo_async.config import EngineName, Mode, ServerOptions
from echo_async.engines.connection import CHUNKS_PER_TURN
from echo_async.engines.protocol import LARGE_READS_PER_TURN
from echo_async.loops import LoopName
from echo_async.wire.tls_layer import MAX_DATA_SIZE

pytestmark = pytest.mark.usefixtures("no_leaks")


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


SHARES = {"streams": CHUNKS_PER_TURN * 20, "protocol": 256 * 1024}
"""Bytes of complete messages that one client gets in a turn; ``protocol`` reads four times that without a newline."""


@pytest.mark.parametrize(
    ("engine", "loop", "tls", "fault", "line"),
    [
        ("streams", "asyncio", False, None, b""),
        ("streams", "uvloop", True, None, b""),
        ("protocol", "asyncio", False, None, b""),
        ("protocol", "uvloop", True, None, b"one message of 20 b\n"),
        ("protocol", "uvloop", False, "close=100000000", b""),
    ],
)
@in_its_loop
async def test_flood_from_one_client_is_read_in_limited_shares(
    engine: EngineName,
    loop: LoopName,
    tls: bool,
    fault: str | None,
    line: bytes,
    certificate: Path,
    client_context: ssl.SSLContext,
) -> None:
    """In one event loop iteration the server reads a limited number of bytes from one client."""
    size = 400_000 if engine == "streams" else 4_000_000
    flood = line * (size // 20) or b"x" * (size - 1) + b"\n"
    share = SHARES[engine] if line or engine == "streams" else LARGE_READS_PER_TURN * SHARES[engine]
    if tls and engine == "protocol":
        share += MAX_DATA_SIZE  # of a record that was incomplete before
    options: ServerOptions = {
        "port": 0,
        "mode": "stream",
        "engine": engine,
        "no_access_log": True,
        "limit_message_size": size,
        "fault": fault,
        "ssl_certfile": str(certificate) if tls else None,
    }
    async with echo_async.serve(**options) as server:
        secured: Any = {"ssl": client_context, "server_hostname": "localhost"} if tls else {}
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=len(flood), **secured)
        with Samples(lambda: server.stats.bytes_in) as received:
            writer.write(flood)
            assert await reader.readexactly(len(flood)) == flood
        writer.close()
        await writer.wait_closed()
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
    flood = b"\n" * 3_000
    async with echo_async.serve(port=0, mode="identify", engine=engine, fault=fault, no_access_log=True) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with Samples(lambda: server.stats.bytes_out) as sent:
            writer.write(flood)
            replies = [await reader.readline() for _ in flood]
        writer.close()
        await writer.wait_closed()
        assert sent.max_share() <= 1000 * len(replies[0])


@each_engine
@in_its_loop
async def test_sweep_of_many_connections_is_done_in_slices(
    engine: EngineName, loop: LoopName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connections time out together. In one event loop iteration the sweep closes some of them."""
    monkeypatch.setattr("echo_async.server.sweeper.SLICE", 10)
    async with echo_async.serve(port=0, mode="stream", engine=engine, timeout_idle=0.3) as server:
        with Samples(lambda: server.stats.timeouts_idle) as timed_out:
            # On a busy machine, some time out before all are connected.
            clients = [await asyncio.open_connection(*server.address) for _ in range(100)]
            await asyncio.gather(*(reader.read() for reader, _ in clients))
        for _, writer in clients:
            writer.close()
        assert timed_out[-1] == len(clients)
        assert timed_out.max_share() <= 2 * 10  # a slice may be late


@each_engine
@in_its_loop
async def test_flood_of_short_messages_is_logged_in_shares(
    engine: EngineName, loop: LoopName, caplog: pytest.LogCaptureFixture
) -> None:
    """One read can contain thousands of messages. In one iteration the server logs at most 1,000 of them."""
    flood = b"\n" * 5_000
    caplog.set_level(logging.INFO, "echo_async.access")
    async with echo_async.serve(port=0, mode="stream", engine=engine, chunk_size=65536) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with Samples(lambda: len(caplog.records)) as written:
            writer.write(flood)
            assert await reader.readexactly(len(flood)) == flood
            await wait_in_loop(lambda: len(caplog.records) == len(flood))
        writer.close()
        await writer.wait_closed()
        assert written.max_share() <= 1000
