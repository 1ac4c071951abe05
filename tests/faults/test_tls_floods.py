"""TLS clients that cost the server more than themselves are ended and counted, and delay no other client."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import trustme
from support import (
    LOOPS,
    TIMEOUT,
    StartServer,
    connect,
    in_its_loop,
    is_echoed,
    log_lines,
    receive_all,
    set_constant,
    wait_for,
)
from tls_client import APPLICATION_DATA, V1_3, WITHOUT_DATA, MakeRecord, RecordWriter, TlsClient, make_context

import echo_async
from echo_async.config import EngineName
from echo_async.loops import LoopName
from echo_async.wire.tls_layer import RECORDS_PER_TURN

pytestmark = pytest.mark.usefixtures("no_leaks")

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
    start_server: StartServer,
    start_flood: StartFlood,
    client_context: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = []
    with (
        start_server(tls=True, mode="stream") as server,
        connect(server) as plain,
        client_context.wrap_socket(plain, server_hostname="localhost") as healthy,
    ):
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
    make_record: MakeRecord,
    share: int,
    engine: EngineName,
    loop: LoopName,
    start_flood: StartFlood,
    certificate: Path,
) -> None:
    """In one event loop iteration the server processes a limited number of records."""
    running = asyncio.get_running_loop()
    async with echo_async.serve(
        port=0, mode="stream", engine=engine, ssl_certfile=str(certificate), no_access_log=True
    ) as server:
        received, is_complete = [0], asyncio.Event()

        def sample() -> None:
            received.append(server.stats.bytes_in)
            if received[-1] < 200:
                running.call_soon(sample)
            else:
                is_complete.set()

        with connect(server) as flooding:
            writer = await asyncio.to_thread(start_flood, flooding)
            flooding.sendall(b"".join(make_record(writer) for _ in range(200)))
            sample()
            async with asyncio.timeout(TIMEOUT):
                await is_complete.wait()
        assert max(after - before for before, after in pairwise(received)) <= share


def test_answers_to_key_updates_that_are_not_read_time_out(start_server: StartServer, start_flood: StartFlood) -> None:
    with start_server(tls=True, mode="stream", timeout_write=0.3) as server, socket.socket() as flooding:
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


# Handshakes


def test_handshake_in_single_bytes_times_out(
    start_server: StartServer, client_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = TlsClient(client_context).hello()
    with (
        start_server(tls=True, mode="stream") as server,
        connect(server) as plain,
        client_context.wrap_socket(plain, server_hostname="localhost") as healthy,
    ):
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
