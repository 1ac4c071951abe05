"""The blocking client: the same replies and errors as those of the asyncio client."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import itertools
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    Peer,
    Serve,
    Start,
    change_fifth,
    echo_all,
    echo_one,
    over_tls,
    reply_with,
    resolve_to,
)
from support import MAX_DELAY, TIMEOUT

import echo_async
from echo_async import sync
from echo_async.client import client as asyncio_client
from echo_async.client.batching import WINDOW_BYTES
from echo_async.config import EngineName, Mode
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.tls import client_context

pytestmark = pytest.mark.usefixtures("no_leaks")

MESSAGES = ["", "a", "Hola Server!", "ñandú 🎉", "\x00\x1b[2J\r", "x" * 19, "x" * 20, "x" * 21, "x" * 10_000]


@contextlib.contextmanager
def running_server(engine: EngineName, mode: Mode) -> Iterator[tuple[str, int]]:
    """Run a server on an event loop in another thread."""
    started: list[echo_async.EchoServer] = []
    ready = threading.Event()

    async def main() -> None:
        async with echo_async.serve(port=0, engine=engine, mode=mode) as server:
            started.append(server)
            ready.set()
            await server.wait_closed()

    thread = threading.Thread(target=asyncio.run, args=[main()], daemon=True)
    thread.start()
    ready.wait(TIMEOUT)
    try:
        yield started[0].address
    finally:
        started[0].close()
        thread.join(TIMEOUT)


# The same API as the asyncio client


@pytest.mark.parametrize("name", ["connect", "echo"])
def test_function_has_parameters_of_asyncio_function(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(each, name)) for each in (sync, asyncio_client))
    assert ours.parameters == theirs.parameters


def test_client_has_members_of_asyncio_client() -> None:
    def public(client: type) -> set[str]:
        return {name for name in dir(client) if not name.startswith("_")}

    assert public(sync.EchoClient) == {"close", "echo", "identify", "name", "ping", "stream"}
    assert public(echo_async.EchoClient) == public(sync.EchoClient) | {"wait_closed"}


# Correct replies


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("engine", ["streams", "protocol", "threads"])
def test_echo_returns_every_message_on_every_engine(engine: EngineName, mode: Mode) -> None:
    with running_server(engine, mode) as address, sync.connect(*address) as client:
        for message in MESSAGES:
            assert client.echo(message) == message
            assert client.echo(message.encode()) == message.encode()
        assert list(client.stream(MESSAGES)) == MESSAGES
        assert 0 < client.ping() < TIMEOUT
        assert sync.echo("once", *address) == "once"


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_echo_returns_every_message_of_blocking_server(mode: Mode) -> None:
    with sync.serve(port=0, mode=mode) as server, sync.connect(*server.address) as client:
        assert [client.echo(message) for message in MESSAGES] == MESSAGES


@pytest.mark.parametrize("message", ["Hola\n", b"Hola\n", "Hola", b"Hola", b"\xff\x00", "", b"\n"])
def test_echo_reply_has_type_and_newline_of_message(scripted_server: Start, message: str | bytes) -> None:
    server = scripted_server(echo_all)
    reply = sync.echo(cast(str, message), *server.address)
    assert reply == message
    assert type(reply) is type(message)
    sent = message.encode() if isinstance(message, str) else message
    assert server.received == [[sent if sent.endswith(b"\n") else sent + b"\n"]]


def test_echo_invalid_message_sends_nothing(scripted_server: Start) -> None:
    server = scripted_server(echo_all)
    with sync.connect(*server.address) as client:
        with pytest.raises(echo_async.MessageError, match="newline at byte 3"):
            client.echo("one\ntwo")
        with pytest.raises(echo_async.MessageError, match="not valid Unicode"):
            client.echo("\udcff")
        with pytest.raises(TypeError, match="must be str or bytes, not int"):
            client.echo(cast(str, 5))
        assert client.echo("after") == "after"
    assert server.received == [[b"after\n"]]


def test_client_works_without_with_statement(scripted_server: Start) -> None:
    server = scripted_server(echo_all)
    client = sync.connect(*server.address)
    assert client.name == f"127.0.0.1:{server.address[1]}"
    assert client.echo("one") == "one"
    client.close()
    client.close()
    with pytest.raises(echo_async.EchoError, match="the client is closed; connect again"):
        client.echo("two")


def test_connect_unix_socket(tmp_path: Path) -> None:
    with sync.serve(uds=str(tmp_path / "socket")) as server:
        assert sync.echo("Hola", uds=cast(str, server.address)) == "Hola"


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_echo_returns_ten_mebibytes(mode: Mode) -> None:
    message = bytes(range(11, 256)) * 42_800
    options: Any = {"mode": mode, "limit_message_size": 2**30, "chunk_size": 65_536, "no_access_log": True}
    with sync.serve(port=0, **options) as server, sync.connect(*server.address) as client:
        assert client.echo(message) == message
        assert list(client.stream([message] * 3)) == [message] * 3


# Reconnecting


@pytest.mark.parametrize("fault", [None, "slice=1"])
def test_client_reuses_connection_that_stays_open(faulty_server: MakeEchoServer, fault: str | None) -> None:
    server = faulty_server(fault=fault)
    with sync.connect(*server.address) as client:
        assert [client.echo(message) for message in ("one", "two", "three")] == ["one", "two", "three"]
        assert list(client.stream(["four", "five"])) == ["four", "five"]
    assert server.received == [b"one\n", b"two\n", b"three\n", b"four\n", b"five\n"]
    assert server.stats.accepted == 1


def test_client_reconnects_for_every_message(scripted_server: Start) -> None:
    server = scripted_server(echo_one)
    with sync.connect(*server.address) as client:
        expected = [str(number) for number in range(20)]
        assert [client.echo(message) for message in expected[:10]] == expected[:10]
        assert list(client.stream(expected[10:])) == expected[10:]
    assert [messages for messages in server.received if messages] == [[b"%d\n" % number] for number in range(20)]


def test_client_treats_reset_after_reply_as_close(scripted_server: Start) -> None:
    def echo_and_reset(peer: Peer) -> None:
        peer.send(peer.message())
        peer.message()  # the reset follows the second message
        peer.reset()

    server = scripted_server(echo_and_reset)
    with sync.connect(*server.address) as client:
        assert [client.echo(message) for message in ("one", "two", "three")] == ["one", "two", "three"]
    assert server.received == [[b"one\n", b"two\n"], [b"two\n"], [b"three\n"]]


def test_client_reconnects_after_close_between_messages(scripted_server: Start) -> None:
    closed = threading.Semaphore(0)

    def echo_two(peer: Peer) -> None:
        peer.send(peer.message())
        peer.send(peer.message())
        peer.close()
        closed.release()

    server = scripted_server(echo_two)
    with sync.connect(*server.address) as client:
        for number in range(6):
            assert client.echo(str(number)) == str(number)
            if number % 2:  # the connection is closed before the next message
                assert closed.acquire(timeout=TIMEOUT)
    assert server.received == [[b"0\n", b"1\n"], [b"2\n", b"3\n"], [b"4\n", b"5\n"]]


def test_lost_reply_on_reused_connection_raises(scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        for _ in range(3):
            peer.send(peer.message())
        peer.message()

    server = scripted_server(serve)
    with sync.connect(*server.address) as client:
        for message in ("0", "1", "2"):
            assert client.echo(message) == message
        with pytest.raises(echo_async.ReplyLost):
            client.echo("lost")
        assert client.echo("3") == "3"


def test_message_with_incomplete_second_reply_is_not_resent(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="close=6")
    with sync.connect(*server.address) as client:
        assert client.echo("one") == "one"
        with pytest.raises(echo_async.ReplyLost, match="after 2 of 4 bytes"):
            client.echo("two")


# Lost, late and different replies


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("close", "lost before the reply: closed by the server"),
        ("close=5", "lost after 5 of 13 bytes of the reply: closed by the server"),
        ("close=12", "lost after 12 of 13 bytes of the reply: closed by the server"),
    ],
)
def test_connection_closed_before_reply_raises_reply_lost(faulty_server: MakeEchoServer, fault: str, text: str) -> None:
    server = faulty_server(fault=fault)
    with sync.connect(*server.address) as client, pytest.raises(echo_async.ReplyLost, match=text):
        client.echo("Hola Server!")
    assert server.stats.accepted == 1  # not sent again: the connection was new


def test_connection_reset_raises_reply_lost(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="reset")
    with pytest.raises(echo_async.ReplyLost, match="lost before the reply: connection reset by peer"):
        sync.echo("Hola", *server.address)


def test_connection_reset_during_send_raises_reply_lost(scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        peer.socket.recv(100)
        peer.reset()

    server = scripted_server(serve)
    with pytest.raises(echo_async.ReplyLost, match=r"lost before the reply: (connection reset by peer|broken pipe)"):
        sync.echo("x" * 10_000_000, *server.address)


def test_replies_received_before_failed_write_are_kept(scripted_server: Start) -> None:
    closed = threading.Event()

    def serve(peer: Peer) -> None:
        for _ in range(3):
            peer.send(peer.message())
        peer.reset()
        closed.set()

    def messages() -> Iterator[str]:
        yield from ("0", "1", "2")
        assert closed.wait(TIMEOUT)  # the reply and the reset have arrived, neither is read
        yield "3"

    server = scripted_server(serve)
    replies: list[str] = []
    with sync.connect(*server.address) as client, pytest.raises(echo_async.ReplyLost):
        replies.extend(client.stream(messages()))
    assert replies == ["0", "1", "2"]


def test_reply_timeout_raises_reply_late(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault_sequence="drop")
    with sync.connect(*server.address, timeout=0.5) as client:
        started = time.monotonic()
        with pytest.raises(echo_async.ReplyLate, match=r"reply timeout: no reply from .* within 0\.5 s"):
            client.echo("Hola")
        assert 0.49 < time.monotonic() - started < MAX_DELAY
        assert client.echo("again") == "again"
    assert server.received == [b"Hola\n", b"again\n"]
    assert server.stats.accepted == 2


def test_server_not_reading_raises_reply_late(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="stall")
    with sync.connect(*server.address, timeout=0.2) as client, pytest.raises(echo_async.ReplyLate):
        client.echo(b"x" * 20_000_000)


def test_slow_reply_bytes_do_not_extend_timeout(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="rate=50,slice=1")
    with pytest.raises(echo_async.ReplyLate):
        sync.echo("x" * 1000, *server.address, timeout=0.15)


@pytest.mark.parametrize(
    ("reply", "offset", "text"),
    [
        (b"Hola Sirver!\n", 6, 'reply mismatch at byte 6: received "Hola Sirver!\\n", expected "Hola Server!\\n"'),
        (b"\x1b[2J\n", 0, 'received "\\x1b[2J\\n", expected "Hola'),
        (b"\xffola\n", 0, 'received "\\xffola\\n"'),
        (b"Hola\n", 4, 'received "Hola\\n", expected'),
        (b"Hola Server!\nmore", 13, 'reply mismatch at byte 13: received 4 unexpected bytes "more"'),
    ],
)
def test_reply_mismatch_raises_reply_different(scripted_server: Start, reply: bytes, offset: int, text: str) -> None:
    server = scripted_server(reply_with(reply))
    with pytest.raises(echo_async.ReplyDifferent) as caught:
        sync.echo("Hola Server!", *server.address)
    assert caught.value.offset == offset
    assert text in str(caught.value).replace("\\\\", "\\")


def test_unexpected_bytes_fail_next_reply(scripted_server: Start) -> None:
    sent = threading.Event()

    def serve(peer: Peer) -> None:
        if peer.number == 0:
            peer.send(b"220 mail.example ESMTP\r\n")
            sent.set()
        echo_all(peer)

    server = scripted_server(serve)
    with sync.connect(*server.address) as client:
        assert sent.wait(TIMEOUT)
        with pytest.raises(echo_async.ReplyDifferent, match="received 24 unexpected bytes") as caught:
            client.echo("Hola")
        assert caught.value.offset == 0
        assert client.echo("Hola") == "Hola"


def test_endless_reply_uses_bounded_memory(scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        peer.message()
        while True:
            peer.send(b"\0" * 1_000_000)

    server = scripted_server(serve)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(echo_async.ReplyDifferent):
        sync.echo("\0" * 100_000, *server.address)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


# Connecting


def test_connect_refused_raises(bound_socket: socket.socket) -> None:
    port = bound_socket.getsockname()[1]
    with pytest.raises(echo_async.ConnectError) as caught:
        sync.echo("Hola", port=port)
    assert str(caught.value) == (f"cannot connect to 127.0.0.1:{port}: connection refused; is the server running?")


def test_connect_missing_unix_socket_raises(tmp_path: Path) -> None:
    with pytest.raises(echo_async.ConnectError, match="no such file or directory; is the server running"):
        sync.connect(uds=tmp_path / "nobody")
    with pytest.raises(echo_async.ConnectError, match="path too long"):
        sync.connect(uds=tmp_path / ("x" * 200))


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "a..b", "x" * 300])
def test_connect_unknown_host_raises(host: str) -> None:
    with pytest.raises(echo_async.ConnectError, match="check the host name"):
        sync.connect(host)


def test_connect_without_free_descriptor_raises() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(echo_async.ConnectError, match="too many open files"):
            sync.connect(port=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_connect_unreachable_address_times_out(black_hole_address: tuple[str, int]) -> None:
    with pytest.raises(
        echo_async.ConnectTimeout, match=r"cannot connect to .*: timed out after 0\.1 s; check the address"
    ):
        sync.connect(*black_hole_address, connect_timeout=0.1)


def test_connect_unix_socket_full_backlog_times_out(faulty_server: MakeEchoServer, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    faulty_server(uds=path, fault="no-accept")
    with pytest.raises(echo_async.ConnectTimeout):
        sync.connect(uds=path, connect_timeout=0.05)


def test_connect_tries_every_address(
    scripted_server: Start,
    monkeypatch: pytest.MonkeyPatch,
    black_hole_address: tuple[str, int],
    bound_socket: socket.socket,
) -> None:
    server = scripted_server(echo_all)
    broadcast = ("127.255.255.255", server.address[1])  # connect() fails immediately
    resolve_to(monkeypatch, broadcast, bound_socket.getsockname(), black_hole_address, server.address)
    assert sync.echo("Hola", "several.example") == "Hola"


def test_connect_skips_unsupported_address_family(scripted_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = scripted_server(echo_all)
    resolve_to(monkeypatch, ("127.0.0.1", 1), server.address)
    real, refused = socket.socket, [OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))]

    def make(*args: Any, **kwargs: Any) -> socket.socket:
        if refused and args:
            raise refused.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(socket, "socket", make)
    assert sync.echo("Hola", "several.example") == "Hola"
    assert not refused


def test_connect_all_addresses_refused_raises(monkeypatch: pytest.MonkeyPatch, bound_socket: socket.socket) -> None:
    port = bound_socket.getsockname()[1]
    resolve_to(monkeypatch, ("127.0.0.1", port), ("127.0.0.2", port))
    with pytest.raises(echo_async.ConnectError, match=r"several\.example:5500: connection refused"):
        sync.echo("Hola", "several.example")


def test_connect_resolves_localhost(scripted_server: Start) -> None:
    assert sync.echo("Hola", "localhost", scripted_server(echo_all).address[1]) == "Hola"


def test_retry_waits_for_starting_server(bound_socket: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    refused = threading.Event()

    def serve() -> None:
        refused.wait(TIMEOUT)
        bound_socket.listen()
        with bound_socket.accept()[0] as connected:
            connected.sendall(connected.recv(100))

    class Watch:
        """Detect the log line of the first failed attempt."""

        def filter(self, record: Any) -> bool:
            if "; retrying in " in record.getMessage():
                refused.set()
            return True

    caplog.set_level("DEBUG", "echo_async.client")
    caplog.handler.addFilter(watch := Watch())
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        assert sync.echo("Hola", *bound_socket.getsockname(), retry=TIMEOUT) == "Hola"
    finally:
        thread.join(TIMEOUT)
        caplog.handler.removeFilter(watch)
    assert refused.is_set()


def test_retry_ends_after_its_time(bound_socket: socket.socket, black_hole_address: tuple[str, int]) -> None:
    started = time.monotonic()
    with pytest.raises(echo_async.ConnectError):
        sync.echo("Hola", *bound_socket.getsockname(), retry=0.1)
    with pytest.raises(echo_async.ConnectTimeout):
        sync.echo("Hola", *black_hole_address, retry=0.1, connect_timeout=0.05)
    assert 0.2 <= time.monotonic() - started < MAX_DELAY


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"port": 0}, "invalid port: 0"),
        ({"host": ""}, "invalid host: ''"),
        ({"timeout": 0}, "invalid timeout: 0 "),
        ({"connect_timeout": -1}, "invalid connect_timeout: -1 "),
        ({"retry": float("inf")}, "invalid retry: inf "),
        ({"retry": None}, "invalid retry: None "),
        ({"host": b"::1"}, "invalid host: b'::1' "),
        ({"uds": ""}, "invalid uds: '' "),
        ({"server_hostname": "x"}, "server_hostname requires ssl"),
    ],
)
def test_connect_invalid_option_raises(options: dict[str, Any], text: str) -> None:
    with pytest.raises(echo_async.ConfigError, match=text):
        sync.connect(**options)


# Streams


@pytest.mark.parametrize("mode", ["message", "stream"])
@pytest.mark.parametrize("window", [1, 3, 1024])
def test_stream_yields_replies_in_order(mode: Mode, window: int) -> None:
    messages = [str(number) for number in range(20 if mode == "message" else 500)]
    with sync.serve(port=0, mode=mode) as server, sync.connect(*server.address) as client:
        assert list(client.stream(messages, window=window)) == messages
        assert client.echo("after") == "after"


def test_stream_replies_equal_messages(scripted_server: Start) -> None:
    server = scripted_server(echo_all)
    with sync.connect(*server.address) as client:
        text = ["a", "b\n", "", "\n", "ñ", "x" * 100_000]
        assert list(client.stream(text)) == text
        data = [b"a", b"b\n", b"", b"\n", b"\xff", b"x" * 100_000]
        assert list(client.stream(data)) == data
        assert list(client.stream(cast(list[str], []))) == []


MESSAGE_LISTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n")))


@settings(max_examples=30)
@given(messages=MESSAGE_LISTS, window=st.integers(1, 9))
def test_stream_returns_any_messages_in_any_window(messages: list[str], window: int) -> None:
    with sync.serve(port=0, mode="stream", no_access_log=True) as server, sync.connect(*server.address) as client:
        assert list(client.stream(["first", "second"])) == ["first", "second"]
        assert list(client.stream(messages, window=window)) == messages


def test_stream_pipelines_up_to_window(scripted_server: Start) -> None:
    def serve(peer: Peer) -> None:
        for message in itertools.islice(peer.messages(), 2):
            peer.send(message)
        while True:  # replies only to a complete window
            peer.send(b"".join(itertools.islice(peer.messages(), 8)))

    server = scripted_server(serve)
    taken = 0

    def messages() -> Iterator[str]:
        nonlocal taken
        for number in range(2 + 8 * 5):
            taken += 1
            yield str(number)

    with sync.connect(*server.address) as client:
        for replies, reply in enumerate(client.stream(messages(), window=8)):
            assert reply == str(replies)
            assert taken <= replies + 1 + 8
    assert taken == 42


def test_stream_is_bounded_while_consumer_is_slow(scripted_server: Start) -> None:
    server = scripted_server(echo_all)
    taken = 0

    def messages() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 9_999

    with sync.connect(*server.address) as client:
        for _ in itertools.islice(client.stream(messages(), window=10**6), 100):
            assert taken * 10_000 < 2 * WINDOW_BYTES + 1_000_000


def test_stream_slow_caller_does_not_cause_timeout(scripted_server: Start) -> None:
    """Neither a caller that is slow to send nor one that is slow to take replies."""
    server = scripted_server(echo_all)
    pause = threading.Event()

    def messages() -> Iterator[bytes]:
        for number in range(5):
            pause.wait(1.1 if number == 3 else 0)
            yield b"x" * 500_000

    with sync.connect(*server.address, timeout=1) as client:
        replies = 0
        for _ in client.stream(messages()):
            replies += 1
            pause.wait(1.1 if replies == 2 else 0)
    assert replies == 5


def test_stream_window_one_sends_each_message_broadcast(scripted_server: Start) -> None:
    arrived = threading.Semaphore(0)

    def serve(peer: Peer) -> None:
        for message in peer.messages():
            arrived.release()
            peer.send(message)

    def messages() -> Iterator[str]:
        for number in range(10):
            yield str(number)
            assert arrived.acquire(timeout=TIMEOUT)  # fails if the batch waits for more messages

    server = scripted_server(serve)
    with sync.connect(*server.address) as client:
        assert list(client.stream(messages(), window=1)) == [str(number) for number in range(10)]


def test_stream_closed_early_keeps_connection(scripted_server: Start) -> None:
    server = scripted_server(echo_all)
    messages = [str(number) for number in range(1000)]
    with sync.connect(*server.address) as client:
        for _ in range(3):
            with contextlib.closing(client.stream(messages)) as replies:
                assert list(itertools.islice(replies, 5)) == messages[:5]
            assert client.echo("after") == "after"
    assert len(server.received) == 1


def test_stream_with_ping_between_replies(scripted_server: Start) -> None:
    server = scripted_server(echo_all)
    messages = [str(number) for number in range(100)]
    replies = []
    with sync.connect(*server.address) as client:
        for reply in client.stream(messages):
            replies.append(reply)
            assert client.ping() > 0
    assert replies == messages


def test_stream_with_echo_between_replies() -> None:
    messages = [str(number) for number in range(10_000)]
    with sync.serve(port=0, mode="stream") as server, sync.connect(*server.address) as client:
        replies = []
        for reply in client.stream(messages):
            replies.append(reply)
            assert client.echo("another") == "another"
        assert replies == messages
        one, other = client.stream(messages[:3000]), client.stream(messages[3000:6000])
        assert list(zip(one, other, strict=True)) == list(zip(messages[:3000], messages[3000:6000], strict=True))


def test_stream_source_can_use_client() -> None:
    with sync.serve(port=0, mode="stream") as server, sync.connect(*server.address) as client:

        def messages() -> Iterator[str]:
            yield from "abc"
            assert client.echo("end") == "end"

        assert list(client.stream(messages())) == ["a", "b", "c"]


def test_stream_source_error_follows_earlier_replies(scripted_server: Start) -> None:
    def messages() -> Iterator[str]:
        yield from ("0", "1", "2", "3")
        raise ZeroDivisionError

    server = scripted_server(echo_all)
    with sync.connect(*server.address) as client:
        stream = client.stream(messages())
        assert list(itertools.islice(stream, 4)) == ["0", "1", "2", "3"]
        with pytest.raises(ZeroDivisionError):
            next(stream)


@pytest.mark.parametrize(("bad", "error"), [("a\nb", echo_async.MessageError), (5, TypeError)])
def test_stream_invalid_message_follows_earlier_replies(
    scripted_server: Start, bad: Any, error: type[Exception]
) -> None:
    server = scripted_server(echo_all)
    with sync.connect(*server.address) as client:
        stream = client.stream(["0", "1", "2", bad, "never"])
        assert list(itertools.islice(stream, 3)) == ["0", "1", "2"]
        with pytest.raises(error):
            next(stream)


def test_stream_invalid_arguments_raise(scripted_server: Start) -> None:
    with sync.connect(*scripted_server(echo_all).address) as client:
        with pytest.raises(TypeError, match="not str; use echo"):
            client.stream("Hola")
        with pytest.raises(echo_async.ConfigError, match="invalid window: 0 "):
            client.stream(["Hola"], window=0)


def assert_stream_fails_at_5(address: tuple[str, int], error: type[Exception]) -> None:
    with sync.connect(*address, timeout=0.5) as client:
        stream = client.stream(map(str, range(9)))
        assert list(itertools.islice(stream, 5)) == ["0", "1", "2", "3", "4"]
        with pytest.raises(error):
            next(stream)
        assert client.echo("after") == "after"


@pytest.mark.parametrize(
    ("fault", "error"),
    [("close=11", echo_async.ReplyLost), ("reset=11", echo_async.ReplyLost), ("stall=10", echo_async.ReplyLate)],
)
def test_stream_lost_or_late_reply_follows_earlier_replies(
    faulty_server: MakeEchoServer, fault: str, error: type[Exception]
) -> None:
    assert_stream_fails_at_5(faulty_server(fault_sequence=fault).address, error)


def test_stream_yields_earlier_replies_before_the_mismatch(scripted_server: Start) -> None:
    assert_stream_fails_at_5(scripted_server(change_fifth).address, echo_async.ReplyDifferent)


def test_client_server_stopped_raises_connect_error(scripted_server: Start) -> None:
    server = scripted_server(echo_all)
    with sync.connect(*server.address) as client:
        assert list(client.stream(["a", "b"])) == ["a", "b"]
        server.stop()
        with pytest.raises(echo_async.ConnectError):
            client.echo("c")


# TLS


@pytest.fixture
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def context(authority: trustme.CA, tmp_path: Path) -> ssl.SSLContext:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return client_context(ca_certs=str(tmp_path / "ca.pem"))


@pytest.mark.parametrize("serve", [echo_one, echo_all])
def test_echo_returns_every_message_over_tls(
    scripted_server: Start, server_context: ssl.SSLContext, context: ssl.SSLContext, serve: Serve
) -> None:
    server = scripted_server(over_tls(server_context, serve))
    with sync.connect(*server.address, ssl=context) as client:
        for message in ("a", "", "ñ 🎉", "x" * 3_000_000):
            assert client.echo(message) == message
        messages = [str(number) for number in range(10)]
        assert list(client.stream(messages)) == messages


def test_connect_untrusted_certificate_raises(scripted_server: Start, server_context: ssl.SSLContext) -> None:
    server = scripted_server(over_tls(server_context))
    with pytest.raises(echo_async.ConnectError, match="TLS: certificate verify failed: "):
        sync.echo("Hola", *server.address, ssl=True, retry=5)  # not retried


def test_connect_server_without_tls_raises(
    scripted_server: Start, faulty_server: MakeEchoServer, context: ssl.SSLContext
) -> None:
    def greet(peer: Peer) -> None:
        peer.send(b"220 mail.example ESMTP\r\n")
        peer.message()

    server = scripted_server(greet)
    with pytest.raises(echo_async.ConnectError, match="TLS: "):
        sync.connect(*server.address, ssl=context)
    silent = faulty_server(fault="stall")
    with pytest.raises(echo_async.ConnectTimeout):
        sync.connect(*silent.address, ssl=context, connect_timeout=0.1)


# Cleanup


def test_client_leaves_no_warning() -> None:
    code = """
from echo_async import sync
with sync.serve(port=0) as server:
    with sync.connect(*server.address) as client:
        assert [client.echo(str(number)) for number in range(5)] == list("01234")
        assert list(client.stream("abc"[at] for at in range(3))) == list("abc")
    assert sync.echo(b"once", *server.address) == b"once"
try:
    sync.echo("Hola", *server.address)
except ConnectionError as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ConnectError\n", "")
