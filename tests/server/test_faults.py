"""Faults as clients see them: every kind, on every engine and event loop, over TCP, TLS and Unix sockets."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import pytest
from support import (
    BACKENDS,
    TIMEOUT,
    Backend,
    StartServer,
    connect,
    fill,
    in_its_loop,
    is_echoed,
    receive_all,
    receive_exactly,
    receive_line,
    reset,
    serve_in_loop,
    server_process,
    set_constant,
    wait_for,
    wait_in_loop,
)
from tls_client import TlsClient

import echo_async
from echo_async import sync
from echo_async.config import Mode, ServerOptions
from echo_async.testing import HostedServer

MESSAGE = b"Hola Server!\n"
CORRUPTED = b"Hola \x13erver!\n"  # with SEED, as the fourth connection
GARBAGE = b"-\xc8\xc7\n"  # as the sixth
SEED = 1
DATA_SEGMENTS = slice(152, 156)  # tcpi_data_segs_in of struct tcp_info: include/uapi/linux/tcp.h


class TlsSocket:
    """Shows how the TCP connection beneath ends: Python's sockets report a reset as end of input."""

    def __init__(self, connected: socket.socket, context: ssl.SSLContext) -> None:
        self._socket, self._client = connected, TlsClient(context).handshake(connected)

    def sendall(self, data: bytes) -> None:
        self._socket.sendall(self._client.record(data))

    def recv(self, size: int) -> bytes:
        """Return all plaintext that has arrived, whatever ``size`` is."""
        plaintext = b""
        while not plaintext and not self._client.is_ended and (data := self._socket.recv(size)):
            plaintext, _ = self._client.receive(data)
        return plaintext


# Every backend over TCP; TLS where a transport and where a thread sends the records; a Unix socket, which has no reset.
TRANSPORTS = [
    *((backend, "tcp") for backend in BACKENDS),
    (BACKENDS[0], "tls"),
    (BACKENDS[-1], "tls"),
    (BACKENDS[0], "unix"),
]
each_transport = pytest.mark.parametrize(
    ("backend", "transport"), TRANSPORTS, ids=[f"{'-'.join(each)}-{name}" for each, name in TRANSPORTS], indirect=True
)


@pytest.fixture
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """What makes a server use TCP, TLS or a Unix socket."""
    kinds: dict[str, dict[str, Any]] = {"tcp": {}, "tls": {"tls": True}, "unix": {"uds": tmp_path / "echo.sock"}}
    return kinds[request.param]


@contextmanager
def connect_over(
    transport: dict[str, Any], server: echo_async.EchoServer, context: ssl.SSLContext
) -> Iterator[socket.socket | TlsSocket]:
    with connect(server) as connected:
        yield TlsSocket(connected, context) if "tls" in transport else connected


def end_over(transport: dict[str, Any], expected: str) -> str:
    """Return how a connection ends that should end as ``expected``: a Unix socket has no reset (unix(7))."""
    return "closed" if "uds" in transport else expected


def receive_to_end(client: socket.socket | TlsSocket) -> tuple[bytes, str]:
    """Read until the connection ends; return what was received, and how it ended."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        return received, "reset"
    return received, "closed"


class Case(NamedTuple):
    """A fault, what a client receives for one message in ``message`` mode, and how the connection ends."""

    fault: str
    received: bytes = MESSAGE
    end: str = "closed"
    seconds: float = 0.0  # that it takes at least; a timer of uvloop can be 1 ms early


CASES = [
    Case("delay=0.05", seconds=0.045),
    Case("rate=200", seconds=0.06),
    Case("slice=5,interval=0.03", seconds=0.055),
    Case("corrupt", CORRUPTED),
    Case("duplicate,repeat=3", 3 * MESSAGE),
    Case("garbage=4", GARBAGE),
    Case("close", b""),
    Case("close=5", MESSAGE[:5]),
    Case("reset", b"", "reset"),
    Case("reset=5", MESSAGE[:5], "reset"),
    Case("half-close", b""),
    Case("half-close=5", MESSAGE[:5]),
    Case("duplicate,delay=0.02,close=20", (2 * MESSAGE)[:20], seconds=0.015),
    Case("none"),
]
COUNTED = {"delay": 2, "rate": 1, "slice": 1, "corrupt": 1, "duplicate": 2, "garbage": 1}
COUNTED |= {"close": 3, "reset": 2, "half-close": 2}


@each_transport
def test_fault_is_observed_by_a_client(
    transport: dict[str, Any], start_server: StartServer, client_context: ssl.SSLContext
) -> None:
    faults = [case.fault for case in CASES]
    with start_server(fault_sequence=faults, fault_seed=SEED, mode="message", **transport) as server:
        for case in CASES:
            with connect_over(transport, server, client_context) as client:
                started = monotonic()
                client.sendall(MESSAGE)
                assert receive_to_end(client) == (case.received, end_over(transport, case.end))
                assert monotonic() - started >= case.seconds
        wait_for(server, active=0)
        stats = server.stats
    assert stats.faults == COUNTED
    assert (stats.accepted, stats.messages) == (len(CASES), len(CASES))
    assert stats.bytes_in == len(CASES) * len(MESSAGE)
    assert stats.bytes_out == sum(len(case.received) for case in CASES)


def test_refuse_resets_before_anything_is_read(start_server: StartServer) -> None:
    with start_server(fault="refuse") as server:
        for _ in range(3):
            with pytest.raises(ConnectionResetError), connect(server) as client:  # also before it has its options
                client.recv(1)
        wait_for(server, faults={"refuse": 3})
        assert (server.stats.accepted, server.stats.active, server.stats.refused) == (0, 0, 0)


def test_drop_reads_messages_and_answers_none(start_server: StartServer) -> None:
    modes: list[Mode] = ["message", "stream", "raw"]
    for mode in modes:
        with start_server(fault="drop", mode=mode) as server, connect(server) as client:
            client.sendall(101 * MESSAGE)
            wait_for(server, bytes_in=101 * len(MESSAGE), faults={"drop": 1})
            assert (server.stats.active, server.stats.bytes_out) == (1, 0)
            client.shutdown(socket.SHUT_WR)
            assert receive_to_end(client) == (b"", "closed")


def test_stall_sends_and_reads_nothing_more(start_server: StartServer) -> None:
    sent = 3 * MESSAGE
    stalls = {"stall": b"", "stall=5": MESSAGE[:5], "stall,after=3": sent}
    with start_server(fault_sequence=list(stalls), mode="stream") as server, ExitStack() as stack:
        for number, received in enumerate(stalls.values(), start=1):
            client = stack.enter_context(connect(server))
            client.sendall(sent)
            assert receive_exactly(client, len(received)) == received
            wait_for(server, faults={"stall": number})
            assert fill(client) > 10_000  # which ends when the server reads no more
            assert server.stats.bytes_in <= number * len(sent)
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)
        assert (server.stats.active, server.stats.bytes_out) == (3, sum(map(len, stalls.values())))


BEGIN_LATER = {
    "reset,after=3": (3 * MESSAGE, "reset"),
    "close=5,after=3": (3 * MESSAGE + MESSAGE[:5], "closed"),
    "duplicate,close=26,after=3": (5 * MESSAGE, "closed"),
    "close=0.5s": (MESSAGE, "closed"),
    "reset=0.5s": (MESSAGE, "reset"),
    "half-close=0.5s": (MESSAGE, "closed"),
    "close=0.5s,delay=3600": (b"", "closed"),
    "reset=0.5s,delay=3600": (b"", "reset"),
    "half-close=0.5s,slice=1,interval=3600": (MESSAGE[:1], "closed"),
    "stall=0.5s": (MESSAGE, "stop"),
    "stall=0.5s,delay=3600": (b"", "stop"),
}


@each_transport
def test_fault_begins_after_messages_or_at_its_time(
    transport: dict[str, Any], start_server: StartServer, client_context: ssl.SSLContext
) -> None:
    """The server reads what a client sends after a half-close at a time, and nothing after a stall."""
    with start_server(fault_sequence=list(BEGIN_LATER), mode="stream", **transport) as server, ExitStack() as stack:
        clients = {}
        for fault in BEGIN_LATER:
            started = monotonic()
            clients[fault] = stack.enter_context(connect_over(transport, server, client_context))
            clients[fault].sendall(5 * MESSAGE if "after" in fault else MESSAGE)
        for fault, (received, end) in BEGIN_LATER.items():
            if end != "stop":
                assert (fault, *receive_to_end(clients[fault])) == (fault, received, end_over(transport, end))
        wait_for(server, faults={"close": 4, "reset": 3, "half-close": 2, "stall": 2, "duplicate": 1})
        assert monotonic() - started >= 0.495
        read = server.stats.bytes_in
        *_, half_closed, stalled, silent = clients.values()
        for client in (stalled, silent, half_closed, clients["half-close=0.5s"]):
            client.sendall(100 * MESSAGE)
        wait_for(server, bytes_in=read + 200 * len(MESSAGE))
        server.close()
        assert [receive_to_end(client)[0] for client in (stalled, silent)] == [MESSAGE, b""]
        assert server.stats.bytes_out == sum(len(received) for received, _ in BEGIN_LATER.values())


@in_its_loop
async def test_connection_that_ends_before_its_time_leaves_nothing(backend: Backend, no_leaks: None) -> None:
    async with serve_in_loop(backend, fault="reset=3600s") as server:
        for _ in range(3):
            assert await echo_async.echo("Hola", *server.address) == "Hola"
        await wait_in_loop(lambda: server.stats.active == 0)
        loop: Any = asyncio.get_running_loop()
        timers = [each for each in getattr(loop, "_scheduled", []) if not each.cancelled()]
        assert len(timers) <= 2  # the sweep
        assert not [each for each in threading.enumerate() if each.name == "echo-async timer"]
        server.close()
        await server.wait_closed()


def test_reset_arrives_after_all_bytes_before_it(start_server: StartServer) -> None:
    sizes = [50_000, 300_000]
    with start_server(fault_sequence=[f"reset={size}" for size in sizes], mode="raw") as server:
        for size in sizes:
            with connect(server) as client:
                sender = threading.Thread(target=client.sendall, args=[bytes(size)], daemon=True)
                sender.start()
                received, end = receive_to_end(client)
                sender.join(TIMEOUT)
            assert (len(received), end) == (size, "reset")


def test_slices_are_packets_of_their_own(start_server: StartServer) -> None:
    """The packets are counted by the kernel; the reads depend on when this client runs, so the best of ten counts."""
    message = bytes(range(32, 131)).replace(b"\x7f", b"x") + b"\n"
    reads: list[int] = []
    with start_server(fault="slice=1", mode="stream") as server:
        while not reads or (max(reads) < 90 and len(reads) < 10):
            with connect(server) as client:
                client.sendall(message)
                pieces = [client.recv(65536)]
                while not pieces[-1].endswith(b"\n"):
                    pieces.append(client.recv(65536))
                segments = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)[DATA_SEGMENTS]
            assert b"".join(pieces) == message
            assert int.from_bytes(segments, "little") >= 90  # over 100 if the kernel sent some twice
            reads.append(len(pieces))
    assert max(reads) >= 90


def test_workers_have_faults_each() -> None:
    """Each worker counts its connections from 1, so two first connections have the fault."""
    with server_process("--workers", "2", "--fault-sequence", "drop;none", "--mode", "stream") as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(server.connect()) for _ in range(50)]
            for client in clients:
                client.sendall(MESSAGE)
            for client in clients:
                client.shutdown(socket.SHUT_WR)
            replies = [receive_all(client) for client in clients]
        log = server.stop()
    dropped = replies.count(b"")
    assert dropped in (1, 2)  # one worker may have accepted all of them
    assert f" fault_drop={dropped} ended_" in log
    assert log.count(" fault injected: drop\n") == dropped


@in_its_loop
async def test_no_accept_lets_no_connection_complete(backend: Backend, no_leaks: None) -> None:
    async with serve_in_loop(backend, host=["127.0.0.1", "::"], fault="no-accept") as server:
        addresses = [address for address in server.addresses if not isinstance(address, str)]
        attempts = [asyncio.create_task(asyncio.open_connection(*address)) for address in addresses for _ in range(20)]
        done, pending = await asyncio.wait(attempts, timeout=0.1)
        assert not done
        for attempt in pending:
            attempt.cancel()
        await asyncio.wait(pending)
        started = monotonic()
        server.close()
        await server.wait_closed()
        assert monotonic() - started < 5, "the graceful shutdown takes 10 s"
        assert (server.stats.accepted, dict(server.stats.faults)) == (0, {})


def test_no_accept_with_workers_and_tls(certificate: Path) -> None:
    arguments = ["--workers", "2", "--fault", "no-accept", "--ssl-certfile", str(certificate)]
    with server_process(*arguments) as server:
        with pytest.raises(TimeoutError):
            socket.create_connection(server.address, 0.1)
        server.stop()


def test_injected_fault_is_one_log_line(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async")
    with start_server(fault="delay=0,duplicate", fault_seed=5, mode="stream") as server, connect(server) as client:
        client.sendall(b"one\ntwo\n")
        assert receive_exactly(client, 16) == b"one\none\ntwo\ntwo\n"
        peer = f"127.0.0.1:{client.getsockname()[1]}"
    assert [line for line in caplog.messages if "fault" in line] == [
        "faults configured: delay=0,duplicate, seed 5",
        f"{peer} fault injected: delay=0",
        f"{peer} fault injected: duplicate",
    ]
    assert [line for line in caplog.messages if "bytes" in line] == [f"{peer} 4 bytes: one", f"{peer} 4 bytes: two"]


def connect_each(stack: ExitStack, server: echo_async.EchoServer, faults: Iterable[str]) -> list[socket.socket]:
    """Connect a client for each fault, which sends at once: on a busy machine, a timeout is near for the last one."""
    clients = []
    for _ in faults:
        clients.append(stack.enter_context(connect(server)))
        clients[-1].sendall(MESSAGE)
    return clients


def test_idle_timeout_ends_a_silent_connection(start_server: StartServer) -> None:
    faults = {"stall": b"", "stall=5": MESSAGE[:5], "stall=0.5s": MESSAGE, "drop": b"", "half-close": b""}
    with (
        start_server(fault_sequence=list(faults), mode="stream", timeout_idle=0.6) as server,
        ExitStack() as stack,
    ):
        clients = connect_each(stack, server, faults)
        assert [receive_to_end(client)[0] for client in clients] == list(faults.values())
        wait_for(server, timeouts_idle=len(faults))
        for client in clients:
            client.close()
        wait_for(server, active=0)


def test_delay_longer_than_the_timeouts_does_not_time_out(start_server: StartServer) -> None:
    # A client on a busy machine has to send within the timeouts.
    options: ServerOptions = {"timeout_idle": 1, "timeout_message": 1, "timeout_write": 1}
    with start_server(fault="delay=1.3", mode="stream", **options) as server, connect(server) as client:
        client.sendall(MESSAGE + b"incomplete")
        assert receive_line(client) == MESSAGE
        client.sendall(b"\n")
        server.close()  # which ends the delay
        assert receive_line(client) == b"incomplete\n"
        stats = server.stats
    assert (stats.timeouts_idle, stats.timeouts_message, stats.timeouts_write) == (0, 0, 0)


def test_peer_that_does_not_read_is_ended_in_time(start_server: StartServer) -> None:
    """By the write timeout, also if a reset is still to come, and by a reset at a time."""

    def send_until_reset(client: socket.socket) -> None:
        with suppress(ConnectionError):
            while True:
                client.sendall(bytes(100_000) + b"\n")

    faults = ["slice=30000", "duplicate", "rate=100000000", "reset=100000000", "reset=0.2s"]
    options: ServerOptions = {"mode": "stream", "chunk_size": 65536, "timeout_write": 0.3}
    with start_server(fault_sequence=faults, **options) as server, ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in faults]
        senders = [threading.Thread(target=send_until_reset, args=[each], daemon=True) for each in clients]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(TIMEOUT)
        wait_for(server, timeouts_write=4, active=0)
        assert server.stats.failed == 0


def test_client_reset_during_a_delay_is_no_error(start_server: StartServer) -> None:
    faults = ["delay=0.05", "delay=0.05,close", "delay=0.05,half-close", "delay=0.05,reset"]
    with start_server(fault_sequence=faults, mode="stream") as server, ExitStack() as stack:
        clients = connect_each(stack, server, faults)
        wait_for(server, faults={"delay": len(faults)})
        for client in clients:
            reset(client)
        wait_for(server, active=0)
        assert server.stats.failed == 0


def test_client_reset_during_a_delay_is_counted(start_server: StartServer) -> None:
    """It has sent more than is answered."""
    with start_server(mode="stream", fault="delay=0.2") as server, connect(server) as client:
        client.sendall(3 * MESSAGE)
        wait_for(server, faults={"delay": 1})
        reset(client)
        wait_for(server, active=0)
        assert server.stats.ended == {"reset": 1}


@pytest.mark.parametrize("tls", [False, True])
def test_client_reset_before_all_is_sent_is_no_error(
    tls: bool, start_server: StartServer, client_context: ssl.SSLContext
) -> None:
    """The server waits until all bytes before its reset are sent, and the client reads none of them."""
    size = 30_000_000  # more than the buffers of the kernel hold
    options: ServerOptions = {"fault": f"reset={size}", "mode": "raw", "chunk_size": 65536}
    with start_server(tls=tls, **options) as server, connect(server) as connected:
        client = TlsSocket(connected, client_context) if tls else connected
        connected.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(size))
        reset(connected)
        wait_for(server, active=0)
        assert server.stats.failed == 0


def test_tls_client_that_leaves_during_a_reply_is_noticed(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole reply would take 100 s. A transport drops what is sent to such a client, and asyncio logs that."""
    with start_server(tls=True, fault="rate=10", mode="stream") as server:
        with connect(server) as connected:
            client = TlsSocket(connected, client_context)
            client.sendall(bytes(999) + b"\n")
            assert client.recv(65536).startswith(b"\0")  # with unread data, the close would be a reset
        wait_for(server, active=0)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_message_too_long_ends_the_connection(start_server: StartServer) -> None:
    with start_server(fault="slice=3", mode="stream", limit_message_size=20) as server, connect(server) as client:
        client.sendall(MESSAGE + bytes(30))
        assert receive_to_end(client)[0] == MESSAGE
        wait_for(server, too_long=1)


@pytest.mark.parametrize("is_aborted", [False, True])
def test_stop_ends_waits(is_aborted: bool, start_server: StartServer, no_leaks: None) -> None:
    """A delayed reply is sent at once, unless the server is aborted. Until then, none of them delays another."""
    faults = {"delay=3600": MESSAGE, "rate=1": MESSAGE, "stall": b"", "stall=5": MESSAGE[:5], "drop": b""}
    faults["half-close"] = b""
    with start_server(fault_sequence=list(faults), mode="stream") as server, ExitStack() as stack:
        clients = connect_each(stack, server, faults)
        wait_for(server, faults={"delay": 1, "rate": 1, "stall": 2, "drop": 1, "half-close": 1})
        with connect(server) as healthy:
            assert all(is_echoed(healthy) for _ in range(10))
        started = monotonic()
        server._loop.call_soon_threadsafe(server.abort if is_aborted else server.close)
        ends = [receive_to_end(client) for client in clients]
        assert is_aborted or ends == [(reply, "closed") for reply in faults.values()]
        wait_for(server, active=0)
        assert monotonic() - started < 5, "the graceful shutdown takes 10 s"


@in_its_loop
async def test_stop_that_times_out_leaves_no_task(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop has shortened the waits of the connection; the abort at its end does not leave the last one."""
    set_constant(monkeypatch, "MAX_WAIT_AT_END", 0.2)
    async with serve_in_loop(backend, fault="rate=1", timeout_graceful_shutdown=0.05) as server:
        _, writer = await asyncio.open_connection(*server.address)
        writer.write(MESSAGE)
        await wait_in_loop(lambda: server.stats.faults == {"rate": 1})
        server.close()
        await server.wait_closed()
        assert server.stats.bytes_out < len(MESSAGE)
        writer.close()


# What libraries report, as docs/faults.md lists it


ERRORS: list[tuple[str, type[Exception] | None, type[Exception] | tuple[type[Exception], ...]]] = [
    # the fault, what readuntil of asyncio raises, and what our client raises
    ("close", asyncio.IncompleteReadError, echo_async.ReplyLost),
    ("half-close=5", asyncio.IncompleteReadError, echo_async.ReplyLost),
    ("reset", ConnectionResetError, echo_async.ReplyLost),
    ("refuse", ConnectionResetError, (echo_async.ReplyLost, echo_async.ConnectError)),
    ("stall", TimeoutError, echo_async.ReplyLate),
    ("drop", TimeoutError, echo_async.ReplyLate),
    ("delay=3600", TimeoutError, echo_async.ReplyLate),
    ("corrupt", None, echo_async.ReplyDifferent),
    ("duplicate", None, echo_async.ReplyDifferent),
]


async def exchange(address: tuple[str, int], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(MESSAGE)
            await reader.readuntil(b"\n")
        finally:
            writer.close()


def test_clients_raise_the_documented_error() -> None:
    for fault, error, own_error in ERRORS:
        seconds = 0.1 if error is TimeoutError else TIMEOUT
        # Not a sequence for one server: a client whose connection is refused before it sends connects once more.
        with HostedServer(fault=fault) as server:
            with pytest.raises(error) if error else nullcontext():
                asyncio.run(exchange(server.address, seconds))
            with pytest.raises(own_error), sync.connect(*server.address, timeout=seconds) as client:
                client.echo("Hola Server!")


def test_refuse_on_a_unix_socket_is_seen_as_documented(tmp_path: Path) -> None:
    with HostedServer(uds=tmp_path / "echo.sock", fault="refuse") as server:
        with connect(server) as client:
            assert client.recv(100) == b""
        with connect(server) as client:
            assert select.select([client], [], [], TIMEOUT)[0]  # readable at its end
            with pytest.raises(BrokenPipeError):
                client.sendall(MESSAGE)


def test_stalled_connection_that_is_lost_ends(start_server: StartServer, tmp_path: Path) -> None:
    """What the kernel has no room for tells a transport that the client is gone. A thread sends it before it stalls."""
    size = 25_000  # of a message: a transport accepts another one below 64 KiB
    options: ServerOptions = {"uds": tmp_path / "echo.sock", "fault": f"stall={10 * size}", "mode": "stream"}
    with start_server(**options) as server, connect(server) as client:
        if server.config.engine == "threads":
            pytest.skip("it notices the end of a client when it reads")
        client.sendall(10 * (b"a" * (size - 1) + b"\n"))
        wait_for(server, faults={"stall": 1})
        client.close()
        wait_for(server, active=0)
