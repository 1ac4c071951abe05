"""Failures to connect, and replies that are lost, late or different."""

from __future__ import annotations

import logging
import resource
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from clients import Connect, Echo, wait_disconnected
from support import MAX_DELAY, TIMEOUT, OldKernel, lines, resolve_to

import echo_async
from echo_async import sync
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_connect_refused_raises(echo: Echo, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once. So does a name of several addresses that all refuse."""
    started = time.monotonic()
    with pytest.raises(echo_async.ConnectError) as caught:
        echo("Hola", port=closed_port)
    assert str(caught.value) == (
        f"cannot connect to 127.0.0.1:{closed_port}: connection refused; is the server running?"
    )
    resolve_to(monkeypatch, ("127.0.0.1", closed_port), ("127.0.0.2", closed_port))
    with pytest.raises(echo_async.ConnectError, match=r"several\.example:5500: connection refused"):
        echo("Hola", "several.example")
    assert time.monotonic() - started < MAX_DELAY


def test_connect_missing_server_raises(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(echo_async.ConnectError, match="no such file or directory; is the server running"):
        connect(uds=tmp_path / "nobody")
    with pytest.raises(echo_async.ConnectError, match="path too long"):
        connect(uds=tmp_path / ("x" * 200))
    for host in ("does-not-exist.invalid", "a..b", "x" * 300):
        with pytest.raises(echo_async.ConnectError, match="check the host name"):
            connect(host)


@pytest.mark.parametrize("client", ["blocking", "asyncio"], indirect=True)  # uvloop opens descriptors in each run
def test_connect_without_free_descriptor_raises(connect: Connect) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(echo_async.ConnectError, match="too many open files"):
            connect(port=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_connect_that_is_not_accepted_times_out(
    connect: Connect, black_hole_address: tuple[str, int], faulty_server: MakeEchoServer, tmp_path: Path
) -> None:
    error = r"cannot connect to .*: timed out after 0\.1 s; check the address"
    with pytest.raises(echo_async.ConnectTimeout, match=error):
        connect(*black_hole_address, connect_timeout=0.1)
    path = str(tmp_path / "socket")
    faulty_server(uds=path, fault="no-accept")
    with pytest.raises(echo_async.ConnectTimeout, match=error):
        connect(uds=path, connect_timeout=0.1)


def test_connect_tries_every_address(
    echo: Echo,
    echo_server: HostedServer,
    monkeypatch: pytest.MonkeyPatch,
    black_hole_address: tuple[str, int],
    closed_port: int,
) -> None:
    """Also after one of a family that the kernel does not support, and one to which it fails to connect at once."""
    monkeypatch.setattr(socket, "socket", OldKernel)
    broadcast, closed = ("127.255.255.255", echo_server.address[1]), ("127.0.0.1", closed_port)
    resolve_to(monkeypatch, ("::1", 1), broadcast, closed, black_hole_address, echo_server.address)
    assert echo("Hola", "several.example") == "Hola"


def test_retry_waits_for_starting_server(
    echo: Echo, echo_server: HostedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(record: logging.LogRecord) -> bool:
        if "; retrying in " in record.getMessage():
            refusing.close()
        return True

    caplog.set_level(logging.DEBUG, "echo_async.client")
    monkeypatch.setattr(logging.getLogger("echo_async.client"), "filters", [start])
    with ExitStack() as refusing:
        refusing.enter_context(echo_server.refusing())
        assert echo("Hola", *echo_server.address, retry=TIMEOUT) == "Hola"


def test_retry_ends_after_its_time(echo: Echo, closed_port: int, black_hole_address: tuple[str, int]) -> None:
    started = time.monotonic()
    with pytest.raises(echo_async.ConnectError):
        echo("Hola", port=closed_port, retry=0.1)
    with pytest.raises(echo_async.ConnectTimeout):
        echo("Hola", *black_hole_address, retry=0.1, connect_timeout=0.05)
    assert 0.2 <= time.monotonic() - started < MAX_DELAY


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"port": 0}, "invalid port: 0"),
    ({"port": 65536}, "invalid port: 65536"),
    ({"port": "5500"}, "invalid port: '5500'"),
    ({"host": ""}, "invalid host: ''"),
    ({"host": "a\0b"}, "invalid host: "),
    ({"host": b"::1"}, "invalid host: b'::1' "),
    ({"uds": ""}, "invalid uds: '' "),
    ({"timeout": 0}, "invalid timeout: 0 "),
    ({"timeout": float("nan")}, "invalid timeout: nan "),
    ({"connect_timeout": -1}, "invalid connect_timeout: -1 "),
    ({"retry": float("inf")}, "invalid retry: inf "),
    ({"retry": None}, "invalid retry: None "),
    ({"server_hostname": "x"}, "server_hostname requires ssl"),
    ({"server_hostname": "a\0b", "ssl": True}, "invalid server_hostname: "),
    ({"server_hostname": ".", "ssl": True}, "invalid server_hostname: '.' "),
    ({"server_hostname": "x" * 64, "ssl": True}, "invalid server_hostname: "),
    *(
        ({"send_proxy": "v1", "proxy_source": source}, "invalid proxy_source")
        for source in ("", "192.0.2.1", "localhost:1", "192.0.2.1:65536", "::1:5", "[192.0.2.1]:-1")
    ),
    ({"proxy_source": "192.0.2.1:1"}, "proxy_source requires send_proxy"),
]


def test_connect_invalid_option_raises() -> None:
    for options, text in INVALID:
        for connect in (echo_async.connect, sync.connect):
            with pytest.raises(echo_async.ConfigError, match=text):
                connect(**options)


LOST = {
    "close": "lost before the reply: closed by the server",
    "close=5": "lost after 5 of 13 bytes of the reply: closed by the server",
    "close=12": "lost after 12 of 13 bytes of the reply: closed by the server",
    "reset": "lost before the reply: connection reset by peer",
}


def test_connection_lost_before_reply_raises_reply_lost(connect: Connect, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault_sequence=list(LOST))
    for text in LOST.values():
        with connect(*server.address) as client, pytest.raises(echo_async.ReplyLost, match=text):
            client.echo("Hola Server!")
    assert server.stats.accepted == len(LOST)  # not sent again: the connections were new


def test_connection_reset_during_send_raises_reply_lost(echo: Echo, faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        peer.receive_some()
        peer.reset()

    server = faulty_server(handler=serve)
    with pytest.raises(echo_async.ReplyLost, match=r"lost before the reply: (connection reset by peer|broken pipe)"):
        echo("x" * 10_000_000, *server.address)


def test_message_too_long_for_server_raises_reply_lost(connect: Connect, faulty_server: MakeEchoServer) -> None:
    with connect(*faulty_server(chunk_size=65_536).address) as client:
        with pytest.raises(echo_async.ReplyLost, match="does the server accept messages of 3000001 bytes"):
            client.echo("x" * 3_000_000)
        assert client.echo("x") == "x"


@pytest.mark.parametrize("part", [b"", b"lo"])
def test_lost_reply_on_reused_connection_raises(connect: Connect, faulty_server: MakeEchoServer, part: bytes) -> None:
    """The message is not sent again: part of its reply arrived, or the server had kept the connection open."""

    def serve(peer: Peer) -> None:
        for _ in range(1 if part else 3):
            peer.send(peer.receive_line())
        peer.receive_line()
        peer.send(part)

    server = faulty_server(handler=serve)
    with connect(*server.address) as client:
        for message in ("0",) if part else ("0", "1", "2"):
            assert client.echo(message) == message
        with pytest.raises(echo_async.ReplyLost, match="after 2 of 5 bytes" if part else "before the reply"):
            client.echo("lost")
        assert client.echo("3") == "3"


def test_reply_timeout_raises_reply_late(connect: Connect, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault_sequence="drop")
    with connect(*server.address, timeout=1) as client:
        started = time.monotonic()
        with pytest.raises(echo_async.ReplyLate, match=r"reply timeout: no reply from .* within 1 s"):
            client.echo("Hola")
        assert 0.99 < time.monotonic() - started < MAX_DELAY
        assert client.echo("again") == "again"
    assert server.received == [b"Hola\n", b"again\n"]
    assert server.stats.accepted == 2


def test_server_too_slow_raises_reply_late(echo: Echo, faulty_server: MakeEchoServer) -> None:
    """It does not read the message, or it sends each byte of the reply in time, but not all of them."""
    server = faulty_server(fault_sequence="stall;rate=50,slice=1")
    for size in (20_000_000, 1000):
        with pytest.raises(echo_async.ReplyLate):
            echo(b"x" * size, *server.address, timeout=0.2)


def test_timeout_restarts_for_every_reply(connect: Connect, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="delay=0.4")
    with connect(*server.address, timeout=1.5) as client:
        assert list(client.stream(["a", "b", "c", "d"])) == ["a", "b", "c", "d"]


DIFFERENT = [
    (b"Hola Sirver!\n", 6, 'reply mismatch at byte 6: received "Hola Sirver!\\n", expected "Hola Server!\\n"'),
    (b"\x1b[2J\n", 0, 'received "\\x1b[2J\\n", expected "Hola'),
    (b"\xffola\n", 0, 'received "\\xffola\\n"'),
    (b"Hola\n", 4, 'received "Hola\\n", expected'),
    (b"Hola Server! \n", 12, 'received "Hola Server! \\n", expected "Hola Server!\\n"'),
    (b"Hola Server!\nmore", 13, 'reply mismatch at byte 13: received 4 unexpected bytes "more"'),
    (b"Hola Server!" + 50_000 * b"x" + 50_001 * b"y", 50_012, "x" * 20 + "y" * 20 + '"...'),
]


def test_reply_mismatch_raises_reply_different(echo: Echo, faulty_server: MakeEchoServer) -> None:
    replies = [reply for reply, _, _ in DIFFERENT]
    server = faulty_server(reply=lambda _: replies.pop(0), mode="message")
    for reply, offset, text in DIFFERENT:
        with pytest.raises(echo_async.ReplyDifferent) as caught:
            echo("Hola Server!" if len(reply) < 100 else "Hola Server!" + 100_000 * "x", *server.address)
        assert caught.value.offset == offset
        assert text in str(caught.value)
        assert len(str(caught.value)) < 300


def test_unexpected_bytes_fail_next_reply(connect: Connect, faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        if peer.number == 1:
            peer.send(b"220 mail.example ESMTP\r\n")
        for line in lines(peer):
            peer.send(line)

    server = faulty_server(handler=serve)
    with connect(*server.address) as client:
        wait_disconnected(client)
        with pytest.raises(echo_async.ReplyDifferent, match="received 24 unexpected bytes") as caught:
            client.echo("Hola")
        assert caught.value.offset == 0
        assert client.echo("Hola") == "Hola"


def test_endless_reply_uses_bounded_memory(echo: Echo, faulty_server: MakeEchoServer) -> None:
    def serve(peer: Peer) -> None:
        peer.receive_line()
        while True:
            peer.send(b"\0" * 1_000_000)

    server = faulty_server(handler=serve)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(echo_async.ReplyDifferent):
        echo("\0" * 100_000, *server.address)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
