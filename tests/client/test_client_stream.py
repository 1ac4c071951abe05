"""``EchoClient.stream``: order, bounds and errors."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
from clients import ASYNC_SOURCE, CLIENTS, Connect, wait_disconnected
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TIMEOUT, lines

import echo_async
from echo_async.client.batching import WINDOW_BYTES
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")

each_source = pytest.mark.parametrize("client", [*CLIENTS, ASYNC_SOURCE], indirect=True)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"))
DATA = st.binary().map(lambda data: data.replace(b"\n", b""))
MESSAGES = st.lists(TEXT | DATA | TEXT.map("{}\n".format) | DATA.map(lambda data: data + b"\n"))


@each_source
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, window=st.integers(1, 9))
def test_stream_returns_any_messages_in_any_window(
    connect: Connect, echo_server: HostedServer, messages: list[Any], window: int
) -> None:
    with connect(*echo_server.address) as client:
        assert list(client.stream(["first", "second"])) == ["first", "second"]
        assert list(client.stream(messages, window=window)) == messages


@each_source
def test_stream_of_connections_yields_replies_in_order(connect: Connect, faulty_server: MakeEchoServer) -> None:
    """The server closes each after its reply, so each message has a connection of its own."""
    messages = [str(number) for number in range(10)]
    with connect(*faulty_server(mode="message").address) as client:
        for window in (1, 3, 1024):
            assert list(client.stream(messages, window=window)) == messages
        assert client.echo("after") == "after"


def test_stream_pipelines_up_to_window(connect: Connect, faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        for message in itertools.islice(lines(peer), 2):
            peer.send(message)
        while True:  # replies only to a complete window
            peer.send(b"".join(list(itertools.islice(lines(peer), 8))))

    server = faulty_server(handler=serve)
    taken = 0

    def messages() -> Iterator[str]:
        nonlocal taken
        for number in range(2 + 8 * 5):
            taken += 1
            yield str(number)

    with connect(*server.address) as client:
        for replies, reply in enumerate(client.stream(messages(), window=8)):
            assert reply == str(replies)
            assert taken <= replies + 1 + 8
    assert taken == 42


@pytest.mark.parametrize("echo_server_options", [{"chunk_size": 65_536}], ids=str)
def test_stream_is_bounded_while_consumer_is_slow(connect: Connect, echo_server: HostedServer) -> None:
    taken = 0

    def messages() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 9_999

    with (
        connect(*echo_server.address) as client,
        contextlib.closing(client.stream(messages(), window=10**6)) as replies,
    ):
        for _ in itertools.islice(replies, 100):
            assert taken * 10_000 < 2 * WINDOW_BYTES + 1_000_000


def test_stream_window_one_sends_each_message_at_once(connect: Connect, faulty_server: MakeEchoServer) -> None:
    arrived = threading.Semaphore(0)

    def serve(peer: Peer) -> None:
        for message in lines(peer):
            arrived.release()
            peer.send(message)

    def messages() -> Iterator[str]:
        for number in range(10):
            yield str(number)
            assert arrived.acquire(timeout=TIMEOUT)  # fails if the batch waits for more messages

    server = faulty_server(handler=serve)
    with connect(*server.address) as client:
        assert list(client.stream(messages(), window=1)) == [str(number) for number in range(10)]


@each_source
def test_stream_closed_early_keeps_connection(connect: Connect, echo_server: HostedServer) -> None:
    messages = [str(number) for number in range(1000)]
    with connect(*echo_server.address) as client:
        for _ in range(3):
            with contextlib.closing(client.stream(messages)) as replies:
                assert list(itertools.islice(replies, 5)) == messages[:5]
            assert client.echo("after") == "after"
    assert len(echo_server.connections) == 1


def test_stream_with_another_message_between_replies(connect: Connect, echo_server: HostedServer) -> None:
    messages = [str(number) for number in range(40)]
    with connect(*echo_server.address) as client:
        replies = []
        for reply in client.stream(messages, window=16):
            replies.append(reply)
            assert client.echo("another") == "another"
            assert client.ping() > 0
        assert replies == messages
        one, other = client.stream(messages[:20], window=8), client.stream(messages[20:], window=8)
        assert list(zip(one, other, strict=True)) == list(zip(messages[:20], messages[20:], strict=True))


def assert_stream_fails(client: Any, messages: Any, replies: list[str], error: type[Exception]) -> None:
    stream = client.stream(messages)
    assert list(itertools.islice(stream, len(replies))) == replies
    with pytest.raises(error):
        next(stream)


@each_source
def test_stream_source_error_or_invalid_message_follows_replies(connect: Connect, echo_server: HostedServer) -> None:
    def messages() -> Iterator[str]:
        yield from ("0", "1")
        raise ZeroDivisionError

    with connect(*echo_server.address) as client:
        assert list(client.stream(["a", "b"])) == ["a", "b"]
        assert_stream_fails(client, messages(), ["0", "1"], ZeroDivisionError)
        for bad in ("a\nb", "\udcff"):
            assert_stream_fails(client, ["0", "1", bad, "2"], ["0", "1"], echo_async.MessageError)
        for other in (5, bytearray(b"x")):
            assert_stream_fails(client, ["0", "1", other, "2"], ["0", "1"], TypeError)


def test_stream_invalid_arguments_raise(connect: Connect, echo_server: HostedServer) -> None:
    with connect(*echo_server.address) as client:
        with pytest.raises(TypeError, match="not str; use echo"):
            client.stream("Hola")
        for window in (0, 1.5):
            with pytest.raises(echo_async.ConfigError, match=f"invalid window: {window} "):
                client.stream(["Hola"], window=cast(int, window))


def test_stream_failed_reply_follows_earlier_replies(connect: Connect, faulty_server: MakeEchoServer) -> None:
    for server, error in (
        (faulty_server(fault_sequence="close=11"), echo_async.ReplyLost),
        (faulty_server(fault_sequence="reset=11"), echo_async.ReplyLost),
        (faulty_server(fault_sequence="stall=10"), echo_async.ReplyLate),
        (faulty_server(reply=lambda message: message.replace(b"5", b"V")), echo_async.ReplyDifferent),
    ):
        with connect(*server.address, timeout=1 if error is echo_async.ReplyLate else TIMEOUT) as client:
            assert_stream_fails(client, map(str, range(9)), ["0", "1", "2", "3", "4"], error)
            assert client.echo("after") == "after"


def test_client_server_stopped_raises_connect_error(connect: Connect, echo_server: HostedServer) -> None:
    with connect(*echo_server.address) as client:
        assert list(client.stream(["a", "b"])) == ["a", "b"]
        with echo_server.refusing():
            echo_server.disconnect()
            wait_disconnected(client)
            with pytest.raises(echo_async.ConnectError):
                client.echo("c")
            with pytest.raises(echo_async.ConnectError):
                list(client.stream(["a"]))
