"""What only the blocking client has: a caller that blocks it, and messages that use it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
from support import run_process

from echo_async import sync
from echo_async.pytest_plugin import MakeEchoServer

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_stream_slow_caller_does_not_cause_timeout(faulty_server: MakeEchoServer) -> None:
    """Neither a caller that is slow to send nor one that is slow to take replies."""
    server = faulty_server(chunk_size=65_536)
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


def test_stream_source_can_use_client() -> None:
    with sync.serve(port=0, mode="stream") as server, sync.connect(*server.address) as client:

        def messages() -> Iterator[str]:
            yield from "abc"
            assert client.echo("end") == "end"

        assert list(client.stream(messages())) == ["a", "b", "c"]


def test_client_leaves_no_warning() -> None:
    code = """
from echo_async import sync
with sync.serve(port=0) as server:
    with sync.connect(*server.address) as client:
        assert [client.echo(str(number)) for number in range(5)] == list("01234")
        assert list(client.stream("abc"[at] for at in range(3))) == list("abc")
    assert sync.echo(b"once", *server.address) == b"once"
try:
    sync.echo("Hola", port=1)
except ConnectionError as error:
    print(type(error).__name__)
"""
    done = run_process([sys.executable, "-X", "dev", "-W", "error", "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (0, "ConnectError\n", "")
