"""Faults as clients see them: every kind, on every engine and event loop, over TCP, TLS and Unix sockets."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Unpack

import pytest
from support import (
    BACKENDS,
    TIMEOUT,
    Backend,
    ServerThread,
    StartServer,
    connect,
    fill,
    receive_all,
    receive_exactly,
    receive_line,
    reset,
    run,
    serve_in_loop,
    server_process,
    set_constant,
    wait_for,
    wait_in_loop,
)

import echo_async
from echo_async import sync
from echo_async.config import Mode, ServerOptions
from echo_async.testing import HostedServer
from echo_async.wire.faults import KINDS, FaultSchedule

MESSAGE = b"Hola Server!\n"
CORRUPTED = b"Hola!Server!\n"  # with SEED
GARBAGE = b")\xb2\xcc\n"  # with SEED
SEED = 1
MODES: tuple[Mode, ...] = ("message", "stream", "raw")
DATA_SEGMENTS = slice(152, 156)  # tcpi_data_segs_in of struct tcp_info: include/uapi/linux/tcp.h


class TlsClient:
    """A TLS client that sees how the TCP connection beneath ends: Python's sockets report a reset as end of input."""

    def __init__(self, connected: socket.socket, context: ssl.SSLContext) -> None:
        self._socket = connected
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._call(self._tls.do_handshake)

    def _call(self, method: Callable[..., Any], *args: object) -> Any:
        while True:
            try:
                result = method(*args)
            except ssl.SSLWantReadError:
                self._flush()
                data = self._socket.recv(65536)
                if not data:  # not written to the BIO, which would end the sending side as well
                    raise EOFError from None
                self._incoming.write(data)
            else:
                self._flush()
                return result

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._socket.sendall(data)

    def sendall(self, data: bytes) -> None:
        self._call(self._tls.write, data)

    def recv(self, size: int) -> bytes:
        try:
            return bytes(self._call(self._tls.read, size))
        except (ssl.SSLZeroReturnError, EOFError):
            return b""

    def settimeout(self, seconds: float) -> None:
        self._socket.settimeout(seconds)

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)


Client = socket.socket | TlsClient


class Transport:
    """Starts servers with faults on TCP, TLS or a Unix socket, and connects clients to them."""

    def __init__(self, name: str, start: StartServer, path: Path, context: ssl.SSLContext) -> None:
        self.name = name
        self._start, self._path = start, str(path / "echo.sock")
        self._context = context if name == "tls" else None

    def serve(self, **options: Unpack[ServerOptions]) -> AbstractContextManager[echo_async.EchoServer]:
        if self.name == "unix":
            options["uds"] = self._path
        return self._start(tls=self.name == "tls", mode=options.pop("mode", "stream"), fault_seed=SEED, **options)

    @contextmanager
    def connect(self, server: echo_async.EchoServer) -> Iterator[Client]:
        with connect(server) as connected:
            yield connected if self._context is None else TlsClient(connected, self._context)


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
def transport(
    request: pytest.FixtureRequest, start_server: StartServer, tmp_path: Path, client_context: ssl.SSLContext
) -> Transport:
    return Transport(request.param, start_server, tmp_path, client_context)


def receive_to_end(client: Client) -> tuple[bytes, str]:
    """Read until the connection ends; return what was received, and how it ended."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        return received, "reset"
    return received, "closed"


def connect_and_receive(server: echo_async.EchoServer) -> tuple[bytes, str]:
    try:
        with connect(server) as client:
            return receive_to_end(client)
    except ConnectionResetError:  # before the socket has its options
        return b"", "reset"


# Every kind


class Case(NamedTuple):
    """A fault, what a client receives for one message in ``message`` mode, and how the connection ends."""

    fault: str
    received: bytes = MESSAGE
    end: str = "closed"
    seconds: float = 0.0  # that it takes at least; a timer of uvloop can be 1 ms early


CASES = [
    Case("delay=0.05", seconds=0.045),
    Case("delay=0.03..0.05", seconds=0.025),
    Case("rate=200", seconds=0.06),
    Case("slice=1"),
    Case("slice=2..5,rate=1000", seconds=0.008),
    Case("corrupt", CORRUPTED),
    Case("duplicate", 2 * MESSAGE),
    Case("slice=5,interval=0.03", seconds=0.055),
    Case("duplicate,repeat=3", 3 * MESSAGE),
    Case("garbage=4", GARBAGE),
    Case("close", b""),
    Case("close=5", MESSAGE[:5]),
    Case("close=13"),
    Case("close=14"),
    Case("reset", b"", "reset"),
    Case("reset=5", MESSAGE[:5], "reset"),
    Case("half-close", b""),
    Case("half-close=5", MESSAGE[:5]),
    Case("duplicate,delay=0.02,close=20", (2 * MESSAGE)[:20], seconds=0.015),
    Case("none"),
]


@each_transport
def test_fault_is_observed_by_a_client(transport: Transport) -> None:
    for case in CASES:
        with transport.serve(fault=case.fault, mode="message") as server:
            assert_observed(case, transport, server)


def assert_observed(case: Case, transport: Transport, server: echo_async.EchoServer) -> None:
    with transport.connect(server) as client:
        started = monotonic()
        client.sendall(MESSAGE)
        received, end = receive_to_end(client)
        seconds = monotonic() - started
    assert received == case.received
    if end != case.end:  # a Unix socket has no reset (unix(7)): it is just closed
        assert (end, case.end, transport.name) == ("closed", "reset", "unix")
    assert seconds >= case.seconds
    parts = [part.partition("=")[0] for part in case.fault.split(",") if part not in ("none", "close=14")]
    kinds = [kind for kind in parts if kind in KINDS]
    wait_for(server, active=0)
    assert server.stats.faults == dict.fromkeys(kinds, 1)
    assert (server.stats.accepted, server.stats.messages) == (1, 1)
    assert (server.stats.bytes_in, server.stats.bytes_out) == (len(MESSAGE), len(received))


@each_transport
def test_refuse_resets_before_anything_is_read(transport: Transport) -> None:
    with transport.serve(fault="refuse") as server:
        for _ in range(3):
            assert connect_and_receive(server) == (b"", "closed" if transport.name == "unix" else "reset")
        wait_for(server, faults={"refuse": 3})
        assert (server.stats.accepted, server.stats.active, server.stats.refused) == (0, 0, 0)


@each_transport
def test_drop_reads_messages_and_answers_none(transport: Transport) -> None:
    for mode in MODES:
        with transport.serve(fault="drop", mode=mode) as server, transport.connect(server) as client:
            client.sendall(101 * MESSAGE)
            wait_for(server, bytes_in=101 * len(MESSAGE), faults={"drop": 1})
            assert (server.stats.active, server.stats.bytes_out) == (1, 0)
            client.shutdown(socket.SHUT_WR)
            assert receive_to_end(client) == (b"", "closed")


@pytest.mark.parametrize(("size", "mode"), [(0, "message"), (5, "stream"), (5, "raw")])
def test_stall_sends_and_reads_nothing_more(size: int, mode: Any, start_server: StartServer) -> None:
    with start_server(fault=f"stall={size}", mode=mode) as server, connect(server) as client:
        if size:
            client.sendall(MESSAGE)
            assert receive_exactly(client, size) == MESSAGE[:size]
        wait_for(server, faults={"stall": 1})
        sent = fill(client)  # which ends when the server reads no more
        assert sent > 10_000
        assert server.stats.bytes_in <= len(MESSAGE)
        assert (server.stats.active, server.stats.bytes_out) == (1, size)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)


@each_transport
def test_half_close_still_reads(transport: Transport) -> None:
    with transport.serve(fault="half-close=5") as server, transport.connect(server) as client:
        client.sendall(MESSAGE)
        assert receive_to_end(client) == (MESSAGE[:5], "closed")
        client.sendall(100 * MESSAGE)
        wait_for(server, bytes_in=101 * len(MESSAGE))
        assert (server.stats.active, server.stats.messages, server.stats.bytes_out) == (1, 101, 5)


@each_transport
def test_after_messages_the_fault_begins(transport: Transport) -> None:
    cases = {"reset": (b"", "reset"), "close=5": (MESSAGE[:5], "closed"), "duplicate,close=26": (2 * MESSAGE, "closed")}
    for fault, (received, end) in cases.items():
        with transport.serve(fault=f"{fault},after=3") as server, transport.connect(server) as client:
            client.sendall(5 * MESSAGE)
            expected = end if transport.name != "unix" else "closed"
            assert receive_to_end(client) == (3 * MESSAGE + received, expected)


def test_stall_after_messages_reads_nothing_more(start_server: StartServer) -> None:
    with start_server(fault="stall,after=3", mode="stream") as server, connect(server) as client:
        client.sendall(3 * MESSAGE)
        assert receive_exactly(client, 3 * len(MESSAGE)) == 3 * MESSAGE
        wait_for(server, faults={"stall": 1})
        fill(client)
        assert (server.stats.active, server.stats.messages, server.stats.bytes_out) == (1, 3, 3 * len(MESSAGE))


@each_transport
@pytest.mark.parametrize(
    ("fault", "received", "end"),
    [
        ("close=0.1s", MESSAGE, "closed"),
        ("reset=0.1s", MESSAGE, "reset"),
        ("half-close=0.1s", MESSAGE, "closed"),
        ("close=0.1s,delay=3600", b"", "closed"),
        ("reset=0.1s,delay=3600", b"", "reset"),
        ("half-close=0.1s,rate=1", None, "closed"),
    ],
)
def test_end_at_a_time_is_after_the_acceptance(
    fault: str, received: bytes | None, end: str, transport: Transport
) -> None:
    started = monotonic()
    with transport.serve(fault=fault) as server, transport.connect(server) as client:
        client.sendall(MESSAGE)
        seen, seen_end = receive_to_end(client)
        assert monotonic() - started >= 0.095
        assert seen == received or (received is None and MESSAGE.startswith(seen))
        assert seen_end == ("closed" if transport.name == "unix" else end)
        kind = fault.partition("=")[0]
        wait_for(server, faults={kind: 1})
        if kind == "half-close":
            client.sendall(100 * MESSAGE)
            wait_for(server, bytes_in=101 * len(MESSAGE))
            assert (server.stats.active, server.stats.bytes_out) == (1, len(seen))
    assert server.stats.active == 0


@each_transport
@pytest.mark.parametrize("more", ["", ",delay=3600"])
def test_stall_at_a_time_reads_nothing_more(more: str, transport: Transport) -> None:
    with transport.serve(fault=f"stall=0.1s{more}", timeout_idle=0.5) as server, transport.connect(server) as client:
        client.sendall(MESSAGE)
        wait_for(server, faults={"stall": 1})
        with suppress(ConnectionError):
            client.sendall(100 * MESSAGE)
        assert server.stats.bytes_in == len(MESSAGE)
        assert receive_to_end(client)[0] == (b"" if more else MESSAGE)
        wait_for(server, timeouts_idle=1)


def test_reset_at_a_time_ends_a_peer_that_does_not_read(start_server: StartServer) -> None:
    with start_server(fault="reset=0.3s", mode="raw", chunk_size=65536) as server, connect(server) as client:
        _send(client, bytes(100_000), repeat=True)
        wait_for(server, active=0)
        assert server.stats.failed == 0


def test_connection_that_ends_before_its_time_leaves_nothing(backend: Backend, no_leaks: None) -> None:
    async def main() -> None:
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

    run(main, backend.loop)


@pytest.mark.parametrize("size", [50_000, 300_000])
def test_reset_arrives_after_all_bytes_before_it(size: int, start_server: StartServer) -> None:
    with start_server(fault=f"reset={size}", mode="raw") as server, connect(server) as client:
        sender = threading.Thread(target=_send, args=(client, bytes(size)), daemon=True)
        sender.start()
        received, end = receive_to_end(client)
        sender.join(TIMEOUT)
    assert (len(received), end) == (size, "reset")


def _send(client: socket.socket, data: bytes, *, repeat: bool = False) -> None:
    """Send data; if ``repeat`` is true, until the server resets the connection."""
    with suppress(ConnectionError):
        client.sendall(data)
        while repeat:
            client.sendall(data)


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


def test_rate_delays_a_long_reply_in_proportion(start_server: StartServer) -> None:
    """It is 50 kB at 200 kB/s; how much longer it takes depends on the machine (``make soak`` limits it)."""
    message = bytes(49_999).replace(b"\0", b"x") + b"\n"
    with start_server(fault="rate=200000", mode="stream") as server, connect(server) as client:
        started = monotonic()
        client.sendall(message)
        assert receive_line(client, len(message)) == message
        assert monotonic() - started >= 0.24


# Which connections


def test_retry_succeeds_at_the_third_connection(start_server: StartServer) -> None:
    for _ in range(3):
        with start_server(fault_sequence=["reset", "reset", None]) as server:
            attempts = 0
            while True:
                attempts += 1
                with connect(server) as client, suppress(ConnectionResetError):
                    client.sendall(MESSAGE)
                    assert receive_all(client) == MESSAGE
                    break
            assert attempts == 3
            assert server.stats.faults == {"reset": 2}


@pytest.mark.parametrize("seed", [7, 8])
def test_seed_gives_the_same_faults_on_every_backend(seed: int, start_server: StartServer) -> None:
    expected = FaultSchedule("close,p=0.1", None, seed)
    with start_server(fault="close,p=0.1", fault_seed=seed) as server:
        for number in range(1, 201):
            with connect(server) as client:
                client.sendall(b"\n")
                assert (client.recv(1) == b"") is (expected.next_plan() is not None), f"connection {number}"


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
        code, log = server.stop()
    assert code == 0
    dropped = replies.count(b"")
    assert dropped in (1, 2)  # one worker may have accepted all of them
    assert f" fault_drop={dropped} ended_" in log
    assert log.count(" fault injected: drop\n") == dropped


# no-accept


@pytest.mark.parametrize("host", ["::", ["127.0.0.1", "127.0.0.2", "::1"]], ids=str)
def test_no_accept_lets_no_connection_complete(host: Any, backend: Backend, no_leaks: None) -> None:
    async def connect(address: tuple[str, int]) -> None:
        await asyncio.open_connection(*address)

    async def main() -> None:
        async with serve_in_loop(backend, host=host, fault="no-accept") as server:
            addresses = [address for address in server.addresses if not isinstance(address, str)]
            attempts = [asyncio.create_task(connect(address)) for address in addresses for _ in range(20)]
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

    run(main, backend.loop)


def test_no_accept_on_a_unix_socket_blocks_connect(start_server: StartServer, tmp_path: Path) -> None:
    options: ServerOptions = {"fault": "no-accept", "uds": str(tmp_path / "echo.sock")}
    with start_server(**options) as server, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0.1)
        with pytest.raises((TimeoutError, BlockingIOError)):  # EAGAIN: a timeout makes the socket nonblocking
            client.connect(str(server.address))


def test_no_accept_with_workers_and_tls(certificate: Path) -> None:
    arguments = ["--workers", "2", "--fault", "no-accept", "--ssl-certfile", str(certificate)]
    with server_process(*arguments) as server:
        with pytest.raises(TimeoutError):
            socket.create_connection(server.address, 0.1)
        assert server.stop()[0] == 0


@pytest.mark.parametrize("connect", [echo_async.sync.connect, echo_async.connect])
def test_clients_time_out_at_the_black_hole(connect: Any, black_hole_address: tuple[str, int]) -> None:
    async def main() -> None:
        result = connect(*black_hole_address, connect_timeout=0.1)
        if not isinstance(result, echo_async.sync.EchoClient):
            await result

    with pytest.raises(echo_async.ConnectTimeout):
        asyncio.run(main())


def test_handle_echo_refuses_faults() -> None:
    async def main() -> None:
        errors: list[Exception] = []

        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                echo_async.handle_echo(reader, writer, fault="drop")
            except echo_async.ConfigError as error:
                errors.append(error)

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        [error] = errors
        assert str(error) == "handle_echo has neither faults nor identify mode; use echo_async.serve"

    asyncio.run(main())


# Limits, timeouts, logs


def test_injected_fault_is_one_log_line(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async.server")
    with start_server(fault="delay=0,duplicate", fault_seed=5, mode="stream") as server, connect(server) as client:
        for _ in range(3):
            client.sendall(MESSAGE)
            assert receive_exactly(client, 2 * len(MESSAGE)) == 2 * MESSAGE
        peer = f"127.0.0.1:{client.getsockname()[1]}"
    lines = [line for line in caplog.messages if "fault" in line]
    assert lines == [
        "faults configured: delay=0,duplicate, seed 5",
        f"{peer} fault injected: delay=0",
        f"{peer} fault injected: duplicate",
    ]


def test_answered_messages_are_logged(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async.access")
    with start_server(fault="slice=5", mode="stream") as server, connect(server) as client:
        client.sendall(b"one\ntwo\n")
        assert receive_exactly(client, 8) == b"one\ntwo\n"
    assert [line.partition(" ")[2] for line in caplog.messages] == ["4 bytes: one", "4 bytes: two"]


def test_idle_timeout_ends_a_silent_connection(start_server: StartServer) -> None:
    faults = {"stall": b"", "stall=5": MESSAGE[:5], "drop": b"", "half-close": b""}
    with (
        start_server(fault_sequence=list(faults), mode="stream", timeout_idle=0.3) as server,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(connect(server)) for _ in faults]
        for client in clients:
            client.sendall(MESSAGE)
        assert sorted(receive_to_end(client)[0] for client in clients) == sorted(faults.values())
        wait_for(server, timeouts_idle=len(faults))
        for client in clients:
            client.close()
        wait_for(server, active=0)


def test_delay_longer_than_the_timeouts_does_not_time_out(start_server: StartServer) -> None:
    # A client on a busy machine has to send within the timeouts.
    options: ServerOptions = {"timeout_idle": 0.5, "timeout_message": 0.5, "timeout_write": 0.5}
    with start_server(fault="delay=0.8", mode="stream", **options) as server, connect(server) as client:
        client.sendall(MESSAGE + b"incomplete")
        assert receive_line(client) == MESSAGE
        client.sendall(b"\n")
        assert receive_line(client) == b"incomplete\n"
        stats = server.stats
    assert (stats.timeouts_idle, stats.timeouts_message, stats.timeouts_write) == (0, 0, 0)


def test_write_timeout_ends_a_peer_that_does_not_read(start_server: StartServer) -> None:
    faults = ["slice=30000", "duplicate", "rate=100000000"]
    with start_server(fault_sequence=faults, mode="stream", timeout_write=0.2) as server:
        for number in range(1, len(faults) + 1):
            with connect(server) as client:
                _send(client, bytes(100_000) + b"\n", repeat=True)
                assert server.stats.timeouts_write == number
        wait_for(server, active=0)


def test_reset_of_a_peer_that_does_not_read_is_not_delayed(start_server: StartServer) -> None:
    with (
        start_server(fault="reset=100000000", mode="raw", chunk_size=65536, timeout_write=0.2) as server,
        connect(server) as client,
    ):
        _send(client, bytes(100_000), repeat=True)
        wait_for(server, active=0)


def test_stalled_connections_count_towards_the_limit(start_server: StartServer) -> None:
    with start_server(fault_sequence=["stall", "stall"], limit_connections=2) as server:
        with connect(server), connect(server):
            wait_for(server, faults={"stall": 2})
            with connect(server) as refused, suppress(ConnectionResetError):
                assert receive_all(refused) == b""
        assert server.stats.refused == 1


def test_client_reset_during_a_delay_is_no_error(start_server: StartServer) -> None:
    faults = ["delay=0.05", "delay=0.05,close", "delay=0.05,half-close", "delay=0.05,reset"]
    with start_server(fault_sequence=faults, mode="stream") as server:
        for number in range(1, len(faults) + 1):
            client = connect(server)
            client.sendall(MESSAGE)
            wait_for(server, faults={"delay": number})
            reset(client)
        wait_for(server, active=0)
        assert server.stats.failed == 0


@pytest.mark.parametrize("tls", [False, True])
def test_client_reset_before_all_is_sent_is_no_error(
    tls: bool, start_server: StartServer, client_context: ssl.SSLContext
) -> None:
    """The server waits until all bytes before its reset are sent, and the client reads none of them."""
    size = 1_000_000
    options: ServerOptions = {"fault": f"reset={size}", "mode": "raw", "chunk_size": 65536}
    with start_server(tls=tls, **options) as server, connect(server) as connected:
        client = TlsClient(connected, client_context) if tls else connected
        client.sendall(bytes(size))
        wait_for(server, bytes_out=size)
        reset(connected)
        wait_for(server, active=0)
        assert server.stats.failed == 0


def test_tls_client_that_leaves_during_a_reply_is_noticed(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """The whole reply would take 100 s. A transport drops what is sent to such a client, and asyncio logs that."""
    with start_server(tls=True, fault="rate=10", mode="stream") as server:
        with connect(server) as connected:
            client = TlsClient(connected, client_context)
            client.sendall(bytes(999) + b"\n")
            assert client.recv(1) == b"\0"  # with unread data, the close would be a reset
        wait_for(server, active=0)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


def test_message_too_long_ends_the_connection(start_server: StartServer) -> None:
    with start_server(fault="slice=3", mode="stream", limit_message_size=20) as server, connect(server) as client:
        client.sendall(MESSAGE + bytes(30))
        assert receive_to_end(client)[0] == MESSAGE
        wait_for(server, too_long=1)


# Shutdown


@each_transport
def test_stop_ends_waits(transport: Transport) -> None:
    """A delayed reply is sent at once; a silent connection is closed."""
    faults = {"delay=3600": MESSAGE, "rate=1": MESSAGE, "stall": b"", "stall=5": MESSAGE[:5], "drop": b""}
    with transport.serve(fault_sequence=list(faults)) as server, ExitStack() as stack:
        clients = []
        counted: dict[str, int] = {}
        for kind in (each.partition("=")[0] for each in faults):  # in this order
            clients.append(stack.enter_context(transport.connect(server)))
            clients[-1].sendall(MESSAGE)
            counted[kind] = counted.get(kind, 0) + 1
            wait_for(server, faults=counted)
        started = monotonic()
        server.close()
        assert [receive_to_end(client) for client in clients] == [(reply, "closed") for reply in faults.values()]
        assert monotonic() - started < 5, "the graceful shutdown takes 10 s"


def test_stop_ends_a_half_closed_connection(start_server: StartServer) -> None:
    with start_server(fault="half-close", mode="stream") as server, connect(server) as client:
        client.sendall(MESSAGE)
        assert receive_all(client) == b""
        started = monotonic()
        server.close()
        wait_for(server, active=0)
        assert monotonic() - started < 5, "the graceful shutdown takes 10 s"


def test_faulty_connections_delay_neither_others_nor_the_stop(backend: Backend, no_leaks: None) -> None:
    async def main() -> None:
        async with serve_in_loop(backend, fault_sequence=20 * ["stall", "delay=3600", "rate=1"]) as server:
            faulty = [await asyncio.open_connection(*server.address) for _ in range(60)]
            for _, writer in faulty:
                writer.write(b"Hola\n")
            await wait_in_loop(lambda: server.stats.faults == {"stall": 20, "delay": 20, "rate": 20})
            async with echo_async.connect(*server.address, timeout=2) as client:
                for number in range(50):
                    assert await client.echo(f"{number}") == f"{number}"
            server.close()
            received = await asyncio.gather(*(reader.read() for reader, _ in faulty))
            for _, writer in faulty:
                writer.close()
            await server.wait_closed()
            assert sorted(received) == 20 * [b""] + 40 * [b"Hola\n"]
            assert server.stats.bytes_out == sum(map(len, received)) + sum(len(f"{number}\n") for number in range(50))

    run(main, backend.loop)


@each_transport
def test_abort_ends_every_fault_at_once(transport: Transport) -> None:
    with transport.serve(fault_sequence=["stall", "delay=3600", "rate=1", "drop"]) as server, ExitStack() as stack:
        clients = [stack.enter_context(transport.connect(server)) for _ in range(4)]
        for client in clients:
            client.sendall(MESSAGE)
        wait_for(server, faults={"stall": 1, "delay": 1, "rate": 1, "drop": 1})
        server._loop.call_soon_threadsafe(server.abort)
        for client in clients:
            receive_to_end(client)
    assert server.stats.active == 0


def test_stop_that_times_out_leaves_no_task(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop has shortened the waits of the connection; the abort at its end does not leave the last one."""
    set_constant(monkeypatch, "MAX_WAIT_AT_END", 0.2)

    async def main() -> None:
        async with serve_in_loop(backend, fault="rate=1", timeout_graceful_shutdown=0.05) as server:
            _, writer = await asyncio.open_connection(*server.address)
            writer.write(MESSAGE)
            await wait_in_loop(lambda: server.stats.faults == {"rate": 1})
            server.close()
            await server.wait_closed()
            assert server.stats.bytes_out < len(MESSAGE)
            writer.close()

    run(main, backend.loop)


# What libraries report, as docs/faults.md lists it


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("close", asyncio.IncompleteReadError),
        ("half-close=5", asyncio.IncompleteReadError),
        ("reset", ConnectionResetError),
        ("refuse", ConnectionResetError),
        ("stall", TimeoutError),
        ("drop", TimeoutError),
        ("delay=3600", TimeoutError),
    ],
)
def test_asyncio_client_raises_the_documented_error(fault: str, error: type[Exception]) -> None:
    async def main(address: tuple[str, int]) -> None:
        async with asyncio.timeout(0.1 if error is TimeoutError else TIMEOUT):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(MESSAGE)
                await reader.readuntil(b"\n")
            finally:
                writer.close()

    with HostedServer(fault=fault) as server, pytest.raises(error):
        asyncio.run(main(server.address))


@pytest.mark.parametrize(
    ("fault", "errors"),
    [
        ("close", echo_async.ReplyLost),
        ("half-close", echo_async.ReplyLost),
        ("reset", echo_async.ReplyLost),
        ("refuse", (echo_async.ReplyLost, echo_async.ConnectError)),
        ("stall", echo_async.ReplyLate),
        ("drop", echo_async.ReplyLate),
        ("delay=3600", echo_async.ReplyLate),
        ("corrupt", echo_async.ReplyDifferent),
        ("duplicate", echo_async.ReplyDifferent),
    ],
)
def test_echo_client_raises_the_documented_error(fault: str, errors: Any) -> None:
    timeout = 0.1 if errors is echo_async.ReplyLate else TIMEOUT

    def echo(address: tuple[str, int]) -> None:
        with sync.connect(*address, timeout=timeout) as client:
            client.echo("Hola Server!")

    with HostedServer(fault=fault) as server, pytest.raises(errors):
        echo(server.address)


def test_tls_socket_sees_a_reset_as_error_or_end_of_input() -> None:
    with HostedServer(tls=True, fault="reset=5") as server:
        assert server.client_context is not None
        plain = socket.create_connection(server.address, TIMEOUT)
        with server.client_context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(MESSAGE)
            assert client.recv(100) == b"Hola "
            with suppress(ConnectionResetError):  # depends on when the reset arrives
                assert client.recv(100) == b""


@pytest.mark.parametrize("is_sending", [False, True])
def test_refuse_on_a_unix_socket_is_seen_as_documented(is_sending: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    with HostedServer(uds=path, fault="refuse"), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        assert select.select([client], [], [], TIMEOUT)[0]  # readable at its end
        if is_sending:
            with pytest.raises(BrokenPipeError):
                client.sendall(MESSAGE)
        else:
            assert client.recv(100) == b""


def test_stalled_connection_that_is_lost_ends(backend: Backend, tmp_path: Path) -> None:
    """What the kernel has no room for tells the transport that the client is gone."""
    if backend.engine == "threads":
        pytest.skip("a thread has sent everything before it stalls")
    path = str(tmp_path / "echo.sock")
    size = 25_000  # of a message: a transport accepts another one below 64 KiB
    options: ServerOptions = {"engine": backend.engine, "uds": path, "fault": f"stall={10 * size}", "mode": "stream"}
    with (
        ServerThread(backend.loop, options) as server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(path)
        client.sendall(10 * (b"a" * (size - 1) + b"\n"))
        wait_for(server, faults={"stall": 1})
        client.close()
        wait_for(server, active=0)
