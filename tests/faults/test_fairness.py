"""A flood from one client leaves the others their share."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise

import pytest
from support import (
    LOOPS,
    run,
    wait_in_loop,
)

import echo_async
from echo_async.config import EngineName, ServerOptions
from echo_async.engines.streams import CHUNKS_PER_TURN
from echo_async.loops import LoopName

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("engine", ["streams", "protocol"])
def test_flood_from_one_client_is_read_in_limited_shares(engine: EngineName, loop: LoopName) -> None:
    """Between two turns of the loop a client is served no more than a share, however much of its input is there."""
    flood = b"x" * 399_999 + b"\n"
    share = CHUNKS_PER_TURN * 20 if engine == "streams" else 256 * 1024

    async def main() -> None:
        running = asyncio.get_running_loop()
        options: ServerOptions = {"port": 0, "mode": "stream", "engine": engine, "no_access_log": True}
        async with echo_async.serve(**options) as server:
            received = [0]

            def turn() -> None:
                received.append(server.stats.bytes_in)
                if received[-1] < len(flood):
                    running.call_soon(turn)

            assert isinstance(server.address, tuple)
            reader, writer = await asyncio.open_connection(*server.address, limit=len(flood))
            writer.write(flood)
            turn()
            assert await reader.readline() == flood
            writer.close()
            await writer.wait_closed()
            shares = [after - before for before, after in pairwise(received)]
            assert max(shares) <= share
            assert sum(shares) == len(flood)

    run(main, loop)


class CountingHandler(logging.Handler):
    """A log that counts its lines only."""

    lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("engine", ["streams", "protocol"])
@pytest.mark.parametrize("chunk_size", [20, 65536])
def test_flood_of_short_messages_is_logged_in_shares(engine: EngineName, loop: LoopName, chunk_size: int) -> None:
    """A read can hold very many messages: their lines are written a share at a time."""
    flood = b"\n" * 5_000
    log = CountingHandler()
    access = logging.getLogger("echo_async.access")

    async def main() -> None:
        running = asyncio.get_running_loop()
        async with echo_async.serve(port=0, mode="stream", engine=engine, chunk_size=chunk_size) as server:
            written = [0]

            def turn() -> None:
                written.append(log.lines)
                if log.lines < len(flood):
                    running.call_soon(turn)

            assert isinstance(server.address, tuple)
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(flood)
            turn()
            assert await reader.readexactly(len(flood)) == flood
            await wait_in_loop(lambda: log.lines == len(flood))
            writer.close()
            await writer.wait_closed()
            assert max(after - before for before, after in pairwise(written)) <= 1000

    level, propagate = access.level, access.propagate
    access.addHandler(log)
    access.setLevel(logging.INFO)
    access.propagate = False
    try:
        run(main, loop)
    finally:
        access.removeHandler(log)
        access.setLevel(level)
        access.propagate = propagate
