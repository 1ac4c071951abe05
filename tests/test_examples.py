"""The servers in ``examples/``: plain as they are, they answer as the exercise demands."""

from __future__ import annotations

import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import TIMEOUT, ServerProcess, command_process, receive_all, receive_line

from echo_async import sync

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVERS = ["threads", "start_server", "protocol"]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with command_process([sys.executable, str(EXAMPLES / f"{request.param}.py"), "0"]) as server:
        yield server
        code, log = server.stop(signal.SIGINT)
        assert (code, log) == (0, "")


MESSAGES = [
    b"Hola Server!\n",
    "dos ñ 😀\n".encode(),
    b"\n",
    b"\x00\xff\r\x1b\n",
    b"x" * 20 + b"\n",
    b"y" * 500_000 + b"\n",
]


@pytest.mark.parametrize("message", MESSAGES, ids=["default", "utf-8", "empty", "binary", "over-chunk", "large"])
def test_example_message_returns_the_same_bytes(server: ServerProcess, message: bytes) -> None:
    assert sync.echo(message, *server.address) == message


def test_example_bytes_after_newline_are_discarded(server: ServerProcess) -> None:
    with server.connect() as client:
        client.sendall(b"one\ntwo\n" + b"z" * 100_000)
        assert receive_line(client) == b"one\n"
        client.sendall(b"three\n")
        assert receive_all(client) == b""


def test_example_eof_without_newline_gets_no_reply(server: ServerProcess) -> None:
    with server.connect() as client:
        client.sendall(b"no newline")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b""


def test_example_silent_client_delays_no_other(server: ServerProcess) -> None:
    with server.connect() as silent:
        silent.sendall(b"begun")
        assert sync.echo("other", *server.address) == "other"
        silent.sendall(b" and finished\n")
        assert receive_line(silent) == b"begun and finished\n"


def test_example_reset_ends_that_client_only(server: ServerProcess) -> None:
    with server.connect() as client:
        client.sendall(b"begun")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert sync.echo("next", *server.address, timeout=TIMEOUT) == "next"
