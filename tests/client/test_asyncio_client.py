"""What only the asyncio client has: tasks that use it concurrently, cancellation, asynchronous messages."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from clients import disconnected, one_by_one
from support import LOOPS, MAX_DELAY, TIMEOUT, lines, on_each_loop, run, sends_at_once, wait_in_loop

import echo_async
from echo_async.client.batching import WINDOW_BYTES
from echo_async.client.client import connect
from echo_async.engines.loop_internals import run_turns
from echo_async.loops import LoopName
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")


async def collect(replies: Any) -> list[Any]:
    return [reply async for reply in replies]


async def take_from(queue: asyncio.Queue[str]) -> AsyncIterator[str]:
    """Return the messages of ``queue`` until one is empty."""
    while message := await queue.get():
        yield message


@pytest.mark.parametrize(("mode", "number"), [("message", 10), ("stream", 50)])
@on_each_loop
async def test_echo_and_stream_concurrent_on_one_client(mode: Any, number: int) -> None:
    async with echo_async.serve(port=0, mode=mode) as server, connect(*server.address) as client:
        messages = list(map(str, range(number)))
        *replies, streamed = await asyncio.gather(*map(client.echo, messages), collect(client.stream(messages)))
        assert replies == streamed == messages


@on_each_loop
async def test_echo_canceled_does_not_affect_others(echo_server: HostedServer) -> None:
    async with connect(*echo_server.address) as client:
        for first in range(0, 9, 3):  # in the first round, the behavior of the server is unknown
            tasks = [asyncio.create_task(client.echo(str(first + number))) for number in range(3)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert results[1:] == [str(first + 1), str(first + 2)]


@on_each_loop
async def test_close_with_message_in_flight_raises(faulty_server: MakeEchoServer) -> None:
    """Whether it is sent, or the client connects again to send it."""
    for server, before, error, text in (
        (faulty_server(fault="drop"), (), echo_async.ReplyLost, "lost before the reply: closed by this client"),
        (faulty_server(mode="message"), ("one", "two"), echo_async.EchoError, "is closed"),
    ):
        client = await connect(*server.address)
        for message in before:
            await client.echo(message)
        waiting = asyncio.create_task(client.echo("in flight"))
        await asyncio.sleep(0)
        client.close()
        with pytest.raises(error, match=text):
            await waiting
        await client.wait_closed()


@sends_at_once
@on_each_loop
async def test_replies_received_before_failed_write_are_kept(faulty_server: MakeEchoServer) -> None:
    closed = threading.Event()

    def serve(peer: Peer) -> None:
        for _ in range(3):
            peer.send(peer.receive_line())
        peer.reset()
        closed.set()

    server = faulty_server(handler=serve)
    async with connect(*server.address) as client:
        assert [await client.echo("0"), await client.echo("1")] == ["0", "1"]
        replied = asyncio.create_task(client.echo("2"))
        await asyncio.sleep(0)
        closed.wait(TIMEOUT)  # blocks the loop: the reply and the reset have arrived, neither is read
        lost = asyncio.create_task(client.echo("3"))
        assert await replied == "2"
        with pytest.raises(echo_async.ReplyLost):
            await lost


@on_each_loop
async def test_failed_reply_loses_only_those_behind_it(faulty_server: MakeEchoServer) -> None:
    """Whether it is lost, late or different. The next message opens a new connection."""

    def serve(peer: Peer) -> None:
        for message in lines(peer):
            if message == b"lost\n":
                return
            if message == b"late\n":
                peer.receive(1000)
            peer.send(message.replace(b"bad", b"BAD"))

    server = faulty_server(handler=serve)
    failures: dict[str, tuple[type[Exception], str]] = {
        "lost": (echo_async.ReplyLost, "closed by the server"),
        "late": (echo_async.ReplyLate, "an earlier reply timed out"),
        "bad": (echo_async.ReplyDifferent, "an earlier reply did not match"),
    }

    for message, (error, reason) in failures.items():
        async with connect(*server.address, timeout=2 if message == "late" else TIMEOUT) as client:
            assert [await client.echo("0"), await client.echo("1")] == ["0", "1"]
            sent = ("2", message, "3", "4")
            two, failed, *behind = await asyncio.gather(*map(client.echo, sent), return_exceptions=True)
            assert two == "2"
            assert isinstance(failed, error)
            assert [type(each) for each in behind] == [echo_async.ReplyLost] * 2
            assert all(str(each).endswith(f" lost before the reply: {reason}") for each in behind)
            assert await client.echo("5") == "5"


@on_each_loop
async def test_blocked_event_loop_does_not_cause_timeout(faulty_server: MakeEchoServer) -> None:
    replied, never = threading.Event(), threading.Event()

    def echo_late(peer: Peer) -> None:
        peer.send(peer.receive_line())
        replied.set()
        peer.receive_line()

    server = faulty_server(handler=echo_late)
    async with connect(*server.address, timeout=0.1) as client:
        waiting = asyncio.create_task(client.echo("Hola"))
        await run_turns(2)  # uvloop before 0.23 sends at the end of a turn
        assert replied.wait(MAX_DELAY)
        never.wait(0.2)  # blocks the event loop until the timeout has passed
        assert await waiting == "Hola"


@pytest.mark.parametrize("loop", LOOPS)
def test_connect_resolver_blocked_times_out(loop: LoopName, monkeypatch: pytest.MonkeyPatch) -> None:
    resume, resolve = threading.Event(), socket.getaddrinfo

    def block(*args: Any, **options: Any) -> Any:
        if options.get("flags"):
            return resolve(*args, **options)
        resume.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "too late")

    monkeypatch.setattr(socket, "getaddrinfo", block)

    async def main() -> None:
        with pytest.raises(echo_async.ConnectTimeout):
            await connect("slow.example", connect_timeout=0.05)

    started = time.monotonic()
    run(main, loop)
    assert time.monotonic() - started < MAX_DELAY  # the resolver is not waited for
    resume.set()


@on_each_loop
async def test_connect_can_be_canceled(black_hole_address: tuple[str, int]) -> None:
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.05):
            await connect(*black_hole_address)
    assert not isinstance(caught.value, echo_async.EchoError)


@pytest.mark.parametrize("asynchronous", [False, True])
@on_each_loop
async def test_stream_is_bounded_while_server_is_slow(faulty_server: MakeEchoServer, asynchronous: bool) -> None:
    blocked, resume = threading.Event(), threading.Event()

    def serve(peer: Peer) -> None:
        for number, message in enumerate(lines(peer)):
            if number == 2:
                blocked.set()
                resume.wait(TIMEOUT)
            peer.send(message)

    server = faulty_server(handler=serve)
    taken = 0

    def messages() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(2000):
            taken += 1
            yield b"x" * 999

    async with connect(*server.address) as client:
        task = asyncio.create_task(collect(client.stream(one_by_one(messages()) if asynchronous else messages())))
        await asyncio.to_thread(blocked.wait)
        for _ in range(100):
            await asyncio.sleep(0)
        limit = 3 * WINDOW_BYTES if asynchronous else 2 * WINDOW_BYTES
        assert taken * 1000 < limit
        resume.set()
        assert len(await task) == 2000


@on_each_loop
async def test_stream_yields_replies_while_source_waits(echo_server: HostedServer) -> None:
    queue: asyncio.Queue[str] = asyncio.Queue()
    async with connect(*echo_server.address) as client, aclosing(client.stream(take_from(queue))) as replies:
        for number in range(5):
            queue.put_nowait(str(number))
            assert await anext(replies) == str(number)
        queue.put_nowait("")
        assert [reply async for reply in replies] == []


@on_each_loop
async def test_stream_closed_early_stops_source_that_ignores_cancel(echo_server: HostedServer) -> None:
    asked = asyncio.Event()

    async def messages() -> AsyncIterator[str]:
        yield "first"
        while True:
            asked.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:  # as asyncio.wait_for can in Python 3.11
                yield "another"

    async with connect(*echo_server.address) as client, asyncio.timeout(TIMEOUT):
        async with aclosing(client.stream(messages())) as replies:
            assert await anext(replies) == "first"
            await asked.wait()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("asynchronous", [False, True])
@on_each_loop
async def test_stream_canceled_leaves_no_task(faulty_server: MakeEchoServer, asynchronous: bool) -> None:
    server = faulty_server(fault="stall=10")
    messages = [str(number) for number in range(1000)]
    async with connect(*server.address) as client:
        task = asyncio.create_task(collect(client.stream(one_by_one(messages) if asynchronous else messages)))
        await wait_in_loop(lambda: server.stats.faults == {"stall": 1})
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}


@on_each_loop
async def test_stream_canceled_source_raises_canceled_error(echo_server: HostedServer) -> None:
    async def messages() -> AsyncIterator[str]:
        yield "0"
        raise asyncio.CancelledError

    async with connect(*echo_server.address) as client:
        with pytest.raises(asyncio.CancelledError):
            await collect(client.stream(messages()))


@on_each_loop
async def test_unexpected_bytes_fail_next_reply_of_stream(faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        for message in lines(peer):
            peer.send(message)
            if message == b"1\n":
                resume.wait(TIMEOUT)
                peer.send(b"extra")

    server, resume = faulty_server(handler=serve), threading.Event()
    queue: asyncio.Queue[str] = asyncio.Queue()
    async with connect(*server.address) as client, aclosing(client.stream(take_from(queue))) as replies:
        for message in ("0", "1"):
            queue.put_nowait(message)
            assert await anext(replies) == message
        resume.set()
        await disconnected(client)
        queue.put_nowait("2")
        with pytest.raises(echo_async.ReplyDifferent, match='received 5 unexpected bytes "extra"'):
            await anext(replies)
