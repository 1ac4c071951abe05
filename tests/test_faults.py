"""Faults: clients that behave badly, and a machine that runs short. Each is met, counted, told, and leaves nothing.

A fault is one row of a table: what a client does, and which counters may move. Beside it there is always a client
that is well, and must not feel anything.
"""

from __future__ import annotations

import ast
import asyncio
import errno
import fcntl
import gc
import logging
import os
import re
import resource
import select
import selectors
import signal
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Unpack

import pytest
import trustme
from support import (
    LOOPS,
    MAX_DELAY,
    TIMEOUT,
    ServerThread,
    engines,
    receive_all,
    receive_line,
    run,
    server_process,
    wait_until,
)

import echo_async
from echo_async import sync
from echo_async.config import EngineName, ServerOptions
from echo_async.conversation import StreamConversation
from echo_async.engines.protocol import ProtocolConnection
from echo_async.engines.registry import Registry
from echo_async.engines.streams import CHUNKS_PER_TURN
from echo_async.engines.threads import ThreadConnection
from echo_async.engines.tls_socket import TlsSocket
from echo_async.loops import LoopName, loop_factory
from echo_async.server.server import start_server

pytestmark = pytest.mark.usefixtures("no_leaks")

Start = Callable[..., AbstractContextManager[echo_async.EchoServer]]
Kind = tuple[EngineName, LoopName]

each_kind = pytest.mark.parametrize("kind", engines(), ids="-".join)


@pytest.fixture
def start(kind: Kind, certificate: Path) -> Start:
    """Starts servers of one engine on one loop; that no task is left is looked at where they are hosted."""
    engine, loop = kind

    @contextmanager
    def start(*, tls: bool = False, **options: Unpack[ServerOptions]) -> Iterator[echo_async.EchoServer]:
        options.setdefault("mode", "stream")
        options.setdefault("port", 0)
        if tls:
            options["ssl_certfile"] = str(certificate)
        with ServerThread(loop, {"engine": engine, **options}) as server:
            yield server

    return start


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


def connect(server: echo_async.EchoServer | sync.EchoServer) -> socket.socket:
    assert isinstance(server.address, tuple)
    client = socket.create_connection(server.address, TIMEOUT)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def reset(client: socket.socket) -> None:
    """Close with a reset, as a client does that crashed."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def echoes(client: socket.socket, message: bytes = b"still there\n") -> bool:
    client.sendall(message)
    return receive_line(client) == message


def fill(client: socket.socket, data: bytes = bytes(range(32, 127)) * 10 + b"\n") -> None:
    """Send until the server takes no more: it is waiting for this client to read."""
    sent = 0
    while select.select([], [client], [], 0.04)[1]:
        sent += client.send(data[sent % len(data) :])


async def in_some_turns(condition: Callable[[], bool]) -> None:
    """Let the loop turn until what is done in it, or in threads, is done."""
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen")


def lines_of(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


# What clients do


def connect_and_leave(client: socket.socket) -> None:
    client.close()


def connect_and_reset(client: socket.socket) -> None:
    reset(client)


def leave_in_mid_message(client: socket.socket) -> None:
    client.sendall(b"begun")
    client.close()


def reset_after_a_reply(client: socket.socket) -> None:
    assert echoes(client)
    reset(client)


def reset_in_mid_message(client: socket.socket) -> None:
    client.sendall(b"one\nbegun")
    assert receive_line(client) == b"one\n"
    reset(client)


def reset_while_replies_are_queued(client: socket.socket) -> None:
    fill(client)
    reset(client)


def leave_while_replies_are_queued(client: socket.socket) -> None:
    fill(client)
    client.close()


def half_close_without_a_word(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b""


def half_close_in_mid_message(client: socket.socket) -> None:
    client.sendall(b"one\nbegun")
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b"one\n"


def half_close_and_read(client: socket.socket) -> None:
    messages = b"".join(b"%d\n" % number for number in range(2000))
    client.sendall(messages)
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == messages


def dribble(client: socket.socket) -> None:
    for byte in b"one byte at a time\n":
        client.sendall(bytes([byte]))
    assert receive_line(client) == b"one byte at a time\n"


def flood_and_reset(client: socket.socket) -> None:
    client.sendall(b"x" * 399_999 + b"\n")
    reset(client)


def never_read(client: socket.socket) -> None:
    with suppress(ConnectionError):  # until the server ends it
        fill(client)
        while True:
            client.sendall(bytes(65536))


def close_the_window_and_open_it(client: socket.socket) -> None:
    """No zero window lasts as long as ``timeout_write``; what was sent before comes back in order."""
    line = bytes(range(32, 127)) * 10 + b"\n"
    sent = 0
    while select.select([], [client], [], 0.04)[1]:
        sent += client.send(line[sent % len(line) :])
    client.shutdown(socket.SHUT_WR)
    expected = line * (sent // len(line))
    received = receive_all(client)
    assert received == expected


def hear_nothing(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_RD)
    with suppress(ConnectionError):
        client.sendall(b"a message\n" * 100)
    reset(client)


def send_urgent_data(client: socket.socket) -> None:
    client.send(b"!", socket.MSG_OOB)
    assert echoes(client)


def send_what_is_too_long(client: socket.socket) -> None:
    client.sendall(b"one\n" + b"x" * 600_000)
    client.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b"one\n"


FAULTS: list[tuple[Callable[[socket.socket], None], dict[str, int]]] = [
    # what the client does              what it adds to the counters, besides accepted, messages and bytes
    (connect_and_leave, {}),
    (connect_and_reset, {}),
    (leave_in_mid_message, {"lost": 1}),
    (reset_after_a_reply, {}),
    (reset_in_mid_message, {"lost": 1}),
    (reset_while_replies_are_queued, {}),
    (leave_while_replies_are_queued, {}),
    (half_close_without_a_word, {}),
    (half_close_in_mid_message, {"lost": 1}),
    (half_close_and_read, {}),
    (dribble, {}),
    (flood_and_reset, {}),
    (never_read, {"timeouts_write": 1}),
    (close_the_window_and_open_it, {}),
    (hear_nothing, {}),
    (send_urgent_data, {}),
    (send_what_is_too_long, {"too_long": 1}),
]
MAY_LOSE = {reset_while_replies_are_queued, leave_while_replies_are_queued, flood_and_reset, never_read}  # mid-message
MAY_LOSE |= {close_the_window_and_open_it, hear_nothing}


@each_kind
@pytest.mark.parametrize(("fault", "counted"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_a_faulty_client_ends_alone(
    start: Start,
    fault: Callable[[socket.socket], None],
    counted: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    timeout = 0.3 if fault is never_read else 30
    with (
        start(timeout_write=timeout, limit_message_size=500_000, chunk_size=4096, no_access_log=True) as server,
        connect(server) as well,
    ):
        assert echoes(well)
        with connect(server) as client:
            fault(client)
        wait_until(lambda: server.stats.accepted == 2 and server.stats.active == 1)
        assert echoes(well)
        stats = {name: number for name, number in asdict(server.stats).items() if number}
        for name in ("accepted", "active", "messages", "bytes_in", "bytes_out"):
            del stats[name]
        if fault in MAY_LOSE:
            stats.pop("lost", None)
        assert stats == counted
    assert lines_of(caplog, logging.ERROR) == []
    assert len(lines_of(caplog, logging.INFO)) <= 2


@each_kind
def test_a_port_scan_is_no_line_in_the_log_and_leaves_nothing(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start() as server, connect(server) as well:
        for number in range(400):
            client = connect(server)
            reset(client) if number % 2 else client.close()
        wait_until(lambda: server.stats.accepted == 401 and server.stats.active == 1)
        assert lines_of(caplog, logging.INFO) == []
        assert echoes(well)


@each_kind
def test_a_scan_over_the_limit_is_one_line_a_second(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with start(limit_connections=1) as server, connect(server) as well:
        assert echoes(well)
        began = monotonic()
        for _ in range(400):
            with connect(server) as client, suppress(ConnectionError):
                assert receive_all(client) == b""
        assert server.stats.refused == 400
        assert 1 <= len(lines_of(caplog, logging.INFO)) <= 1 + (monotonic() - began)
        assert echoes(well)


@each_kind
def test_clients_that_came_and_went_before_they_were_accepted(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    """The queue of a listening socket is as long as it is: some have gone, some have reset, all others are served."""
    caplog.set_level(logging.DEBUG, "echo_async")
    engine, loop = kind
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    waiting = []
    for number in range(300):
        client = socket.create_connection(listener.getsockname(), TIMEOUT)
        if number % 3 == 0:
            reset(client)
            continue
        client.sendall(b"%d\n" % number)
        if number % 3 == 1:
            client.close()
        else:
            waiting.append((client, number))
    with ServerThread(loop, {"engine": engine, "fd": listener.detach()}) as server:
        for client, number in waiting:
            assert receive_all(client) == b"%d\n" % number
            client.close()
        wait_until(lambda: server.stats.accepted == 300 and server.stats.active == 0)
    assert lines_of(caplog, logging.WARNING) == []
    assert not [line for line in lines_of(caplog, logging.DEBUG) if "unix" in line or "None" in line]


@each_kind
def test_every_place_is_free_again_after_any_kind_of_end(start: Start) -> None:
    with start(limit_connections=3, limit_message_size=100, no_access_log=True) as server:
        ends = [
            connect_and_leave,
            connect_and_reset,
            leave_in_mid_message,
            half_close_in_mid_message,
            reset_after_a_reply,
        ]
        for number in range(60):
            with connect(server) as client, suppress(ConnectionError):
                ends[number % len(ends)](client)
            wait_until(lambda number=number: server.stats.accepted == number + 1)  # type: ignore[misc]
            wait_until(lambda: server.stats.active == 0)
        assert server.stats.refused == 0
        with ExitStack() as clients:
            full = [clients.enter_context(connect(server)) for _ in range(3)]
            assert all(map(echoes, full))
            with connect(server) as one_more, suppress(ConnectionError):
                assert receive_all(one_more) == b""
            assert server.stats.refused == 1


# Replies that wait


@each_kind
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_ten_mebibytes_come_back_byte_for_byte_to_a_reader_that_pauses(
    start: Start, tls: bool, trusting: ssl.SSLContext
) -> None:
    pattern = Random(5500).randbytes(10 * 1024 * 1024)
    with start(tls=tls, mode="raw", chunk_size=65536) as server, connect(server) as plain:
        client = trusting.wrap_socket(plain, server_hostname="localhost") if tls else plain
        client.setblocking(False)  # one thread does both: OpenSSL allows no two of them at one connection
        no_more_now = BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError
        unsent, received, seen = memoryview(pattern), bytearray(), -1
        while len(received) < len(pattern):
            while seen != (seen := server.stats.bytes_in):  # until the server is held up: nobody reads
                with suppress(*no_more_now):
                    while unsent:
                        unsent = unsent[client.send(unsent[:65536]) :]
                select.select([], [], [], 0.005)
            select.select([client], [], [], 0.005)  # TLS may have something that the socket has no more
            with suppress(*no_more_now):
                for _ in range(40):
                    received += client.recv(65536)
        assert received == pattern
        client.close()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("engine", ["streams", "protocol"])
def test_a_flood_from_one_client_leaves_every_other_its_turn(engine: EngineName, loop: LoopName) -> None:
    """Between two turns of the loop a client is served no more than a share, however much of its input is there."""
    flood = b"x" * 399_999 + b"\n"
    share = CHUNKS_PER_TURN * 20 if engine == "streams" else 256 * 1024

    async def main() -> None:
        running = asyncio.get_running_loop()
        options: ServerOptions = {"port": 0, "mode": "stream", "engine": engine, "no_access_log": True}
        async with echo_async.serve(**options) as server:
            received = [0]

            def turn() -> None:
                received.append(server.stats.bytes_in)
                if received[-1] < len(flood):
                    running.call_soon(turn)

            assert isinstance(server.address, tuple)
            reader, writer = await asyncio.open_connection(*server.address, limit=len(flood))
            writer.write(flood)
            turn()
            assert await reader.readline() == flood
            writer.close()
            await writer.wait_closed()
            shares = [after - before for before, after in pairwise(received)]
            assert max(shares) <= share
            assert sum(shares) == len(flood)

    run(main, loop)


class CountingHandler(logging.Handler):
    """A log that counts its lines only."""

    lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("engine", ["streams", "protocol"])
@pytest.mark.parametrize("chunk_size", [20, 65536])
def test_a_flood_of_short_messages_is_logged_in_turns(engine: EngineName, loop: LoopName, chunk_size: int) -> None:
    """A read can hold very many messages: their lines are written a share at a time."""
    flood = b"\n" * 5_000
    log = CountingHandler()
    access = logging.getLogger("echo_async.access")

    async def main() -> None:
        running = asyncio.get_running_loop()
        async with echo_async.serve(port=0, mode="stream", engine=engine, chunk_size=chunk_size) as server:
            written = [0]

            def turn() -> None:
                written.append(log.lines)
                if log.lines < len(flood):
                    running.call_soon(turn)

            assert isinstance(server.address, tuple)
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(flood)
            turn()
            assert await reader.readexactly(len(flood)) == flood
            await in_some_turns(lambda: log.lines == len(flood))
            writer.close()
            await writer.wait_closed()
            assert max(after - before for before, after in pairwise(written)) <= 1000

    level, propagate = access.level, access.propagate
    access.addHandler(log)
    access.setLevel(logging.INFO)
    access.propagate = False
    try:
        run(main, loop)
    finally:
        access.removeHandler(log)
        access.setLevel(level)
        access.propagate = propagate


# Errors of the server's own


@each_kind
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("error", [ValueError("a bug"), MemoryError()], ids=["bug", "memory"])
def test_an_error_of_the_servers_own_ends_that_client_only(
    start: Start,
    tls: bool,
    error: Exception,
    trusting: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    receive = StreamConversation.receive

    def fail(self: StreamConversation, data: bytes) -> bytes:
        if data == b"poison\n":
            raise error
        return receive(self, data)

    monkeypatch.setattr(StreamConversation, "receive", fail)
    with start(tls=tls) as server, connect(server) as one, connect(server) as two:
        well, ill = (
            trusting.wrap_socket(client, server_hostname="localhost") if tls else client for client in (one, two)
        )
        assert echoes(well)
        assert echoes(ill)
        ill.sendall(b"poison\n")
        with suppress(ConnectionError, ssl.SSLError):
            assert ill.recv(100) == b""
        wait_until(lambda: server.stats.active == 1)
        assert server.stats.failed == 1
        assert echoes(well)
        well.close()
        ill.close()
    [line] = lines_of(caplog, logging.WARNING)
    assert re.fullmatch(r"127\.0\.0\.1:\d+ closed for an error of the server's: .*(a bug|Memory).*", line)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_no_thread_for_a_client_is_that_clients_loss_only(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    certificate: Path,
    trusting: ssl.SSLContext,
    tls: bool,
) -> None:
    begin = threading.Thread.start
    refused = [RuntimeError("can't start new thread"), MemoryError(), RuntimeError("can't start new thread")]

    def start(self: threading.Thread) -> None:
        if self.name == "echo-async client" and refused:
            raise refused.pop()
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with sync.serve(port=0, ssl_certfile=str(certificate) if tls else None) as server:
        for _ in range(3):
            with connect(server) as client, suppress(ConnectionError):
                assert receive_all(client) == b""
        with connect(server) as plain:
            client = trusting.wrap_socket(plain, server_hostname="localhost") if tls else plain
            assert echoes(client)
            client.close()
        assert server.stats.refused == 3
        assert server.stats.accepted == 1
    assert lines_of(caplog, logging.WARNING) == ["cannot accept clients just now: can't start new thread"]


@each_kind
def test_clients_that_reset_with_much_unanswered_are_no_line_of_the_event_loops(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with start(no_access_log=True) as server:
        for _ in range(30):
            client = connect(server)
            client.sendall(b"hello\n")
            assert receive_line(client) == b"hello\n"
            client.sendall(b"a\n" * 8000)
            reset(client)
        wait_until(lambda: server.stats.active == 0)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_threads_that_cannot_start_are_one_error_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def no_selector() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = sorted(os.listdir("/proc/self/fd"))
    for owner, name, fake, why in (
        (threading.Thread, "start", no_thread, "can't start new thread"),
        (selectors, "DefaultSelector", no_selector, "too many open files"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fake)
            with pytest.raises(echo_async.StartError, match=why):
                sync.serve(port=0)
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_default_time_out_of_the_program_is_none_for_clients() -> None:
    before = socket.getdefaulttimeout()
    with sync.serve(port=0, mode="stream") as server, connect(server) as client:
        socket.setdefaulttimeout(0.05)
        try:
            with socket.create_connection(server.address, TIMEOUT) as another:
                assert echoes(another)
                select.select([another], [], [], 0.2)  # longer than the program's default
                assert echoes(another)
        finally:
            socket.setdefaulttimeout(before)
        assert echoes(client)


def test_a_large_reply_that_gets_on_can_be_seen_to_get_on() -> None:
    """For the time-out of a client that does not read: it is for no progress at all."""
    ours, theirs = socket.socketpair()
    connection = ThreadConnection(Registry(echo_async.ServerConfig(mode="raw", no_access_log=True)), theirs, None)
    size = 8 * 1024 * 1024
    sending = threading.Thread(target=connection._send, args=[bytes(size)])
    with ours, theirs:
        sending.start()
        left = size
        while left:
            if left == size // 2:
                wait_until(lambda: connection.unsent() < size)
            left -= len(ours.recv(min(65536, left), socket.MSG_WAITALL))
        sending.join(TIMEOUT)
        assert not sending.is_alive()
    assert connection.unsent() == 0


# Errors of accept: by a fake at the call itself, where the call is ours


class FailingAccept:
    """``socket.accept`` that fails for as long as it is told to; and gives up failing before a test would hang."""

    MOST = 1000
    PAUSE = 0.02

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int = MOST) -> None:
        self.error: OSError | None = None
        self.failed = 0
        self._most = most
        for module in ("engines.acceptor", "sync.server"):
            monkeypatch.setattr(f"echo_async.{module}.ACCEPT_RETRY_DELAY", self.PAUSE)
        self._accept = socket.socket.accept
        monkeypatch.setattr(socket.socket, "accept", lambda listener: self(listener))

    def __call__(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        if self.error is not None and self.failed < self._most:
            self.failed += 1
            raise self.error
        return self._accept(listener)

    def begin(self, number: int) -> None:
        self.failed = 0
        self.error = OSError(number, os.strerror(number))

    def end(self) -> None:
        self.error = None


OUR_ACCEPT = [(kind, tls) for kind in engines() for tls in (False, True) if tls or kind[0] == "threads"]
each_accept_of_ours = pytest.mark.parametrize(
    ("kind", "tls"), OUR_ACCEPT, ids=["-".join(kind) + ("-tls" if tls else "") for kind, tls in OUR_ACCEPT]
)
SHORT_OF = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
LASTING = [*SHORT_OF, errno.EPERM, errno.EINVAL]
PASSING = [errno.ECONNABORTED, errno.EPROTO, errno.EPERM]


@each_accept_of_ours
@pytest.mark.parametrize("number", LASTING, ids=errno.errorcode.get)
def test_accept_that_fails_is_tried_again_after_a_pause(
    start: Start,
    tls: bool,
    number: int,
    trusting: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accept = FailingAccept(monkeypatch)
    with start(tls=tls) as server:
        began = monotonic()
        accept.begin(number)
        with connect(server) as plain:
            wait_until(lambda: accept.failed >= 3)
            assert accept.failed <= 4 + (monotonic() - began) / accept.PAUSE  # no busy waiting
            accept.end()
            ended = monotonic()
            client = trusting.wrap_socket(plain, server_hostname="localhost") if tls else plain
            assert echoes(client)
            assert monotonic() - ended < MAX_DELAY
            client.close()
        said = [line for line in lines_of(caplog, logging.WARNING) if "cannot accept" in line]
        assert 1 <= len(said) <= 1 + (monotonic() - began)
        assert os.strerror(number).lower() in said[0].lower()


@each_accept_of_ours
def test_a_client_that_is_gone_when_it_is_accepted_does_not_hold_up_the_next(
    start: Start,
    tls: bool,
    trusting: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = FailingAccept(monkeypatch, most=1)
    with start(tls=tls) as server:
        for number in PASSING:
            accept.begin(number)
            with connect(server) as plain:
                client = trusting.wrap_socket(plain, server_hostname="localhost") if tls else plain
                assert echoes(client)
                client.close()
            assert accept.failed == 1


def test_a_client_that_another_worker_took_first_does_not_hold_up_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = FailingAccept(monkeypatch, most=1)
    monkeypatch.setattr("echo_async.sync.server.ACCEPT_RETRY_DELAY", 2 * TIMEOUT)  # a pause would be seen
    with sync.serve(port=0, mode="stream") as server:
        accept.begin(errno.EAGAIN)
        with connect(server) as client:
            assert echoes(client)
        assert accept.failed == 1


@each_accept_of_ours
def test_a_stop_while_accept_fails(start: Start, tls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in LASTING:
        accept = FailingAccept(monkeypatch)
        with start(tls=tls) as server:
            began = monotonic()
            accept.begin(number)
            with connect(server):
                wait_until(lambda accept=accept: accept.failed >= 1)  # type: ignore[misc]
                server.close()
                wait_until(lambda server=server: not server.sockets)  # type: ignore[misc]
                assert accept.failed <= 4 + (monotonic() - began) / accept.PAUSE
                assert monotonic() - began < MAX_DELAY
        accept.end()


KINDS = [["--loop", "asyncio"], ["--loop", "uvloop"], ["--engine", "threads"]]


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_64_descriptors_and_200_clients(kind: list[str]) -> None:
    """Those that fit are served, the others refused and counted; nothing spins; there is room when they leave."""

    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    options = (*kind, "--mode", "stream", "--no-access-log")
    with server_process(*options, preexec_fn=few_descriptors) as server, ExitStack() as clients:
        began = monotonic()
        served = []
        for _ in range(200):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError):
                client.sendall(b"in?\n")
                if client.recv(100) == b"in?\n":
                    served.append(client)
        assert 16 <= len(served) < 64

        def cpu() -> float:
            tasks = Path(f"/proc/{server.process.pid}/task").glob("*/schedstat")
            return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

        used, waited = cpu(), monotonic()
        select.select([], [], [], 0.4)  # they wait, and it costs the server nothing
        assert cpu() - used < 0.05 * (monotonic() - waited)
        for client in served:
            assert echoes(client)
        for client in served:
            client.close()
        left = monotonic()
        again: list[socket.socket] = []
        while len(again) < len(served):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError, AssertionError):
                if echoes(client):
                    again.append(client)
        assert monotonic() - left < MAX_DELAY
        seconds = monotonic() - began
        code, log = server.stop()
    assert code == 0
    assert "Traceback" not in log
    accepted, refused = (int(re.findall(rf" {what}=(\d+)", log)[0]) for what in ("accepted", "refused"))
    assert accepted == len(served) + len(again)
    assert refused >= 200 - len(served)
    assert 1 <= len([line for line in log.splitlines() if " WARNING " in line or " ERROR " in line]) <= 1 + seconds


# Stops


@asynccontextmanager
async def serving(kind: Kind, **options: Unpack[ServerOptions]) -> AsyncIterator[echo_async.EchoServer]:
    """A server in the running loop, which its block has to close; and nothing of it is left then."""
    defaults: ServerOptions = {"engine": kind[0], "port": 0, "mode": "stream"}
    server = await echo_async.serve(**(defaults | options))
    yield server
    assert not server.is_serving()
    assert server.sockets == ()
    assert server.stats.active == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


@each_kind
@pytest.mark.parametrize("no_access_log", [True, False], ids=["quiet", "logged"])
@pytest.mark.parametrize("chunk_size", [20, 65536])
def test_a_stop_answers_all_that_had_arrived(
    kind: Kind, chunk_size: int, no_access_log: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what the server had not read yet, because it was busy with what came before; and each line is in the log."""
    caplog.set_level(logging.INFO, "echo_async")
    messages = b"sixteen letters!\n" * 5000

    async def main() -> None:
        options: ServerOptions = {"chunk_size": chunk_size, "no_access_log": no_access_log}
        loop = asyncio.get_running_loop()
        async with serving(kind, **options) as server, asyncio.timeout(TIMEOUT):
            with await asyncio.to_thread(connect, server) as client:
                client.setblocking(False)
                await loop.sock_sendall(client, b"hello\n")
                assert await loop.sock_recv(client, 6) == b"hello\n"
                sent = client.send(messages)
                while int.from_bytes(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
                    pass  # until the server's kernel has all of it
                server.close()
                client.shutdown(socket.SHUT_WR)
                client.settimeout(TIMEOUT)
                whole = sent - sent % 17
                assert await asyncio.to_thread(receive_all, client) == messages[:whole]
            await server.wait_closed()
            lines = [record for record in caplog.records if record.name == "echo_async.access"]
            assert len(lines) == (0 if no_access_log else 1 + whole // 17)

    run(main, kind[1])


@each_kind
def test_replies_that_are_sent_while_it_closes(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads nothing until its last message was answered, and its side is ended."""
    monkeypatch.setattr("echo_async.engines.streams.DRAIN_THRESHOLD", 2**40)
    messages = b"sixteen letters!\n" * 500_000
    with start(no_access_log=True, chunk_size=65536) as server, connect(server) as client:
        sending = threading.Thread(target=client.sendall, args=[messages])
        sending.start()
        if server.config.engine != "streams":  # the others read on when the client does
            assert receive_exactly(client, len(messages)) == messages
        sending.join(TIMEOUT)
        client.shutdown(socket.SHUT_WR)
        if server.config.engine == "streams":
            wait_until(lambda: server.stats.bytes_in == len(messages))
            assert receive_exactly(client, len(messages)) == messages
        assert client.recv(1) == b""
        wait_until(lambda: server.stats.active == 0)


def receive_exactly(client: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        received += client.recv(min(65536, size - len(received)))
    return bytes(received)


def not_read_from(address: object) -> int:
    """Bytes that the kernel has for the socket of this process that is connected to ``address``."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # it is no socket, or not connected
            copy = os.dup(number)
            try:
                found = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
                continue
            with found:
                if found.getpeername() == address:
                    return int.from_bytes(fcntl.ioctl(found, termios.FIONREAD, bytes(4)), sys.byteorder)
    raise AssertionError("there is none")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_stop_answers_what_waits_in_the_kernel_and_not_what_a_flood_brings_later(
    loop: LoopName, tls: bool, certificate: Path, trusting: ssl.SSLContext
) -> None:
    """The engine ``protocol``, which is given what arrives and cannot go and read it."""
    messages = b"sixteen letters!\n" * 500

    async def main() -> None:
        registry, ended = Registry(echo_async.ServerConfig(mode="stream", no_access_log=True)), asyncio.Event()
        registry.on_empty = ended.set
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        ours, theirs = socket.socketpair()
        connecting = asyncio.create_task(
            asyncio.get_running_loop().connect_accepted_socket(
                partial(ProtocolConnection, registry), theirs, ssl=context if tls else None
            )
        )
        reader, writer = await asyncio.open_connection(
            sock=ours, ssl=trusting if tls else None, server_hostname="localhost" if tls else None
        )
        await connecting
        try:
            async with asyncio.timeout(TIMEOUT):
                writer.write(b"one\n")
                assert await reader.readline() == b"one\n"
                writer.write(messages)  # which sends at once
                registry.stop()
                received = await reader.readexactly(len(messages))
                while not reader.at_eof():
                    if not writer.is_closing():
                        writer.write(messages)
                    received += await reader.read(65536)
                    registry.sweep()
            assert received.startswith(messages)
            assert len(received) % 17 == 0
        finally:
            writer.transport.abort()
            registry.abort()
            async with asyncio.timeout(TIMEOUT):
                await ended.wait()

    run(main, loop)


@each_kind
def test_a_stop_answers_what_a_client_had_sent_that_reads_slowly(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind, chunk_size=65536) as server, asyncio.timeout(TIMEOUT):
            with await asyncio.to_thread(connect, server) as client:
                client.setblocking(False)
                client.send(b"sixteen letters!\n")  # so that it is accepted before it sends all that it can
                received = await asyncio.get_running_loop().sock_recv(client, 17)
                sent = 0
                with suppress(BlockingIOError):
                    while True:
                        sent += client.send(b"sixteen letters!\n" * 1000)
                        await asyncio.sleep(0)
                had_arrived = server.stats.bytes_in + not_read_from(client.getsockname())
                server.close()
                client.shutdown(socket.SHUT_WR)
                client.settimeout(TIMEOUT)
                received += await asyncio.to_thread(receive_all, client)
            await server.wait_closed()
            assert len(received) >= had_arrived - had_arrived % 17

    run(main, kind[1])


@pytest.mark.parametrize("kind", engines(), ids="-".join)
def test_a_start_that_is_cancelled_leaves_nothing(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind) as server:  # what the loop opens for itself is open then
            server.close()
            await server.wait_closed()
        before = sorted(os.listdir("/proc/self/fd"))
        for turns in range(6):
            starting = asyncio.ensure_future(start_server(echo_async.ServerConfig(engine=kind[0], port=0)))
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            with suppress(asyncio.CancelledError):
                server = await starting
                server.close()
                await server.wait_closed()
            for _ in range(10):
                await asyncio.sleep(0)
            assert sorted(os.listdir("/proc/self/fd")) == before

    run(main, kind[1])


Closing = Callable[[echo_async.EchoServer], None]


@each_kind
def test_it_can_be_closed_twice_by_many_and_waited_for_by_many(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind) as server, asyncio.timeout(TIMEOUT):
            server.close()
            await asyncio.gather(*(server.wait_closed() for _ in range(3)))
            server.close()
            server.abort()
            await server.wait_closed()
            await server.serve_forever()

    run(main, kind[1])


@each_kind
def test_one_that_was_awaited_can_be_entered_and_is_closed_with_the_block(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind) as server, asyncio.timeout(TIMEOUT), server as entered:
            assert entered is server
            assert await echo_async.echo("hello", *server.address) == "hello"

    run(main, kind[1])


@each_kind
def test_it_can_be_closed_before_its_loop_has_turned(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind) as server, asyncio.timeout(TIMEOUT):
            server.close()
            await server.wait_closed()

    run(main, kind[1])


@each_kind
def test_a_stop_from_where_a_client_is_served(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_async.engines.registry.LINGER_TIMEOUT_AT_STOP", 0.05)
    receive = StreamConversation.receive
    servers: list[echo_async.EchoServer] = []

    def stop(self: StreamConversation, data: bytes) -> bytes:
        servers[0].close()
        return receive(self, data)

    monkeypatch.setattr(StreamConversation, "receive", stop)

    async def main() -> None:
        async with serving(kind) as server, asyncio.timeout(TIMEOUT):
            servers.append(server)
            with connect(server) as client:
                client.sendall(b"stop\n")
                await server.wait_closed()
                assert receive_all(client) == b"stop\n"

    run(main, kind[1])


@each_kind
def test_a_stop_while_one_client_leaves_and_another_comes(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind, timeout_graceful_shutdown=1) as server, asyncio.timeout(TIMEOUT):
            leaving = connect(server)
            leaving.sendall(b"one\n")
            await in_some_turns(lambda: server.stats.messages == 1)
            leaving.close()
            with connect(server) as coming:
                coming.sendall(b"begun, ")
                server.close()
                await in_some_turns(lambda: all(each.fileno() == -1 for each in server.sockets))
                coming.sendall(b"finished\n")
                await in_some_turns(lambda: server.stats.active == 0 or server.stats.messages == 2)
                assert coming.recv(100) == b"begun, finished\n"
            await server.wait_closed()

    run(main, kind[1])


@each_kind
def test_a_task_that_serves_can_be_cancelled(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind) as server, asyncio.timeout(TIMEOUT):
            assert isinstance(server.address, tuple)
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(b"one\n")
            assert await reader.readline() == b"one\n"
            task = asyncio.create_task(server.serve_forever())
            await asyncio.sleep(0)
            task.cancel()
            assert await reader.read() == b""
            writer.close()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main, kind[1])


@each_kind
def test_a_stop_that_is_cancelled_ends_at_once(kind: Kind) -> None:
    async def main() -> None:
        async with serving(kind, timeout_graceful_shutdown=600) as server, asyncio.timeout(TIMEOUT):
            with connect(server) as client:
                client.sendall(b"never finished")
                await in_some_turns(lambda: server.stats.bytes_in > 0)
                server.close()
                waiting = asyncio.create_task(server.wait_closed())
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting

    run(main, kind[1])


@each_kind
@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "still in the queue"])
def test_an_abort_waits_for_nobody(kind: Kind, accepted: bool) -> None:
    async def main() -> None:
        async with serving(kind, timeout_graceful_shutdown=600) as server, asyncio.timeout(TIMEOUT):
            with connect(server) as client:
                client.sendall(b"never finished")
                await in_some_turns(lambda: not accepted or server.stats.bytes_in > 0)
                server.abort()
                await server.wait_closed()

    run(main, kind[1])


@each_kind
def test_a_stop_waits_for_a_slow_reader_as_long_as_it_may(start: Start) -> None:
    """Nobody who reads slowly, or not at all, holds it longer than ``timeout_graceful_shutdown``."""
    with (
        start(timeout_graceful_shutdown=0.2, chunk_size=65536, no_access_log=True) as server,
        connect(server) as deaf,
        connect(server) as slow,
    ):
        for client in (deaf, slow):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            fill(client)
        began = monotonic()
        server.close()
        with suppress(ConnectionError):
            while server.stats.active and slow.recv(100):
                pass
        wait_until(lambda: server.stats.active == 0)
        assert monotonic() - began < MAX_DELAY


@each_kind
def test_two_hundred_lives_in_one_process(kind: Kind) -> None:
    """Start, serve, stop, on the same port each time. What the host program has set is as it was."""
    engine, loop = kind
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]

    async def live(port: int) -> int:
        async with echo_async.serve(engine=engine, port=port) as server:
            assert isinstance(server.address, tuple)
            reader, writer = await asyncio.open_connection(*server.address)
            writer.write(b"alive\n")
            assert await reader.read() == b"alive\n"
            writer.close()
            await writer.wait_closed()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert server.port is not None
        return server.port

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        port = 0
        for _ in range(50):
            port = runner.run(live(port))
        gc.collect()
        threads, descriptors, before = threading.enumerate(), len(os.listdir("/proc/self/fd")), memory()
        for _ in range(150):
            assert runner.run(live(port)) == port
        gc.collect()
        assert set(threading.enumerate()) <= set(threads)  # of those before, trio's may have ended
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert memory() - before < 5 * 1024 * 1024
        assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers


STOPPED_WHILE_IT_STARTS = """
import os, signal, sys
from echo_async import net
from echo_async.cli.server import main

bind = net.bind

def signalled(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return bind(*arguments)

net.bind = signalled
sys.exit(main(["--port", "0", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("kind", [*KINDS, ["--workers", "2"]], ids=" ".join)
def test_a_signal_while_it_starts_is_a_stop(kind: list[str]) -> None:
    command = [sys.executable, "-c", STOPPED_WHILE_IT_STARTS, *kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0
    assert " SIGTERM: stopping\n" in done.stderr
    assert "Traceback" not in done.stderr


# TLS


class TlsClient:
    """A client that does TLS in memory, so that it can break off, or send something else, between any two bytes."""

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self.plain = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")

    def hello(self) -> bytes:
        """The first bytes of a handshake."""
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._outgoing.read()

    def handshake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                return self.plain.sendall(self._outgoing.read())
            except ssl.SSLWantReadError:
                self.plain.sendall(self._outgoing.read())
                self._incoming.write(self.plain.recv(65536))

    def record(self, data: bytes) -> bytes:
        """``data`` as it goes over the wire."""
        self._tls.write(data)
        return self._outgoing.read()

    def close_notify(self) -> bytes:
        with suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        return self._outgoing.read()


def hello_and_reset(client: TlsClient) -> None:
    client.plain.sendall(client.hello())
    reset(client.plain)


def half_a_hello(client: TlsClient) -> None:
    client.plain.sendall(client.hello()[:50])
    client.plain.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        receive_all(client.plain)


def close_notify_before_reading(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n") + client.close_notify())
    with suppress(ConnectionError):
        receive_all(client.plain)


def end_in_the_middle_of_a_record(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n")[:-5])
    client.plain.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        receive_all(client.plain)


def reset_in_the_middle_of_a_record(client: TlsClient) -> None:
    client.handshake()
    client.plain.sendall(client.record(b"a message\n"))
    assert client.plain.recv(1)
    client.plain.sendall(client.record(b"a message\n")[:-5])
    reset(client.plain)


def send_a_mebibyte_of_garbage(client: TlsClient) -> None:
    client.handshake()
    with suppress(ConnectionError):
        client.plain.sendall(os.urandom(1024 * 1024))
        receive_all(client.plain)


def send_a_record_that_was_changed(client: TlsClient) -> None:
    client.handshake()
    record = bytearray(client.record(b"a message\n"))
    record[-1] ^= 1
    client.plain.sendall(record)
    with suppress(ConnectionError):
        receive_all(client.plain)


def talk_plain_after_the_handshake(client: TlsClient) -> None:
    client.handshake()
    with suppress(ConnectionError):
        client.plain.sendall(b"Hola Server!\n" * 10)
        receive_all(client.plain)


TLS_FAULTS: list[tuple[Callable[[TlsClient], None], dict[str, int]]] = [
    (hello_and_reset, {"tls_failures": 1}),
    (half_a_hello, {"tls_failures": 1}),
    (close_notify_before_reading, {}),
    (end_in_the_middle_of_a_record, {}),
    (reset_in_the_middle_of_a_record, {}),
    (send_a_mebibyte_of_garbage, {}),
    (send_a_record_that_was_changed, {}),
    (talk_plain_after_the_handshake, {}),
]


@each_kind
def test_who_was_lost_over_tls_is_named(
    start: Start, trusting: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    with start(tls=True) as server, connect(server) as plain:
        name = f"127.0.0.1:{plain.getsockname()[1]}"
        with trusting.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"begun")
            with suppress(ssl.SSLError):  # who ends a connection owes no answer to its end
                client.unwrap()
        wait_until(lambda: server.stats.lost == 1)
    assert lines_of(caplog, logging.WARNING) == [f"{name} lost in mid-message, after 5 bytes without a newline"]


@each_kind
@pytest.mark.parametrize(("fault", "counted"), TLS_FAULTS, ids=[fault.__name__ for fault, _ in TLS_FAULTS])
def test_a_faulty_client_over_tls_ends_alone(
    start: Start,
    fault: Callable[[TlsClient], None],
    counted: dict[str, int],
    trusting: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start(tls=True, no_access_log=True) as server, connect(server) as plain:
        with trusting.wrap_socket(plain, server_hostname="localhost") as well:
            assert echoes(well)
            with connect(server) as client:
                fault(TlsClient(client, trusting))
            wait_until(lambda: server.stats.active == 1 and server.stats.tls_failures == counted.get("tls_failures", 0))
            assert echoes(well)
        stats = {name: number for name, number in asdict(server.stats).items() if number}
        for name in ("accepted", "active", "messages", "bytes_in", "bytes_out"):
            stats.pop(name, None)
        assert stats == counted
    assert lines_of(caplog, logging.ERROR) == []
    assert len(lines_of(caplog, logging.INFO)) <= 1


@each_kind
@pytest.mark.parametrize("said", [0, 50, None], ids=["nothing", "half a hello", "a hello"])
def test_a_stop_in_the_middle_of_a_handshake(start: Start, said: int | None, trusting: ssl.SSLContext) -> None:
    with start(tls=True, timeout_graceful_shutdown=600) as server, connect(server) as client:
        client.sendall(TlsClient(client, trusting).hello()[:said])
        wait_until(lambda: not select.select([server.sockets[0]], [], [], 0)[0])  # it is accepted
        if said is None:
            assert client.recv(1)  # the server has answered the hello
        began = monotonic()
        server.close()
        with suppress(ConnectionError):
            receive_all(client)
        assert monotonic() - began < MAX_DELAY
    assert server.stats.tls_failures == 1
    assert server.stats.accepted == 0


@each_kind
def test_a_stop_does_not_wait_for_the_close_notify_of_a_client(
    start: Start, trusting: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echo_async.engines.registry.LINGER_TIMEOUT_AT_STOP", 0.05)
    with start(tls=True, timeout_graceful_shutdown=1) as server, connect(server) as plain:
        client = TlsClient(plain, trusting)
        client.handshake()
        plain.sendall(client.record(b"a message\n"))
        wait_until(lambda: server.stats.messages == 1)
        began = monotonic()
        server.close()
        wait_until(lambda: server.stats.active == 0 and not server.sockets)
        assert monotonic() - began < MAX_DELAY


@each_kind
def test_failed_handshakes_give_their_places_back(start: Start, trusting: ssl.SSLContext) -> None:
    with start(tls=True, limit_connections=2) as server:
        for number in range(20):
            with connect(server) as client:
                (half_a_hello, hello_and_reset)[number % 2](TlsClient(client, trusting))
            wait_until(lambda number=number: server.stats.tls_failures == number + 1)  # type: ignore[misc]
        assert server.stats.refused == 0
        with connect(server) as one, connect(server) as two:
            secured = [trusting.wrap_socket(each, server_hostname="localhost") for each in (one, two)]
            assert all(map(echoes, secured))
            for each in secured:
                each.close()


def test_ending_the_sending_side_over_tls_never_waits_for_the_client(
    certificate: Path, trusting: ssl.SSLContext
) -> None:
    """Whoever sweeps does so for every client: one whose buffers are full must not hold it up."""
    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        ours.settimeout(TIMEOUT)
        theirs.settimeout(TIMEOUT)
        secured = TlsSocket(ours, context)
        client = TlsClient(theirs, trusting)
        shaking = threading.Thread(target=client.handshake)
        shaking.start()
        secured.handshake(TIMEOUT)
        shaking.join()
        registry = Registry(echo_async.ServerConfig(mode="stream"))
        connection = ThreadConnection(registry, secured, "a client that does not read")
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(4096), socket.MSG_DONTWAIT)
        finishing = threading.Thread(target=connection.finish)
        finishing.start()
        finishing.join(MAX_DELAY)
        waits = finishing.is_alive()
        theirs.close()
        finishing.join(TIMEOUT)
        assert not waits


def test_nobody_reads_over_tls_while_another_thread_ends_the_sending_side(
    certificate: Path, trusting: ssl.SSLContext
) -> None:
    """OpenSSL allows no two threads at one connection, and lets go of Python's lock in both calls."""
    ending, overlapped = threading.Event(), threading.Event()

    class Watched(TlsSocket):
        def recv(self, size: int, flags: int = 0) -> bytes:
            if ending.is_set() and not flags & socket.MSG_PEEK:
                overlapped.set()
            return super().recv(size, flags)

        def shutdown(self, how: int) -> None:
            ending.set()
            theirs.sendall(client.record(b"too late\n"))  # wakes the thread that waits for the client
            overlapped.wait(0.2)
            ending.clear()
            super().shutdown(how)

    ours, theirs = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ours, theirs:
        theirs.settimeout(TIMEOUT)
        secured, client = Watched(ours, context), TlsClient(theirs, trusting)
        shaking = threading.Thread(target=client.handshake)
        shaking.start()
        secured.handshake(TIMEOUT)
        shaking.join()
        registry = Registry(echo_async.ServerConfig(mode="stream", no_access_log=True))
        connection = ThreadConnection(registry, secured, "a client that is late")
        registry.add(connection)
        serving = threading.Thread(target=connection.run)
        serving.start()
        theirs.sendall(client.record(b"in time\n"))
        wait_until(lambda: registry.stats.messages == 1 and not connection._io_lock.locked())
        connection.stop()
        theirs.shutdown(socket.SHUT_WR)
        serving.join(TIMEOUT)
        assert not serving.is_alive()
        assert not overlapped.is_set()


# What the documentation says of these tests


def test_every_test_that_the_documentation_names_is_there() -> None:
    root = Path(__file__).parent.parent
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (root / "docs/reliability.md").read_text("utf-8"))
    assert len(named) > 75
    there = {
        (file, node.name)
        for file in {file for file, _ in named}
        for node in ast.parse((root / file).read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(named) - there == set()


def test_every_case_is_in_the_documentation_once() -> None:
    text = (Path(__file__).parent.parent / "docs/reliability.md").read_text("utf-8")
    cases = [int(number) for number in re.findall(r"^\| C(\d+) \|", text, re.MULTILINE)]
    assert cases == list(range(1, 76))
