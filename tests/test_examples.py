"""The servers in ``examples/``: plain as they are, they answer as the exercise demands."""

from __future__ import annotations

import re
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from support import TIMEOUT, ServerProcess, command_process, receive_all, receive_line, run_process

from echo_async import sync

EXAMPLES = Path(__file__).parent.parent / "examples"
CONCURRENT = ["threads", "selector", "start_server", "protocol"]
SERVERS = ["one_client", *CONCURRENT, "udp"]


@contextmanager
def run_example(name: str) -> Iterator[ServerProcess]:
    """Run an example until the end of the block, and interrupt it: it exits without an error."""
    env = {"PYTHONDEVMODE": ""}  # which reports sockets that the end of the process closes
    with command_process([sys.executable, str(EXAMPLES / f"{name}.py"), "0"], env) as server:
        yield server
        code, log = server.stop(signal.SIGINT)
        assert (code, log) == (0, "")


@pytest.fixture(scope="module", params=["one_client", *CONCURRENT])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with run_example(request.param) as server:
        yield server


@pytest.mark.parametrize("name", ["one_client", *CONCURRENT])
def test_example_interrupted_with_a_client_is_silent(name: str) -> None:
    with run_example(name) as server, server.connect() as client:
        client.sendall(b"begun")
        if name != "one_client":
            assert sync.echo("after", *server.address) == "after"  # so the first is accepted


@pytest.mark.parametrize("name", SERVERS)
def test_example_has_at_most_fifty_lines(name: str) -> None:
    """As examples/README.md promises, which lists them in the order in which they follow from each other."""
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len([line for line in lines if line]) <= 50


def test_examples_page_lists_the_servers_in_order() -> None:
    steps = re.findall(r"^\d\. \[(\w+)\.py\]", (EXAMPLES / "README.md").read_text(), re.M)
    assert steps == SERVERS


@pytest.mark.parametrize(("before", "name"), [*pairwise(SERVERS)])
def test_example_tells_what_the_one_before_cannot(before: str, name: str) -> None:
    assert f"``{before}.py`` cannot " in (EXAMPLES / f"{name}.py").read_text()


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


@pytest.mark.parametrize("name", CONCURRENT)
def test_example_silent_client_delays_no_other(name: str) -> None:
    with run_example(name) as server, server.connect() as silent:
        silent.sendall(b"begun")
        assert sync.echo("other", *server.address) == "other"
        silent.sendall(b" and finished\n")
        assert receive_line(silent) == b"begun and finished\n"


def test_example_one_client_delays_every_other() -> None:
    with run_example("one_client") as server, server.connect() as silent, server.connect() as other:
        silent.sendall(b"begun")
        other.sendall(b"other\n")
        assert select.select([other], [], [], 0.2)[0] == []
        silent.sendall(b" and finished\n")
        assert receive_all(silent) == b"begun and finished\n"
        silent.close()
        assert receive_line(other) == b"other\n"


def test_example_reset_ends_that_client_only(server: ServerProcess) -> None:
    with server.connect() as client:
        client.sendall(b"begun")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert sync.echo("next", *server.address, timeout=TIMEOUT) == "next"


@pytest.mark.parametrize("name", ["one_client", *CONCURRENT])
def test_example_check_finds_what_the_page_tells(name: str) -> None:
    """The lesson of the ladder: only the first server serves one client at a time, and that is all that is wrong."""
    with run_example(name) as server:
        port = str(server.address[1])
        command = [sys.executable, "-m", "echo_async", "check", "--port", port, "--idle", "0.2", "--connections", "20"]
        lines = run_process([*command, "--timeout", "2" if name == "one_client" else "10"]).stdout.splitlines()
    failed = [line.split()[0] for line in lines if line.split()[1] == "failed"]
    assert failed == (["concurrent"] if name == "one_client" else [])


def test_example_udp_returns_every_datagram() -> None:
    with run_example("udp") as server:
        port = str(server.address[1])
        for size in ("0", "1", "1472", "65507"):
            command = [sys.executable, "-m", "echo_async", "client", "--udp", "--port", port, "--size", size]
            result = run_process([*command, "--count", "5", "--interval", "0"])
            assert (result.returncode, result.stderr) == (0, "")
