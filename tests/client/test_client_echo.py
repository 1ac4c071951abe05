"""``connect``, ``echo`` and ``EchoClient`` with servers that reply correctly."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from scripted import Peer, Start, disconnected, echo_all, echo_one

import echo_async
from echo_async.client.client import EchoClient, connect, echo
from echo_async.pytest_plugin import MakeEchoServer

pytestmark = pytest.mark.usefixtures("no_leaks")

OnLoop = Callable[[Callable[[], Any]], Any]

MESSAGES = ["", "a", "Hola Server!", "ñandú 🎉", "\x00\x1b[2J\r", "x" * 19, "x" * 20, "x" * 21, "x" * 41, "x" * 10_000]


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_echo_returns_every_message(on_loop: OnLoop, mode: Any) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode=mode) as server, connect(*server.address) as client:
            for message in MESSAGES:
                assert await client.echo(message) == message
                assert await client.echo(message.encode()) == message.encode()

    on_loop(main)


@pytest.mark.parametrize("message", ["Hola\n", b"Hola\n", "Hola", b"Hola", b"\xff\x00", "", b"\n"])
def test_echo_reply_has_type_and_newline_of_message(
    on_loop: OnLoop, scripted_server: Start, message: str | bytes
) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        reply = await echo(cast(str, message), *server.address)
        assert reply == message
        assert type(reply) is type(message)

    on_loop(main)
    sent = message.encode() if isinstance(message, str) else message
    assert server.received == [[sent if sent.endswith(b"\n") else sent + b"\n"]]


def test_echo_newline_inside_message_sends_nothing(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            with pytest.raises(echo_async.MessageError, match="newline at byte 3"):
                await client.echo("one\ntwo")
            assert await client.echo("after") == "after"

    on_loop(main)
    assert server.received == [[b"after\n"]]


def test_echo_invalid_message_raises(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            with pytest.raises(echo_async.MessageError, match="not valid Unicode"):
                await client.echo("\udcff")
            with pytest.raises(TypeError, match="must be str or bytes, not int"):
                await client.echo(cast(str, 5))

    on_loop(main)


@pytest.mark.parametrize("fault", [None, "slice=1"])
def test_client_reuses_connection_that_stays_open(
    on_loop: OnLoop, faulty_server: MakeEchoServer, fault: str | None
) -> None:
    server = faulty_server(fault=fault)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert [await client.echo(message) for message in ("one", "two", "three")] == ["one", "two", "three"]

    on_loop(main)
    assert server.received == [b"one\n", b"two\n", b"three\n"]
    assert server.stats.accepted == 1


def test_client_reconnects_for_every_message(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_one)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert [await client.echo(str(number)) for number in range(20)] == [str(number) for number in range(20)]

    on_loop(main)
    assert [messages for messages in server.received if messages] == [[b"%d\n" % number] for number in range(20)]


def test_client_treats_reset_after_reply_as_close(on_loop: OnLoop, scripted_server: Start) -> None:
    def echo_and_reset(peer: Peer) -> None:
        peer.send(peer.message())
        peer.message()  # the reset follows the second message
        peer.reset()

    server = scripted_server(echo_and_reset)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert [await client.echo(message) for message in ("one", "two", "three")] == ["one", "two", "three"]

    on_loop(main)
    assert server.received == [[b"one\n", b"two\n"], [b"two\n"], [b"three\n"]]


def test_client_reconnects_after_close_between_messages(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="close=4")

    async def main() -> None:
        async with connect(*server.address) as client:
            for number in range(6):
                assert await client.echo(str(number)) == str(number)
                if number % 2:  # the connection is lost before the next message
                    await disconnected(client)

    on_loop(main)
    assert server.received == [b"%d\n" % number for number in range(6)]
    assert server.stats.accepted == 3


@pytest.mark.parametrize(("mode", "number"), [("message", 20), ("stream", 200)])
def test_echo_concurrent_on_one_client(on_loop: OnLoop, mode: Any, number: int) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode=mode) as server, connect(*server.address) as client:
            messages = list(map(str, range(number)))
            assert await asyncio.gather(*map(client.echo, messages)) == messages

    on_loop(main)


def test_echo_concurrent_clients(on_loop: OnLoop) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0) as server:
            messages = [str(number) for number in range(50)]
            assert await asyncio.gather(*(echo(message, *server.address) for message in messages)) == messages

    on_loop(main)


def test_echo_returns_ten_mebibytes(on_loop: OnLoop) -> None:
    async def main() -> None:
        options: Any = {"mode": "stream", "engine": "protocol", "limit_message_size": 2**30}
        async with echo_async.serve(port=0, **options) as server, connect(*server.address) as client:
            message = bytes(range(11, 256)) * 42_800
            assert await client.echo(message) == message
            assert await asyncio.gather(*[client.echo(message)] * 3) == [message] * 3

    on_loop(main)


def test_echo_canceled_does_not_affect_others(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            for first in range(0, 9, 3):  # in the first round, the behavior of the server is unknown
                tasks = [asyncio.create_task(client.echo(str(first + number))) for number in range(3)]
                await asyncio.sleep(0)
                tasks[0].cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert isinstance(results[0], asyncio.CancelledError)
                assert results[1:] == [str(first + 1), str(first + 2)]

    on_loop(main)


def test_ping_returns_round_trip_time(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert 0 < await client.ping() < 5

    on_loop(main)
    assert server.received == [[b"ping\n"]]


def test_echo_after_close_raises(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        client = await connect(*server.address)
        assert await client.echo("one") == "one"
        client.close()
        client.close()
        await client.wait_closed()
        await client.wait_closed()
        with pytest.raises(echo_async.EchoError, match="the client is closed; connect again"):
            await client.echo("two")

    on_loop(main)


def test_close_with_message_in_flight_raises_reply_lost(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="drop")

    async def main() -> None:
        client = await connect(*server.address)
        waiting = asyncio.create_task(client.echo("one"))
        await asyncio.sleep(0)
        client.close()
        with pytest.raises(echo_async.ReplyLost, match="lost before the reply: closed by this client"):
            await waiting
        await client.wait_closed()

    on_loop(main)


def test_close_while_reconnecting_raises(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_one)

    async def main() -> None:
        client = await connect(*server.address)
        for message in ("one", "two"):
            await client.echo(message)
        waiting = asyncio.create_task(client.echo("three"))
        await asyncio.sleep(0)
        client.close()
        with pytest.raises(echo_async.EchoError, match="is closed"):
            await waiting
        await client.wait_closed()

    on_loop(main)


def test_connect_unix_socket(on_loop: OnLoop, tmp_path: Path) -> None:
    path = tmp_path / "socket"

    async def main() -> None:
        async with echo_async.serve(uds=str(path)):
            assert await echo("Hola", uds=path) == "Hola"

    on_loop(main)


def test_connect_unix_socket_waits_for_full_backlog(on_loop: OnLoop, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
            listener.bind(path)
            listener.listen(0)
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
            waiting = asyncio.create_task(echo("Hola", uds=path))
            for _ in range(2):  # the connection that fills the backlog, and the client
                connected = stack.enter_context(await asyncio.to_thread(lambda: listener.accept()[0]))
            connected.sendall(await asyncio.to_thread(connected.recv, 100))
            assert await waiting == "Hola"

    on_loop(main)


def test_client_name_is_server_address(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert isinstance(client, EchoClient)
            assert client.name == f"127.0.0.1:{server.address[1]}"

    on_loop(main)
