"""Failures to connect, and replies that are lost, late or different."""

from __future__ import annotations

import asyncio
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import Peer, Start, disconnected, echo_all, echo_one, reply_with, resolve_to
from support import MAX_DELAY, TIMEOUT, sends_at_once

import echo_async
from echo_async.client.client import connect, echo
from echo_async.engines.loop_internals import run_turns
from echo_async.pytest_plugin import MakeEchoServer

pytestmark = pytest.mark.usefixtures("no_leaks")

OnLoop = Callable[[Callable[[], Any]], Any]


# Connecting


def test_connect_refused_raises(on_loop: OnLoop, closed_port: int) -> None:
    async def main() -> None:
        started = time.monotonic()
        with pytest.raises(echo_async.ConnectError) as caught:
            await echo("Hola", port=closed_port)
        assert time.monotonic() - started < MAX_DELAY
        assert str(caught.value) == (
            f"cannot connect to 127.0.0.1:{closed_port}: connection refused; is the server running?"
        )

    on_loop(main)


def test_connect_missing_unix_socket_raises(on_loop: OnLoop, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(echo_async.ConnectError, match="no such file or directory; is the server running"):
            await connect(uds=tmp_path / "nobody")
        with pytest.raises(echo_async.ConnectError, match="path too long"):
            await connect(uds=tmp_path / ("x" * 200))

    on_loop(main)


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "a..b", "x" * 300])
def test_connect_unknown_host_raises(on_loop: OnLoop, host: str) -> None:
    async def main() -> None:
        with pytest.raises(echo_async.ConnectError, match="check the host name"):
            await connect(host)

    on_loop(main)


def test_connect_resolver_blocked_times_out(on_loop: OnLoop, monkeypatch: pytest.MonkeyPatch) -> None:
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
    on_loop(main)
    assert time.monotonic() - started < MAX_DELAY  # the resolver is not waited for
    resume.set()


def test_connect_unreachable_address_times_out(on_loop: OnLoop, black_hole_address: tuple[str, int]) -> None:
    async def main() -> None:
        with pytest.raises(
            echo_async.ConnectTimeout, match=r"cannot connect to .*: timed out after 0\.1 s; check the address"
        ):
            await connect(*black_hole_address, connect_timeout=0.1)

    on_loop(main)


def test_connect_unix_socket_full_backlog_times_out(
    on_loop: OnLoop, faulty_server: MakeEchoServer, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    faulty_server(uds=path, fault="no-accept")

    async def main() -> None:
        with pytest.raises(echo_async.ConnectTimeout):
            await connect(uds=path, connect_timeout=0.1)

    on_loop(main)


def test_connect_can_be_canceled(on_loop: OnLoop, black_hole_address: tuple[str, int]) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.05):
                await connect(*black_hole_address)
        assert not isinstance(caught.value, echo_async.EchoError)

    on_loop(main)


def test_connect_tries_every_address(
    on_loop: OnLoop,
    scripted_server: Start,
    monkeypatch: pytest.MonkeyPatch,
    black_hole_address: tuple[str, int],
    closed_port: int,
) -> None:
    server = scripted_server(echo_all)
    resolve_to(monkeypatch, ("127.0.0.1", closed_port), black_hole_address, server.address)

    async def main() -> None:
        assert await echo("Hola", "several.example") == "Hola"

    on_loop(main)


def test_connect_all_addresses_refused_raises(
    on_loop: OnLoop, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    resolve_to(monkeypatch, ("127.0.0.1", closed_port), ("127.0.0.2", closed_port))

    async def main() -> None:
        with pytest.raises(echo_async.ConnectError, match=r"several\.example:5500: connection refused"):
            await echo("Hola", "several.example")

    on_loop(main)


def test_connect_resolves_localhost(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        assert await echo("Hola", "localhost", server.address[1]) == "Hola"

    on_loop(main)


def test_retry_waits_for_starting_server(on_loop: OnLoop, bound_socket: socket.socket) -> None:
    async def main() -> None:
        waiting = asyncio.create_task(echo("Hola", *bound_socket.getsockname(), retry=10))
        done, _ = await asyncio.wait([waiting], timeout=0.1)  # connections are refused until listen()
        assert not done
        bound_socket.listen()
        with (await asyncio.to_thread(bound_socket.accept))[0] as connected:
            connected.sendall(await asyncio.to_thread(connected.recv, 100))
            assert await waiting == "Hola"

    on_loop(main)


def test_retry_ends_after_its_time(on_loop: OnLoop, closed_port: int, black_hole_address: tuple[str, int]) -> None:
    async def main() -> None:
        started = time.monotonic()
        with pytest.raises(echo_async.ConnectError):
            await echo("Hola", port=closed_port, retry=0.1)
        with pytest.raises(echo_async.ConnectTimeout):
            await echo("Hola", *black_hole_address, retry=0.1, connect_timeout=0.05)
        assert 0.2 <= time.monotonic() - started < MAX_DELAY

    on_loop(main)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 0}, "invalid port: 0"),
        ({"port": 65536}, "invalid port: 65536"),
        ({"port": "5500"}, "invalid port: '5500'"),
        ({"host": ""}, "invalid host: ''"),
        ({"host": "a\0b"}, "invalid host: "),
        ({"timeout": 0}, "invalid timeout: 0 "),
        ({"timeout": float("nan")}, "invalid timeout: nan "),
        ({"connect_timeout": -1}, "invalid connect_timeout: -1 "),
        ({"retry": float("inf")}, "invalid retry: inf "),
        ({"server_hostname": "x"}, "server_hostname requires ssl"),
        ({"server_hostname": "a\0b", "ssl": True}, "invalid server_hostname: "),
        ({"server_hostname": ".", "ssl": True}, "invalid server_hostname: '.' "),
        ({"server_hostname": "x" * 64, "ssl": True}, "invalid server_hostname: "),
    ],
)
def test_connect_invalid_option_raises(options: dict[str, Any], text: str) -> None:
    with pytest.raises(echo_async.ConfigError, match=text):
        connect(**options)


# Lost replies


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("close", "lost before the reply: closed by the server"),
        ("close=5", "lost after 5 of 13 bytes of the reply: closed by the server"),
        ("close=12", "lost after 12 of 13 bytes of the reply: closed by the server"),
    ],
)
def test_connection_closed_before_reply_raises_reply_lost(
    on_loop: OnLoop, faulty_server: MakeEchoServer, fault: str, text: str
) -> None:
    server = faulty_server(fault=fault)

    async def main() -> None:
        async with connect(*server.address) as client:
            with pytest.raises(echo_async.ReplyLost, match=text):
                await client.echo("Hola Server!")

    on_loop(main)
    assert server.stats.accepted == 1  # not sent again: the connection was new


def test_connection_reset_raises_reply_lost(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="reset")

    async def main() -> None:
        with pytest.raises(echo_async.ReplyLost, match="lost before the reply: connection reset by peer"):
            await echo("Hola", *server.address)

    on_loop(main)


def test_message_too_long_for_server_raises_reply_lost(on_loop: OnLoop) -> None:
    async def main() -> None:
        async with echo_async.serve(port=0, mode="stream") as server, connect(*server.address) as client:
            with pytest.raises(echo_async.ReplyLost, match="does the server accept messages of 3000001 bytes"):
                await client.echo("x" * 3_000_000)
            assert await client.echo("x") == "x"

    on_loop(main)


def test_message_with_incomplete_second_reply_is_not_resent(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="close=6")

    async def main() -> None:
        async with connect(*server.address) as client:
            assert await client.echo("one") == "one"
            with pytest.raises(echo_async.ReplyLost, match="after 2 of 4 bytes"):
                await client.echo("two")

    on_loop(main)


def test_lost_reply_on_reused_connection_raises(on_loop: OnLoop, scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        for _ in range(3):
            peer.send(peer.message())
        peer.message()

    server = scripted_server(serve)

    async def main() -> None:
        async with connect(*server.address) as client:
            for message in ("0", "1", "2"):
                assert await client.echo(message) == message
            with pytest.raises(echo_async.ReplyLost):
                await client.echo("lost")
            assert await client.echo("3") == "3"
            results = await asyncio.gather(*map(client.echo, "456"), return_exceptions=True)
            assert results[:2] == ["4", "5"]
            assert isinstance(results[2], echo_async.ReplyLost)

    on_loop(main)


@sends_at_once
def test_replies_received_before_failed_write_are_kept(on_loop: OnLoop, scripted_server: Start) -> None:
    closed = threading.Event()

    def serve(peer: Peer) -> None:
        for _ in range(3):
            peer.send(peer.message())
        peer.reset()
        peer.close()
        closed.set()

    server = scripted_server(serve)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert [await client.echo("0"), await client.echo("1")] == ["0", "1"]
            replied = asyncio.create_task(client.echo("2"))
            await asyncio.sleep(0)
            closed.wait(TIMEOUT)  # blocks the loop: the reply and the reset have arrived, neither is read
            lost = asyncio.create_task(client.echo("3"))
            assert await replied == "2"
            with pytest.raises(echo_async.ReplyLost):
                await lost

    on_loop(main)


# Late replies


def test_reply_timeout_raises_reply_late(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault_sequence="drop")

    async def main() -> None:
        async with connect(*server.address, timeout=0.5) as client:
            started = time.monotonic()
            with pytest.raises(echo_async.ReplyLate, match=r"reply timeout: no reply from .* within 0\.5 s"):
                await client.echo("Hola")
            assert 0.49 < time.monotonic() - started < MAX_DELAY
            assert await client.echo("again") == "again"

    on_loop(main)
    assert server.received == [b"Hola\n", b"again\n"]
    assert server.stats.accepted == 2


def test_slow_reply_bytes_do_not_extend_timeout(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="rate=50,slice=1")

    async def main() -> None:
        with pytest.raises(echo_async.ReplyLate):
            await echo("x" * 100, *server.address, timeout=0.1)

    on_loop(main)


def test_replies_after_late_reply_are_lost(on_loop: OnLoop, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="stall=4")

    async def main() -> None:
        async with connect(*server.address, timeout=0.5) as client:
            assert [await client.echo("0"), await client.echo("1")] == ["0", "1"]
            late, *behind = await asyncio.gather(*map(client.echo, "234"), return_exceptions=True)
            assert isinstance(late, echo_async.ReplyLate)
            assert [str(error).partition(" lost ")[2] for error in behind] == [
                "before the reply: an earlier reply timed out"
            ] * 2

    on_loop(main)


def test_blocked_event_loop_does_not_cause_timeout(on_loop: OnLoop, scripted_server: Start) -> None:
    replied, never = threading.Event(), threading.Event()

    def echo_late(peer: Peer) -> None:
        echo_one(peer)
        replied.set()
        peer.message()

    server = scripted_server(echo_late)

    async def main() -> None:
        async with connect(*server.address, timeout=0.1) as client:
            waiting = asyncio.create_task(client.echo("Hola"))
            await run_turns(2)  # uvloop before 0.23 sends at the end of a turn
            assert replied.wait(MAX_DELAY)
            never.wait(0.2)  # blocks the event loop until the timeout has passed
            assert await waiting == "Hola"

    on_loop(main)


def test_timeout_restarts_for_every_reply(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(echo_all)

    async def main() -> None:
        async with connect(*server.address, timeout=0.5) as client:
            ends = time.monotonic() + 0.8
            while time.monotonic() < ends:
                assert await client.echo("Hola") == "Hola"

    on_loop(main)


# Different replies


@pytest.mark.parametrize(
    ("reply", "offset", "text"),
    [
        (b"Hola Sirver!\n", 6, 'reply mismatch at byte 6: received "Hola Sirver!\\\\n", expected "Hola Server!\\\\n"'),
        (b"\x1b[2J\n", 0, 'received "\\\\x1b[2J\\\\n", expected "Hola'),
        (b"\xffola\n", 0, 'received "\\\\xffola\\\\n"'),
        (b"Hola\n", 4, 'received "Hola\\\\n", expected'),
        (b"Hola Server! \n", 12, 'received "Hola Server! \\\\n", expected "Hola Server!\\\\n"'),
        (b"Hola Server!\nmore", 13, 'reply mismatch at byte 13: received 4 unexpected bytes "more"'),
    ],
)
def test_reply_mismatch_raises_reply_different(
    on_loop: OnLoop, scripted_server: Start, reply: bytes, offset: int, text: str
) -> None:
    server = scripted_server(reply_with(reply))

    async def main() -> None:
        with pytest.raises(echo_async.ReplyDifferent) as caught:
            await echo("Hola Server!", *server.address)
        assert caught.value.offset == offset
        assert text.replace("\\\\", "\\") in str(caught.value)

    on_loop(main)


def test_reply_mismatch_error_quotes_few_bytes(on_loop: OnLoop, scripted_server: Start) -> None:
    server = scripted_server(reply_with(b"x" * 50_000 + b"y" * 50_001))

    async def main() -> None:
        with pytest.raises(echo_async.ReplyDifferent) as caught:
            await echo("x" * 100_000, *server.address)
        assert caught.value.offset == 50_000
        assert "x" * 20 + "y" * 20 + '"...' in str(caught.value)
        assert len(str(caught.value)) < 300

    on_loop(main)


def test_replies_after_mismatch_are_lost(on_loop: OnLoop, scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        for message in peer.messages():
            peer.send(message.replace(b"bad", b"BAD"))

    server = scripted_server(serve)

    async def main() -> None:
        async with connect(*server.address) as client:
            assert [await client.echo("0"), await client.echo("1")] == ["0", "1"]
            good, bad, behind = await asyncio.gather(*map(client.echo, ("2", "bad", "3")), return_exceptions=True)
            assert good == "2"
            assert isinstance(bad, echo_async.ReplyDifferent)
            assert isinstance(behind, echo_async.ReplyLost)
            assert await client.echo("4") == "4"

    on_loop(main)


def test_unexpected_bytes_fail_next_reply(on_loop: OnLoop, scripted_server: Start) -> None:
    sent = threading.Event()

    def serve(peer: Peer) -> None:
        if peer.number == 0:
            peer.send(b"220 mail.example ESMTP\r\n")
            sent.set()
        echo_all(peer)

    server = scripted_server(serve)

    async def main() -> None:
        async with connect(*server.address) as client:
            await disconnected(client)  # the client closes it because of the unexpected bytes
            with pytest.raises(echo_async.ReplyDifferent, match="received 24 unexpected bytes") as caught:
                await client.echo("Hola")
            assert caught.value.offset == 0
            assert await client.echo("Hola") == "Hola"

    on_loop(main)


def test_endless_reply_uses_bounded_memory(on_loop: OnLoop, scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        peer.message()
        while True:
            peer.send(b"\0" * 1_000_000)

    server = scripted_server(serve)

    async def main() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(echo_async.ReplyDifferent):
            await echo("\0" * 100_000, *server.address)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024

    on_loop(main)


def test_errors_are_subclasses_of_standard_errors() -> None:
    assert issubclass(echo_async.ReplyLost, ConnectionError)
    assert issubclass(echo_async.ReplyLate, TimeoutError)
    assert issubclass(echo_async.ConnectError, OSError)
