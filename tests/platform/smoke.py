"""The library and the fixtures on a platform with the limits of Windows; run by ``test_platform.py``."""

from __future__ import annotations

import asyncio
import selectors
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from support import TIMEOUT, ServerThread, connect

import echo_async
from echo_async import sync
from echo_async.config import EngineName
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer

ENGINES: tuple[EngineName, ...] = ("streams", "protocol", "threads")
LARGE = b"x" * 200_000 + b"\n"

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def serve(engine: EngineName, **options: Any) -> ServerThread:
    given: Any = {"engine": engine, "port": 0, "mode": "stream", **options}
    return ServerThread("asyncio", given)


Tls = tuple[dict[str, str], ssl.SSLContext | None]


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Tls:
    """The options of a server, and the context of its clients."""
    if not request.param:
        return {}, None
    path, authority = tmp_path / "certificate.pem", trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    return {"ssl_certfile": str(path)}, ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())


def test_platform_is_limited(engine: EngineName) -> None:
    assert not hasattr(selectors, "PollSelector")
    assert not hasattr(socket, "AF_UNIX")
    with pytest.raises(ImportError):
        import resource  # noqa: F401


def test_messages_are_echoed(engine: EngineName, tls: Tls) -> None:
    options, context = tls

    async def exchange() -> None:
        async with echo_async.connect(*server.address, ssl=context) as client:
            assert await client.echo("hola ñ") == "hola ñ"
            assert await client.echo(LARGE) == LARGE
            assert [reply async for reply in client.stream(["one", "two"])] == ["one", "two"]

    with serve(engine, **options) as server:
        asyncio.run(exchange(), debug=True)
        assert sync.echo(LARGE, *server.address, ssl=context) == LARGE
    assert (server.stats.messages, server.stats.active) == (5, 0)


def test_datagrams_are_echoed(engine: EngineName) -> None:
    with serve(engine, udp=True, fault="delay=0.01") as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT)
        client.connect(server.address)
        for data in (b"hola", b"", bytes(65_507)):
            client.send(data)
            assert client.recv(65_535) == data
    assert (server.stats.datagrams, server.stats.datagrams_refused) == (3, {})


def test_proxy_header_is_accepted(engine: EngineName, tls: Tls) -> None:
    options, context = tls
    for pieces in ([b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"], [b"PROXY UNKN", b"OWN\r\n"]):
        with serve(engine, proxy_protocol="v1", **options) as server, connect(server) as client:
            for piece in pieces:
                client.sendall(piece)
            if context is not None:
                client = context.wrap_socket(client, server_hostname="127.0.0.1")
            with client:
                client.sendall(b"one\n")
                assert client.recv(10) == b"one\n"


def test_shutdown_answers_what_was_sent(engine: EngineName) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode="stream", engine=engine) as server:
            clients = [socket.create_connection(server.address) for _ in range(3)]  # in the backlog
            for client in clients:
                client.sendall(b"one\n")
            server.close()
            for client in clients:
                with client:
                    assert await asyncio.to_thread(client.recv, 10) == b"one\n"

    asyncio.run(main(), debug=True)


def test_second_server_on_one_port_is_refused(engine: EngineName) -> None:
    with serve(engine) as server, pytest.raises(echo_async.StartError, match="address already in use"):
        sync.serve(port=server.port or 0)


def test_fixtures_echo(engine: EngineName, echo_server: HostedServer, make_echo_server: MakeEchoServer) -> None:
    for server in (echo_server, make_echo_server(mode="message"), make_echo_server(tls=True)):
        assert sync.echo("one", *server.address, ssl=server.client_context) == "one"
        assert server.received == [b"one\n"]


def test_unix_sockets_and_descriptors_are_refused(engine: EngineName) -> None:
    refusal = "this platform has no Unix sockets"
    with pytest.raises(echo_async.ConfigError, match=refusal):
        echo_async.serve(uds="echo.sock", engine=engine)
    with pytest.raises(echo_async.ConfigError, match=refusal):
        echo_async.connect(uds="echo.sock")
    with pytest.raises(echo_async.ConfigError, match="this platform has no POSIX file descriptors"):
        echo_async.serve(fd=3, engine=engine)
