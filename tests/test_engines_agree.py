"""All engines give the same reply to the same bytes, however these are split and delayed.

The expected reply is computed by a reference implementation of the wire protocol, so that errors which all engines
have in common are found as well.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BACKENDS, TIMEOUT, ServerThread, receive_all

import echo_async
from echo_async.config import Mode, ServerOptions

MESSAGE_LIMIT = 40  # bytes
CHUNK_SIZE = 7  # bytes

Servers = dict[str, echo_async.EchoServer]


@pytest.fixture(scope="module", params=["message", "stream", "raw"])
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


@pytest.fixture(scope="module")
def servers(mode: Mode) -> Iterator[Servers]:
    """Start a server of each engine on each event loop."""
    with ExitStack() as stack:
        servers = {}
        for engine, loop in BACKENDS:
            options: ServerOptions = {"port": 0, "mode": mode, "engine": engine, "chunk_size": CHUNK_SIZE}
            options |= {"limit_message_size": MESSAGE_LIMIT, "no_access_log": True}
            servers[f"{engine} on {loop}"] = stack.enter_context(ServerThread(loop, options))
        yield servers


def expected_reply(mode: Mode, sent: bytes) -> tuple[bytes, bool]:
    """Return the reply, and whether the server closes first."""
    if mode == "raw":
        return sent, False
    *messages, rest = sent.split(b"\n")
    reply = b""
    for message in messages:
        if len(message) + 1 > MESSAGE_LIMIT:
            return reply, True
        reply += message + b"\n"
        if mode == "message":
            return reply, True
    return reply, len(rest) >= MESSAGE_LIMIT  # the newline is missing, and counts


PARTS = st.sampled_from(
    [b"\n", b"a", b"ab\n", "ñandú 😀\n".encode(), b"\xff\x00\r", b"x" * (MESSAGE_LIMIT - 1), b"y" * MESSAGE_LIMIT]
)
INPUTS = st.lists(PARTS | st.binary(max_size=2 * MESSAGE_LIMIT), max_size=8).map(b"".join)
SPLITS = st.lists(st.tuples(st.integers(1, 2 * MESSAGE_LIMIT), st.booleans()), max_size=8)


def split(sent: bytes, splits: list[tuple[int, bool]]) -> Iterator[tuple[bytes, bool]]:
    """Yield ``sent`` in pieces, and for each whether to wait until the server has read it."""
    for size, wait in splits:
        if sent:
            yield sent[:size], wait
            sent = sent[size:]
    if sent:
        yield sent, True


def wait_until_read(server: echo_async.EchoServer, received: int) -> None:
    pause = threading.Event()
    for _ in range(int(TIMEOUT / 0.0002)):
        if server.stats.bytes_in >= received:
            return
        pause.wait(0.0002)
    pytest.fail("the server did not read")


def exchange(
    server: echo_async.EchoServer, sent: bytes, splits: list[tuple[int, bool]], *, close_first: bool
) -> tuple[bytes, bool]:
    """Send the pieces; return the reply, and whether the server closed first."""
    assert isinstance(server.address, tuple)
    received = server.stats.bytes_in
    with socket.create_connection(server.address, TIMEOUT) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece, wait in split(sent, splits):
            client.sendall(piece)
            received += len(piece)
            if wait:
                wait_until_read(server, received)
        if close_first:
            client.shutdown(socket.SHUT_WR)
            return receive_all(client), False
        return receive_until_quiet(client, expected_reply(server.config.mode, sent))


def receive_until_quiet(client: socket.socket, expected: tuple[bytes, bool]) -> tuple[bytes, bool]:
    """Receive the ``expected`` reply and whatever follows it at once, without closing the sending side before."""
    reply, closes = expected
    if closes:
        return receive_all(client), True
    received = b""
    while len(received) < len(reply) and (data := client.recv(65536)):
        received += data
    client.setblocking(False)
    with suppress(BlockingIOError):
        data = client.recv(65536)
        return received + data, not data
    client.settimeout(TIMEOUT)
    client.shutdown(socket.SHUT_WR)
    return received + receive_all(client), False


@settings(max_examples=50)
@given(sent=INPUTS, splits=SPLITS, close_first=st.booleans())
def test_all_engines_give_the_expected_reply(
    servers: Servers, mode: Mode, sent: bytes, splits: list[tuple[int, bool]], close_first: bool
) -> None:
    reply, closes = expected_reply(mode, sent)
    expected = dict.fromkeys(servers, (reply, closes and not close_first))
    received = {name: exchange(server, sent, splits, close_first=close_first) for name, server in servers.items()}
    assert received == expected
