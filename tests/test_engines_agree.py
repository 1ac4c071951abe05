"""All engines give one answer: the same bytes, however they were split and whatever was waited for, have the same end.

The answer is worked out here in the plainest way, from the interface alone; so engines that agree on
something wrong are found too.
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

LIMIT = 40  # bytes of a message
CHUNK = 7

Servers = dict[str, echo_async.EchoServer]


@pytest.fixture(scope="module", params=["message", "stream", "raw"])
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


@pytest.fixture(scope="module")
def servers(mode: Mode) -> Iterator[Servers]:
    """A server of each engine on each loop."""
    with ExitStack() as stack:
        servers = {}
        for engine, loop in BACKENDS:
            options: ServerOptions = {"port": 0, "mode": mode, "engine": engine, "chunk_size": CHUNK}
            options |= {"limit_message_size": LIMIT, "no_access_log": True}
            servers[f"{engine} on {loop}"] = stack.enter_context(ServerThread(loop, options))
        yield servers


def answer(mode: Mode, sent: bytes) -> tuple[bytes, bool]:
    """What comes back, and whether the server closes, although the client does not."""
    if mode == "raw":
        return sent, False
    *messages, rest = sent.split(b"\n")
    reply = b""
    for message in messages:
        if len(message) + 1 > LIMIT:
            return reply, True
        reply += message + b"\n"
        if mode == "message":
            return reply, True
    return reply, len(rest) >= LIMIT  # its newline is still to come


PIECES = st.sampled_from([b"\n", b"a", b"ab\n", "ñandú 😀\n".encode(), b"\xff\x00\r", b"x" * (LIMIT - 1), b"y" * LIMIT])
SENT = st.lists(PIECES | st.binary(max_size=2 * LIMIT), max_size=8).map(b"".join)
CUTS = st.lists(st.tuples(st.integers(1, 2 * LIMIT), st.booleans()), max_size=8)


def split(sent: bytes, cuts: list[tuple[int, bool]]) -> Iterator[tuple[bytes, bool]]:
    """``sent`` in pieces; and for each, whether it is waited for until it has been read."""
    for size, wait in cuts:
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
    pytest.fail("the server does not read")


def converse(
    server: echo_async.EchoServer, sent: bytes, cuts: list[tuple[int, bool]], *, end_first: bool
) -> tuple[bytes, bool]:
    """What came back, and whether the server ended its side although the client had not."""
    assert isinstance(server.address, tuple)
    received = server.stats.bytes_in
    with socket.create_connection(server.address, TIMEOUT) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece, wait in split(sent, cuts):
            client.sendall(piece)
            received += len(piece)
            if wait:
                wait_until_read(server, received)
        if end_first:
            client.shutdown(socket.SHUT_WR)
            return receive_all(client), False
        return receive_until_quiet(client, answer(server.config.mode, sent))


def receive_until_quiet(client: socket.socket, expected: tuple[bytes, bool]) -> tuple[bytes, bool]:
    """Everything that comes, although the client does not end its side: no longer than for what is ``expected``."""
    reply, ends = expected
    if ends:
        return receive_all(client), True
    came = b""
    while len(came) < len(reply) and (data := client.recv(65536)):
        came += data
    client.setblocking(False)
    with suppress(BlockingIOError):
        data = client.recv(65536)
        return came + data, not data
    client.settimeout(TIMEOUT)
    client.shutdown(socket.SHUT_WR)
    return came + receive_all(client), False


@settings(max_examples=50)
@given(sent=SENT, cuts=CUTS, end_first=st.booleans())
def test_all_engines_give_the_expected_reply(
    servers: Servers, mode: Mode, sent: bytes, cuts: list[tuple[int, bool]], end_first: bool
) -> None:
    reply, ends = answer(mode, sent)
    expected = dict.fromkeys(servers, (reply, ends and not end_first))
    came = {name: converse(server, sent, cuts, end_first=end_first) for name, server in servers.items()}
    assert came == expected
