"""The library and the fixtures on a platform with the limits of Windows; run by ``test_platform.py``."""

from __future__ import annotations

import asyncio
import selectors
import socket
import ssl
from pathlib import Path

import pytest
import trustme

import echo_async
from echo_async import sync
from echo_async.config import EngineName
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer

ENGINES: tuple[EngineName, ...] = ("streams", "protocol", "threads")
LARGE = b"x" * 200_000 + b"\n"

pytestmark = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "certificate.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    return str(path)


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())


def test_platform_is_limited(engine: EngineName) -> None:
    assert not hasattr(selectors, "PollSelector")
    assert not hasattr(socket, "AF_UNIX")
    with pytest.raises(ImportError):
        import resource  # noqa: F401


def test_messages_are_echoed(engine: EngineName) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode="stream", engine=engine) as server:
            async with echo_async.connect(*server.address) as client:
                assert await client.echo("hola ñ") == "hola ñ"
                assert await client.echo(LARGE) == LARGE
                assert [reply async for reply in client.stream(["one", "two"])] == ["one", "two"]
            with await asyncio.to_thread(sync.connect, *server.address) as blocking:
                assert await asyncio.to_thread(blocking.echo, LARGE) == LARGE
        assert (server.stats.messages, server.stats.active) == (5, 0)

    asyncio.run(main(), debug=True)


def test_datagrams_are_echoed(engine: EngineName) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, udp=True, engine=engine, fault="delay=0.01") as server:
            with socket.socket(type=socket.SOCK_DGRAM) as client:
                client.settimeout(10)
                client.connect(server.address)
                for data in (b"hola", b"", bytes(65_507)):
                    client.send(data)
                    assert await asyncio.to_thread(client.recv, 65_535) == data
        assert (server.stats.datagrams, server.stats.datagrams_refused) == (3, {})

    asyncio.run(main(), debug=True)


def test_tls_messages_are_echoed(engine: EngineName, certificate: str, trusting: ssl.SSLContext) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode="stream", engine=engine, ssl_certfile=certificate) as server:
            client = await echo_async.connect(*server.address, ssl=trusting)
            assert await client.echo(LARGE) == LARGE
            client.close()
            await client.wait_closed()

    asyncio.run(main(), debug=True)


@pytest.mark.parametrize(
    "pieces", [[b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\none\n"], [b"PROXY UNKN", b"OWN\r\n", b"one\n"]]
)
def test_proxy_header_is_accepted(engine: EngineName, pieces: list[bytes]) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, engine=engine, proxy_protocol="v1") as server:
            reader, writer = await asyncio.open_connection(*server.address)
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0)
            assert await reader.read() == b"one\n"
            writer.close()
            await writer.wait_closed()

    asyncio.run(main(), debug=True)


def test_proxy_header_and_tls_are_accepted(engine: EngineName, certificate: str, trusting: ssl.SSLContext) -> None:
    def exchange(address: tuple[str, int]) -> bytes:
        with socket.create_connection(address) as plain:
            plain.sendall(b"PROXY UNKNOWN\r\n")
            with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as client:
                client.sendall(b"one\n")
                return client.recv(10)

    async def main() -> None:
        async with echo_async.serve(port=0, engine=engine, proxy_protocol="v1", ssl_certfile=certificate) as server:
            assert await asyncio.to_thread(exchange, server.address) == b"one\n"

    asyncio.run(main(), debug=True)


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
    async def main() -> None:
        async with echo_async.serve(port=0, engine=engine) as server:
            with pytest.raises(echo_async.StartError, match="address already in use"):
                await echo_async.serve(port=server.port or 0, engine=engine)

    asyncio.run(main())


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
