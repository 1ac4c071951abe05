"""``disconnect`` of a server on each engine and event loop, and calls in the accept thread."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from pathlib import Path

import pytest
from support import LOOPS, TIMEOUT, Backend, connect, in_its_loop, reset, serve_in_loop, wait_in_loop, wait_until

import echo_async
from echo_async import sync
from echo_async.compat import is_ready
from echo_async.loops import LoopName
from echo_async.server.thread_acceptor import ThreadAcceptor

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("is_tls", [False, True])
@in_its_loop
async def test_disconnect_ends_connections_and_keeps_listening(
    is_tls: bool, backend: Backend, certificate: Path, client_context: ssl.SSLContext
) -> None:
    """Also those that wait to be accepted, and those whose handshake has not begun."""
    ssl_certfile = str(certificate) if is_tls else None
    async with serve_in_loop(backend, ssl_certfile=ssl_certfile) as server:
        for is_reset in (False, True):
            clients = [socket.create_connection(server.address, TIMEOUT) for _ in range(5)]
            await server.disconnect(reset=is_reset)
            await server.wait_for(active=0)
            ends = [await asyncio.to_thread(receive_end, client) for client in clients]
            assert set(ends) == {"reset" if is_reset and not is_tls else "closed"}
            context = client_context if is_tls else None
            async with echo_async.connect("localhost", server.address[1], ssl=context) as client:
                assert await client.echo("one") == "one"
                await server.disconnect(reset=is_reset)
        assert server.is_serving()
        server.close()
        await server.wait_closed()


@in_its_loop
async def test_disconnect_ends_a_delayed_reply(backend: Backend) -> None:
    """It is not sent: a thread that waits must not go on before its connection is closed."""
    async with serve_in_loop(backend, fault="delay=3600") as server:
        for number, is_reset in enumerate((False, True), 1):
            clients = [connect(server) for _ in range(20)]
            for client in clients:
                client.sendall(b"one\n")
            await server.wait_for(faults={"delay": len(clients) * number})
            await server.disconnect(reset=is_reset)
            await server.wait_for(active=0)
            ends = [await asyncio.to_thread(receive_end, client) for client in clients]
            assert set(ends) == {"reset" if is_reset else "closed"}
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("loop", LOOPS)
@in_its_loop
async def test_disconnect_of_a_lost_connection_raises_nothing(loop: LoopName) -> None:
    """It is open until all its messages are logged, which takes hundreds of turns here."""
    access_log = logging.getLogger("echo_async.access")
    access_log.setLevel(logging.INFO)
    access_log.propagate = False
    async with echo_async.serve(port=0, mode="stream", chunk_size=2**17) as server:
        client = connect(server)
        client.sendall(b"x\n" * 30_000)
        await wait_in_loop(lambda: server.stats.messages > 0)
        reset(client)
        await server.disconnect(reset=True)


def receive_end(client: socket.socket) -> str:
    with client:
        try:
            assert client.recv(1) == b""
        except ConnectionResetError:
            return "reset"
        return "closed"


def test_call_before_its_wake_up_keeps_no_thread_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accept thread wakes up for a client, and makes the call. What wakes it for the call must not stay."""
    wake = ThreadAcceptor._wake

    def wake_late(acceptor: ThreadAcceptor) -> None:
        with socket.create_connection(server.address, TIMEOUT):
            wait_until(lambda: not acceptor._calls)
        wake(acceptor)

    with sync.serve(port=0) as server:
        monkeypatch.setattr(ThreadAcceptor, "_wake", wake_late)
        server.disconnect()
        monkeypatch.undo()
        wait_until(lambda: not is_ready([server._acceptor._wakened]))


def test_call_that_raises_passes_its_error_on() -> None:
    def fail() -> None:
        raise TimeoutError("an error of the call")

    with sync.serve(port=0) as server, pytest.raises(TimeoutError, match="an error of the call"):
        server._acceptor.call(fail)
