"""``EchoClient.stream``: order, bounds, errors and cleanup."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import Peer, Start, change_fifth, disconnected, echo_all
from support import TIMEOUT, run, wait_in_loop

import echo_async
from echo_async.client.batching import WINDOW_BYTES
from echo_async.client.client import EchoClient, connect
from echo_async.pytest_plugin import MakeEchoServer

pytestmark = pytest.mark.usefixtures("no_leaks")

OnLoop = Callable[[Callable[[], Any]], Any]


LINE = st.characters(exclude_categories=["Cs"], exclude_characters="\n")


async def one_by_one(messages: list[str]) -> AsyncIterator[str]:
    for message in messages:
        await asyncio.sleep(0)
        yield message


async def collect(replies: Any) -> list[Any]:
    return [reply async for reply in replies]


async def collect_into(collected: list[str], replies: AsyncIterator[str]) -> None:
    async for reply in replies:
        collected.append(reply)


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("window", [1, 1024])
def test_stream_yields_replies_in_order(on_loop: OnLoop, mode: Any, asynchronous: bool, window: int) -> None:
    async def main() -> None:
        messages = [str(number) for number in range(10 if mode == "message" else 100)]
        async with echo_async.serve(port=0, mode=mode) as server, connect(*server.address) as client:
            given = one_by_one(messages) if asynchronous else messages
            assert await collect(client.stream(given, window=window)) == messages
            assert await client.echo("after") == "after"

    on_loop(main)


def test_stream_replies_equal_messages(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            text = ["a", "b\n", "", "\n", "ñ", "x" * 100_000]
            assert await collect(client.stream(text)) == text
            data = [b"a", b"b\n", b"", b"\n", b"\xff", b"x" * 100_000]
            assert await collect(client.stream(data)) == data
            assert await collect(client.stream([])) == []

    on_loop(main)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    messages=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))),
    window=st.integers(1, 9),
)
def test_stream_returns_any_messages_in_any_window(messages: list[str], window: int) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode="stream") as server, connect(*server.address) as client:
            await collect(client.stream(["first", "second"]))
            assert await collect(client.stream(messages, window=window)) == messages

    run(main)


def test_stream_pipelines_up_to_window(on_loop: OnLoop, scripted_server: Start) -> None:
    window_received = threading.Event()

    def serve(peer: Peer) -> None:
        for message in itertools.islice(peer.messages(), 2):
            peer.send(message)
        while True:
            window = list(itertools.islice(peer.messages(), 8))
            window_received.set()
            peer.send(b"".join(window))

    server = scripted_server(serve)
    taken = 0

    def messages() -> Iterator[str]:
        nonlocal taken
        for number in range(2 + 8 * 5):
            taken += 1
            yield str(number)

    async def main() -> None:
        async with connect(*server.address) as client:
            replies = 0
            async for _ in client.stream(messages(), window=8):
                assert taken <= replies + 8 + 1
                replies += 1
            assert replies == 42

    on_loop(main)
    assert window_received.is_set()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stream_is_bounded_while_server_is_slow(on_loop: OnLoop, scripted_server: Start, asynchronous: bool) -> None:
    blocked, resume = threading.Event(), threading.Event()

    def serve(peer: Peer) -> None:
        for number, message in enumerate(peer.messages()):
            if number == 2:
                blocked.set()
                resume.wait(TIMEOUT)
            peer.send(message)

    server = scripted_server(serve)
    taken = 0

    def messages() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(2000):
            taken += 1
            yield b"x" * 999

    async def async_messages() -> AsyncIterator[bytes]:
        for message in messages():
            yield message

    async def main() -> None:
        async with connect(*server.address) as client:
            task = asyncio.create_task(collect(client.stream(async_messages() if asynchronous else messages())))
            await asyncio.to_thread(blocked.wait)
            for _ in range(100):
                await asyncio.sleep(0)
            limit = 3 * WINDOW_BYTES if asynchronous else 2 * WINDOW_BYTES
            assert taken * 1000 < limit
            resume.set()
            assert len(await task) == 2000

    on_loop(main)


def test_stream_is_bounded_while_consumer_is_slow(on_loop: OnLoop) -> None:
    taken = 0

    def messages() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield str(taken)

    async def main() -> None:
        async with (
            echo_async.serve(port=0, mode="stream") as server,
            connect(*server.address) as client,
            aclosing(client.stream(messages(), window=16)) as replies,
        ):
            for number in range(1, 100):
                assert await anext(replies) == str(number)
                await asyncio.sleep(0)
                assert taken <= number + 16

    on_loop(main)


def test_stream_yields_replies_while_source_waits(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        queue: asyncio.Queue[str] = asyncio.Queue()

        async def messages() -> AsyncIterator[str]:
            while (message := await queue.get()) != "end":
                yield message

        async with connect(*server.address) as client, aclosing(client.stream(messages())) as replies:
            for number in range(5):
                queue.put_nowait(str(number))
                assert await anext(replies) == str(number)
            queue.put_nowait("end")
            assert [reply async for reply in replies] == []

    on_loop(main)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stream_closed_early_leaves_no_task(on_loop: OnLoop, scripted_server: Start, asynchronous: bool) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        messages = [str(number) for number in range(1000)]
        async with connect(*server.address) as client:
            for _ in range(3):
                async with aclosing(client.stream(one_by_one(messages) if asynchronous else messages)) as replies:
                    assert [await anext(replies) for _ in range(5)] == messages[:5]
                assert asyncio.all_tasks() == {asyncio.current_task()}
                assert await client.echo("after") == "after"

    on_loop(main)


def test_stream_closed_early_stops_source_that_ignores_cancel(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        asked = asyncio.Event()

        async def messages() -> AsyncIterator[str]:
            yield "first"
            while True:
                asked.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:  # as asyncio.wait_for can in Python 3.11
                    yield "another"

        async with connect(*server.address) as client, asyncio.timeout(TIMEOUT):
            async with aclosing(client.stream(messages())) as replies:
                assert await anext(replies) == "first"
                await asked.wait()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    on_loop(main)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stream_canceled_leaves_no_task(on_loop: OnLoop, faulty_server: MakeEchoServer, asynchronous: bool) -> None:
    server = faulty_server(fault="stall=10")

    async def main() -> None:
        messages = [str(number) for number in range(1000)]
        async with connect(*server.address) as client:
            task = asyncio.create_task(collect(client.stream(one_by_one(messages) if asynchronous else messages)))
            await wait_in_loop(lambda: server.stats.faults == {"stall": 1})
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert asyncio.all_tasks() == {asyncio.current_task()}

    on_loop(main)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_stream_source_error_follows_earlier_replies(
    on_loop: OnLoop, scripted_server: Start, asynchronous: bool
) -> None:
    server = scripted_server(echo_all)

    def messages() -> Iterator[str]:
        yield from ("0", "1", "2", "3")
        raise ZeroDivisionError

    async def async_messages() -> AsyncIterator[str]:
        for message in messages():
            yield message

    async def main() -> None:
        async with connect(*server.address) as client:
            replies: list[str] = []
            with pytest.raises(ZeroDivisionError):
                await collect_into(replies, client.stream(async_messages() if asynchronous else messages()))
            assert replies == ["0", "1", "2", "3"]

    on_loop(main)


def test_stream_canceled_source_raises_canceled_error(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def messages() -> AsyncIterator[str]:
        yield "0"
        raise asyncio.CancelledError

    async def main() -> None:
        async with connect(*server.address) as client:
            with pytest.raises(asyncio.CancelledError):
                await collect(client.stream(messages()))

    on_loop(main)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("a\nb", echo_async.MessageError),
        ("\udcff", echo_async.MessageError),
        (5, TypeError),
        (bytearray(b"x"), TypeError),
        (b"x", None),
    ],
)
def test_stream_invalid_message_follows_earlier_replies(
    on_loop: OnLoop, scripted_server: Start, bad: Any, error: type[Exception] | None, asynchronous: bool
) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert await collect(client.stream(["a", "b"])) == ["a", "b"]
            messages = cast(list[str], ["0", "1", bad, "2"])
            replies = []
            caught: Exception | None = None
            try:
                async for reply in client.stream(one_by_one(messages) if asynchronous else messages):
                    replies.append(reply)
            except (echo_async.MessageError, TypeError) as raised:
                caught = raised
            assert type(caught) is (error or type(None))
            assert replies == (["0", "1"] if error else messages)

    on_loop(main)


def test_stream_invalid_arguments_raise(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address) as client:
            with pytest.raises(TypeError, match="not str; use echo"):
                client.stream("Hola")
            with pytest.raises(echo_async.ConfigError, match="invalid window: 0 "):
                client.stream(["Hola"], window=0)

    on_loop(main)


async def assert_stream_fails_at_5(address: tuple[str, int], error: type[Exception]) -> None:
    async with connect(*address, timeout=0.5) as client:
        replies: list[str] = []
        with pytest.raises(error):
            await collect_into(replies, client.stream(map(str, range(9))))
        assert replies == ["0", "1", "2", "3", "4"]
        assert await client.echo("after") == "after"


@pytest.mark.parametrize(
    ("fault", "error"),
    [("close=11", echo_async.ReplyLost), ("reset=11", echo_async.ReplyLost), ("stall=10", echo_async.ReplyLate)],
)
def test_stream_lost_or_late_reply_follows_earlier_replies(
    on_loop: OnLoop, faulty_server: MakeEchoServer, fault: str, error: type[Exception]
) -> None:
    server = faulty_server(fault_sequence=fault)
    on_loop(lambda: assert_stream_fails_at_5(server.address, error))


def test_stream_yields_earlier_replies_before_the_mismatch(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(change_fifth)
    on_loop(lambda: assert_stream_fails_at_5(server.address, echo_async.ReplyDifferent))


def test_client_server_stopped_raises_connect_error(
    on_loop: OnLoop, faulty_server: MakeEchoServer, reserved_port: int
) -> None:
    server = faulty_server(port=reserved_port, fault="close=11")

    async def main() -> None:
        async with connect(*server.address) as client:
            with pytest.raises(echo_async.ReplyLost):
                await collect(client.stream(map(str, range(9))))
            server.close()
            with pytest.raises(echo_async.ConnectError):
                await collect(client.stream(["a"]))

    on_loop(main)


def test_stream_and_echo_concurrent(on_loop: OnLoop) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode="stream") as server, connect(*server.address) as client:
            messages = [str(number) for number in range(100)]

            async def echo_each(client: EchoClient) -> list[str]:
                return [await client.echo(message) for message in messages]

            tasks = (collect(client.stream(messages)), echo_each(client))
            assert await asyncio.gather(*tasks) == [messages] * 2

    on_loop(main)


def test_stream_reconnects_after_close_between_messages(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="close=4")

    async def main() -> None:
        queue: asyncio.Queue[str] = asyncio.Queue()

        async def messages() -> AsyncIterator[str]:
            while True:
                yield await queue.get()

        async with connect(*server.address) as client, aclosing(client.stream(messages())) as replies:
            for number in range(6):
                if number and number % 2 == 0:
                    await disconnected(client)
                queue.put_nowait(str(number))
                assert await anext(replies) == str(number)

    on_loop(main)
    assert server.received == [b"%d\n" % number for number in range(6)]
    assert server.stats.accepted == 3


def test_unexpected_bytes_fail_next_reply(on_loop: OnLoop, scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        for message in peer.messages():
            peer.send(message)
            if message == b"1\n":
                resume.wait(TIMEOUT)
                peer.send(b"extra")

    server = scripted_server(serve)
    resume = threading.Event()

    async def main() -> None:
        queue: asyncio.Queue[str] = asyncio.Queue()

        async def messages() -> AsyncIterator[str]:
            while True:
                yield await queue.get()

        async with connect(*server.address) as client, aclosing(client.stream(messages())) as replies:
            for message in ("0", "1"):
                queue.put_nowait(message)
                assert await anext(replies) == message
            resume.set()
            await disconnected(client)
            queue.put_nowait("2")
            with pytest.raises(echo_async.ReplyDifferent, match='received 5 unexpected bytes "extra"'):
                await anext(replies)

    on_loop(main)
