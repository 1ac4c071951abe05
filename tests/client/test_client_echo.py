"""``connect``, ``echo`` and the clients with servers that reply correctly."""

from __future__ import annotations

import contextlib
import inspect
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from clients import Connect, Echo, wait_disconnected
from support import TIMEOUT, ServerThread

import echo_async
from echo_async import sync
from echo_async.client import client as asyncio_client
from echo_async.config import EngineName, Mode, ServerOptions
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, HostedServerOptions, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")

MESSAGES = ["", "a", "Hola Server!", "ñandú 🎉", "\x00\x1b[2J\r", "x" * 19, "x" * 20, "x" * 21, "x" * 41, "x" * 10_000]


def test_blocking_client_has_the_interface_of_the_asyncio_client() -> None:
    for name in ("connect", "echo"):
        ours, theirs = (inspect.signature(getattr(each, name)) for each in (sync, asyncio_client))
        assert ours.parameters == theirs.parameters
    members = [{name for name in dir(each.EchoClient) if name[0] != "_"} for each in (sync, echo_async)]
    assert members[0] == {"close", "echo", "identify", "name", "ping", "stream"}
    assert members[1] == members[0] | {"wait_closed"}


def test_echo_returns_every_message_on_every_engine(
    connect: Connect, echo: Echo, context: ssl.SSLContext | None, certificate: Path
) -> None:
    ssl_certfile = certificate if context else None
    engines: list[tuple[EngineName, Mode]] = [("streams", "message"), ("protocol", "stream"), ("threads", "message")]
    for engine, mode in engines:
        options: ServerOptions = {"port": 0, "engine": engine, "mode": mode, "ssl_certfile": ssl_certfile}
        with ServerThread("asyncio", options) as server, connect(*server.address, ssl=context) as client:
            for message in MESSAGES:
                assert client.echo(message) == message
                assert client.echo(message.encode()) == message.encode()
            assert list(client.stream(MESSAGES)) == MESSAGES
            assert 0 < client.ping() < TIMEOUT
            assert echo("once", "localhost", server.address[1], ssl=context) == "once"


def test_echo_reply_has_type_and_newline_of_message(connect: Connect, echo_server: HostedServer) -> None:
    sent = []
    messages: list[Any] = ["Hola\n", b"Hola\n", "Hola", b"Hola", b"\xff\x00", "", b"\n"]
    with connect(*echo_server.address) as client:
        for message in messages:
            reply = client.echo(message)
            assert reply == message
            assert type(reply) is type(message)
            data = message.encode() if isinstance(message, str) else message
            sent.append(data if data.endswith(b"\n") else data + b"\n")
        client.ping()
    assert echo_server.received == [*sent, b"ping\n"]
    assert echo_server.stats.accepted == 1


def test_echo_invalid_message_sends_nothing(connect: Connect, echo_server: HostedServer) -> None:
    invalid: Any = 5
    with connect(*echo_server.address) as client:
        with pytest.raises(echo_async.MessageError, match="newline at byte 3"):
            client.echo("one\ntwo")
        with pytest.raises(echo_async.MessageError, match="not valid Unicode"):
            client.echo("\udcff")
        with pytest.raises(TypeError, match="must be str or bytes, not int"):
            client.echo(invalid)
        assert client.echo("after") == "after"
    assert [each.messages for each in echo_server.connections] == [[b"after\n"]]


def test_echo_returns_ten_mebibytes(
    connect: Connect, faulty_server: MakeEchoServer, context: ssl.SSLContext | None, certificate: Path
) -> None:
    message = bytes(range(11, 256)) * 42_800
    options: HostedServerOptions = {"limit_message_size": 2**30, "chunk_size": 65_536, "no_access_log": True}
    options["ssl_certfile"] = certificate if context else None
    server = faulty_server(**options)
    with connect(*server.address, ssl=context) as client:
        assert client.echo(message) == message
        assert list(client.stream([message[:5_000_000]] * 2)) == [message[:5_000_000]] * 2


def test_echo_after_close_raises(connect: Connect, echo_server: HostedServer) -> None:
    with connect(*echo_server.address) as client:
        assert client.name == f"127.0.0.1:{echo_server.address[1]}"
        assert client.echo("one") == "one"
        client.close()
        client.close()
        with pytest.raises(echo_async.EchoError, match="the client is closed; connect again"):
            client.echo("two")


def test_connect_unix_socket_waits_for_room_in_the_backlog(echo: Echo, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack, ThreadPoolExecutor() as threads:
        listener.bind(path)
        listener.listen(0)
        listener.settimeout(TIMEOUT)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        waiting = threads.submit(echo, "Hola", uds=path)
        for _ in range(2):  # the connection that fills the backlog, and the client
            connected = stack.enter_context(listener.accept()[0])
        connected.sendall(connected.recv(100))
        assert waiting.result(TIMEOUT) == "Hola"


def test_client_treats_reset_after_reply_as_close(connect: Connect, faulty_server: MakeEchoServer) -> None:
    def echo_and_reset(peer: Peer) -> None:
        peer.send(peer.receive_line())
        peer.receive_line()  # the reset follows the second message
        peer.reset()

    server = faulty_server(handler=echo_and_reset)
    with connect(*server.address) as client:
        assert [client.echo(message) for message in ("one", "two", "three")] == ["one", "two", "three"]
    assert [each.messages for each in server.connections] == [[b"one\n", b"two\n"], [b"two\n"], [b"three\n"]]


def test_client_reconnects_after_close_between_messages(connect: Connect, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="close=4")
    with connect(*server.address) as client:
        for number in range(6):
            assert client.echo(str(number)) == str(number)
            if number % 2:  # the connection is lost before the next message
                wait_disconnected(client)
    assert server.received == [b"%d\n" % number for number in range(6)]
    assert server.stats.accepted == 3
