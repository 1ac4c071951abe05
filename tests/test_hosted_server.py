"""What a test asks ``HostedServer``, and changes while it runs: over TCP, TLS and Unix sockets."""

from __future__ import annotations

import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from time import monotonic
from typing import Any

import pytest
import support
from support import TIMEOUT, ChildProcess, is_echoed, receive_all, receive_exactly, receive_line, reset
from tls_client import TlsClient

from echo_async import ConfigError
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")


def connect(server: HostedServer) -> socket.socket:
    return support.connect(server, server.client_context)


@pytest.fixture(params=["tcp", "tls", "unix"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """What makes a server use TCP, TLS or a Unix socket."""
    if request.param == "unix":
        return {"uds": str(tmp_path / "echo.sock")}
    return {"tls": request.param == "tls"}


@contextmanager
def reconnecting(server: HostedServer, threads: int = 1) -> Iterator[None]:
    """Connect and exchange a message all the time; the server may refuse or end a connection."""
    stop, unexpected = threading.Event(), list[OSError]()

    def reconnect() -> None:
        while not stop.is_set():
            try:
                with connect(server) as client:
                    client.sendall(b"one\n")
                    client.recv(10)
            except ConnectionError:
                pass
            except OSError as error:
                unexpected.append(error)

    clients = [threading.Thread(target=reconnect, daemon=True) for _ in range(threads)]
    for thread in clients:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in clients:
            thread.join(TIMEOUT)
    assert unexpected == []


# Replies


def test_reply_is_sent_instead_of_each_echo(options: dict[str, Any]) -> None:
    """Bytes, or what a function returns: None for no reply."""

    def reply(message: bytes) -> bytes | None:
        return None if message == b"quiet\n" else message.upper()

    for given, replies in ((b"250 ok\r\n", b"250 ok\r\n" * 3), (reply, b"ONE\nTWO\n")):
        with HostedServer(reply=given, **options) as server, connect(server) as client:
            client.sendall(b"one\nquiet\ntwo\n")
            assert receive_line(client, len(replies)) == replies
            assert server.received == [b"one\n", b"quiet\n", b"two\n"]


def test_replies_end_with_the_connection(options: dict[str, Any]) -> None:
    with HostedServer(replies=[b"+OK\r\n", None, b"-ERR\r\n"], **options) as server:
        for number in (1, 2):
            with connect(server) as client:
                client.sendall(b"one\ntwo\nthree\nfour\n")
                assert receive_all(client) == b"+OK\r\n-ERR\r\n"
            server.wait_for(accepted=number, active=0)
        assert [each.end for each in server.connections] == ["server", "server"]


@pytest.mark.parametrize("fault", ["slice=1", "delay=0.01", "corrupt"])
def test_messages_after_the_last_reply_have_none(fault: str, options: dict[str, Any]) -> None:
    """Also with a fault, which takes the messages of one read one by one."""
    with HostedServer(replies=[b"1\n"], fault=fault, **options) as server:
        with connect(server) as client:
            client.sendall(b"one\ntwo\nthree\n")
            assert len(receive_all(client)) == 2
        server.wait_for(active=0)
        assert (server.stats.failed, server.stats.ended) == (0, {"closed": 1})


def test_reply_in_raw_mode_is_sent_for_each_read() -> None:
    with HostedServer(reply=b"ok\n", mode="raw") as server, connect(server) as client:
        client.sendall(b"one\ntwo\n")
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == b"ok\n"
        assert server.received == [b"one\ntwo\n"]


def test_faults_and_limits_apply_to_greeting_and_replies() -> None:
    with HostedServer(greeting=b"220 ready\n", reply=b"ok\n", fault="reset=12") as server, connect(server) as client:
        assert receive_line(client) == b"220 ready\n"
        client.sendall(b"one\n")
        assert client.recv(10) == b"ok"
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    with HostedServer(greeting=b"220\n", fault="close,after=1") as server, connect(server) as client:
        client.sendall(b"one\ntwo\n")
        assert receive_all(client) == b"220\none\n"
    with HostedServer(reply=b"ok\n", limit_message_size=10) as server, connect(server) as client:
        client.sendall(b"one\n" + b"x" * 20)
        assert receive_all(client) == b"ok\n"
        assert server.stats.too_long == 1


# What the server saw


def test_connections_have_bytes_messages_and_an_end(options: dict[str, Any]) -> None:
    with HostedServer(**options) as server:
        with connect(server) as client:
            address = client.getsockname()
            client.sendall(b"one\ntwo\nincomplete")
            assert receive_line(client, 8) == b"one\ntwo\n"
            server.wait_for(bytes_in=18)
            [first] = server.connections
            assert (first.number, first.is_open, first.end) == (1, True, None)
            assert first.peer == (address if server.port else "")
            assert first.received == b"one\ntwo\nincomplete"
            assert first.messages == [b"one\n", b"two\n"]
        server.wait_for(active=0)
        assert not first.is_open
        assert first.end == "eof" or (options.get("tls") and first.end == "reset")  # it had not read a session ticket
        with connect(server):
            server.wait_for(active=1)
            assert [each.number for each in server.connections] == [1, 2]


def test_end_of_a_connection_tells_which_side_ended_it() -> None:
    with HostedServer() as server:
        reset(connect(server))
        server.wait_for(accepted=1, active=0)
        assert server.connections[0].end == "reset"
        for fault in ("close", "reset", "half-close", "reset=0.01s"):
            with server.fault(fault), connect(server) as client, suppress(ConnectionResetError):
                client.sendall(b"one\n")
                receive_all(client)
        with connect(server) as client, connect(server) as other:
            server.disconnect(reset=False)
            assert client.recv(1) == other.recv(1) == b""
        with connect(server) as client:
            server.disconnect(reset=True)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        server.wait_for(accepted=8, active=0)
        assert [each.end for each in server.connections[1:]] == ["server"] * 7


def test_datagrams_has_each_that_was_answered() -> None:
    with HostedServer(udp=True) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT)
        client.connect(server.address)
        for data in (b"one", b""):
            client.send(data)
            assert client.recv(100) == data
        assert server.datagrams == [b"one", b""]


def test_wait_for_times_out_with_all_counters() -> None:
    with HostedServer(fault="drop") as server, connect(server) as client:
        client.sendall(b"one\n")
        server.wait_for(faults={"drop": 1})
        with pytest.raises(TimeoutError) as caught:
            server.wait_for(accepted=1, messages=2, active=0, faults={"reset": 1}, timeout=0.01)
        assert str(caught.value).startswith(
            "timed out after 0.01 s: messages is 1, not 2; active is 1, not 0; faults[reset] is 0, not 1 "
            "(counters: accepted=1 active=1 "
        )
        with connect(server):
            server.wait_for(active=2, messages=1)
        with pytest.raises(AttributeError, match="mesages"):
            server.wait_for(mesages=2)


# What a test changes


def test_disconnect_ends_a_connection_whose_client_does_not_read() -> None:
    with HostedServer(reply=b"x" * 50_000_000) as server, connect(server) as client:
        client.sendall(b"one\n")
        assert client.recv(1) == b"x"
        server.disconnect(reset=True)
        server.wait_for(active=0)


def test_disconnect_answers_no_message_that_is_queued() -> None:
    begun, release, messages = threading.Event(), threading.Event(), list[bytes]()

    def reply(message: bytes) -> bytes:
        messages.append(message)
        begun.set()
        release.wait(TIMEOUT)
        return message

    with HostedServer(reply=reply) as server, connect(server) as client:
        client.sendall(b"a chunk of 20 bytes\n" * 10)
        assert begun.wait(TIMEOUT)
        server.disconnect()
        release.set()
        server.wait_for(active=0)
    assert messages == server.received == [b"a chunk of 20 bytes\n"]


def test_fault_applies_to_connections_of_its_block(options: dict[str, Any]) -> None:
    def exchange() -> bytes:
        with connect(server) as client:
            client.sendall(b"one\n")
            return receive_line(client)

    options |= {"mode": "message", "fault": "corrupt", "fault_seed": 1}
    with HostedServer(**options) as server:
        assert exchange() != b"one\n"
        with server.fault("garbage=2"):
            assert len(exchange()) == 2
            with server.fault("none"):
                assert exchange() == b"one\n"
            assert len(exchange()) == 2
        assert exchange() != b"one\n"
        assert server.stats.faults == {"corrupt": 2, "garbage": 2}
        for spec in ("no-accept", "nonsense"):
            with pytest.raises(ConfigError, match=f"invalid fault: '{spec}'"), server.fault(spec):
                pass


def test_refusing_keeps_the_port_and_open_connections(options: dict[str, Any], tmp_path: Path) -> None:
    with HostedServer(**options) as server, connect(server) as client:
        for number in range(3):
            with server.refusing():
                with server.refusing():
                    pass
                with pytest.raises(ConnectionRefusedError):
                    connect(server)
                assert is_echoed(client)
            with connect(server) as other:
                assert is_echoed(other)
            assert server.stats.accepted == number + 2
        with server.refusing():
            server.close()
    assert not (tmp_path / "echo.sock").exists()


TAKE_PORTS = """
import socket
held = []
print("ready", flush=True)
while True:
    held.append(socket.socket())
    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held[-1].bind(("127.0.0.1", 0))
    if len(held) > 500:
        for each in held:
            each.close()
        held.clear()
"""


def test_refusing_never_loses_its_port() -> None:
    """A client reconnects all the time, and another process takes free ports."""
    command = [sys.executable, "-c", TAKE_PORTS]
    with HostedServer() as server, ChildProcess(command, stdout=PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with reconnecting(server):
            for _ in range(100):
                with server.refusing(), pytest.raises(ConnectionRefusedError):
                    connect(server)
                with connect(server) as client:
                    assert is_echoed(client)
        process.kill()


def test_holding_receives_messages_and_replies_later(options: dict[str, Any]) -> None:
    with HostedServer(**options) as server, connect(server) as client, connect(server) as other:
        with server.holding():
            client.sendall(b"one\n")
            other.sendall(b"two\n")
            server.wait_for(messages=2)
            client.sendall(b"three\n")
            server.wait_for(messages=3)
            client.settimeout(0.05)
            with pytest.raises(TimeoutError):
                client.recv(1)
            client.settimeout(TIMEOUT)
        assert receive_line(client, 10) == b"one\nthree\n"
        assert receive_line(other) == b"two\n"


def test_blocks_that_overlap_end_on_their_own() -> None:
    """As those of several threads, or one within another."""
    with HostedServer() as server, connect(server) as client:
        first, second, fault = server.holding(), server.holding(), server.fault("drop")
        for each in (first, fault, second):
            each.__enter__()
        client.sendall(b"one\n")
        server.wait_for(messages=1)
        first.__exit__(None, None, None)
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(1)
        second.__exit__(None, None, None)
        client.settimeout(TIMEOUT)
        assert receive_line(client) == b"one\n"
        with server.fault("garbage=2"):
            fault.__exit__(None, None, None)
            with connect(server) as other:
                assert not is_echoed(other, b"two\n")
        with connect(server) as other:
            assert is_echoed(other, b"three\n")


def test_holding_keeps_replies_for_a_client_that_ended_its_side() -> None:
    with HostedServer(mode="message") as server, connect(server) as client:
        with server.holding():
            client.sendall(b"one\n")
            client.shutdown(socket.SHUT_WR)
            server.wait_for(messages=1)
        assert receive_all(client) == b"one\n"


def test_holding_and_waiting_handlers_end_with_the_server(options: dict[str, Any]) -> None:
    """It is no failure of the handler that it has not received what it checks."""

    def serve(peer: Peer) -> None:
        assert peer.receive_some() == b"never"

    started = monotonic()
    with HostedServer(**options) as server, connect(server) as client, server.holding():
        client.sendall(b"one\n")
        server.wait_for(messages=1)
        server.close()
    with HostedServer(handler=serve, **options) as server, connect(server):
        server.wait_for(active=1)
        server.close()
    assert monotonic() - started < 4, "a thread that does not end has 5 s"


# Handlers


def test_handler_has_a_blocking_peer(options: dict[str, Any]) -> None:
    peers: list[Any] = []

    def serve(peer: Peer) -> None:
        peers.append(peer.peer)
        peer.send(b"hello %d\n" % peer.number)
        assert peer.receive_line() == b"name\n"
        assert peer.receive(3) == b"abc"
        assert peer.receive_some() == b"rest"
        peer.send(b"bye\n")

    with HostedServer(handler=serve, **options) as server:
        for number in (1, 2):
            with connect(server) as client:
                assert receive_line(client) == b"hello %d\n" % number
                client.sendall(b"name\nabcrest")
                assert receive_all(client) == b"bye\n"
                address = client.getsockname()
            server.wait_for(accepted=number, active=0, messages=number)
            assert peers[-1] == server.connections[-1].peer == (address if server.port else "")
        assert [each.received for each in server.connections] == 2 * [b"name\nabcrest"]
        assert (server.received, server.connections[0].end) == (2 * [b"name\n"], "server")
        assert (server.stats.bytes_in, server.stats.bytes_out, server.stats.failed) == (24, 24, 0)


def test_handler_receives_much_more_than_one_read_has() -> None:
    received: list[bytes] = []

    def serve(peer: Peer) -> None:
        received.extend([peer.receive(len(body)), peer.receive_line(), peer.receive(4)])

    body = bytes(range(256)) * 20_000
    with HostedServer(handler=serve) as server, connect(server) as client:
        client.sendall(body + body.replace(b"\n", b"") + b"\n" + b"rest")
        assert receive_all(client) == b""
        assert received == [body, body.replace(b"\n", b"") + b"\n", b"rest"]
        assert b"".join(server.received) + b"rest" == server.connections[0].received


def test_handler_can_set_a_timeout(options: dict[str, Any]) -> None:
    def serve(peer: Peer) -> None:
        peer.socket.settimeout(0.01)
        with pytest.raises(TimeoutError):
            peer.receive(1)
        peer.send(b"nothing was sent\n")
        peer.receive(1)

    with HostedServer(**options, handler=serve) as server:
        with connect(server) as client:
            assert receive_line(client) == b"nothing was sent\n"
            server.wait_for(active=0)
            assert server.connections[0].end == "server"
        with pytest.raises(TimeoutError):
            server.close()


def test_timeout_of_a_handler_ends_with_it() -> None:
    """The server waits for the client to close, so that no reset overtakes the reply."""

    def serve(peer: Peer) -> None:
        peer.socket.settimeout(0.01)
        peer.send(b"bye\n")

    with HostedServer(handler=serve) as server:
        with connect(server) as client:
            assert receive_all(client) == b"bye\n"
            with pytest.raises(TimeoutError):
                server.wait_for(active=0, timeout=0.1)
        server.wait_for(active=0)
        assert server.stats.ended == {"closed": 1}


def test_handler_ends_its_side_and_still_receives() -> None:
    def serve(peer: Peer) -> None:
        peer.end()
        assert peer.receive_line() == b"late\n"
        assert peer.receive_some() == b""

    with HostedServer(handler=serve) as server, connect(server) as client:
        assert receive_all(client) == b""
        client.sendall(b"late\n")
        client.shutdown(socket.SHUT_WR)
        server.wait_for(active=0)


def test_handler_resets_after_what_it_sent() -> None:
    def serve(peer: Peer) -> None:
        peer.receive_line()  # the reset could come before the client is connected
        peer.send(b"x" * 10_000)
        peer.reset()

    with HostedServer(handler=serve) as server, connect(server) as client:
        client.sendall(b"one\n")
        assert receive_exactly(client, 10_000) == b"x" * 10_000
        with pytest.raises(ConnectionResetError):
            client.recv(1)


BANNER = b"421 busy\n"


def send_and_close(peer: Peer) -> None:
    peer.send(BANNER)
    peer.close()


@pytest.mark.parametrize(
    "options", [{"handler": send_and_close}, {"greeting": BANNER, "replies": []}], ids=["handler", "replies"]
)
def test_close_with_input_unread_loses_no_reply(options: dict[str, Any]) -> None:
    with HostedServer(**options) as server, connect(server) as client:
        client.sendall(b"x" * 100_000)
        assert receive_all(client) == BANNER


def test_handler_starts_tls(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> None:
    def serve(peer: Peer) -> None:
        assert peer.receive_line() == b"STARTTLS\n"
        peer.send(b"220 go ahead\n")
        peer.start_tls(server_context)
        peer.send(b"secret " + peer.receive_line())
        peer.socket.sendall(b"beneath TLS, no record\n")

    with HostedServer(handler=serve) as server, connect(server) as client:
        client.sendall(b"STARTTLS\n")
        assert receive_line(client) == b"220 go ahead\n"
        with client_context.wrap_socket(client, server_hostname="localhost") as secured:
            secured.sendall(b"word\n")
            assert receive_line(secured) == b"secret word\n"
            with pytest.raises(ssl.SSLError):
                secured.recv(1)
        server.wait_for(active=0)
        assert server.connections[0].messages == [b"STARTTLS\n", b"word\n"]


def test_handler_starts_tls_with_a_client_that_does_not_wait(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    """As clients of MySQL do: the handshake begins in the segment that asks for it."""

    def serve(peer: Peer) -> None:
        assert peer.receive(4) == b"tls\n"
        peer.start_tls(server_context)
        peer.send(b"secret " + peer.receive_line())

    with HostedServer(handler=serve) as server, connect(server) as plain:
        client = TlsClient(client_context)
        plain.sendall(b"tls\n" + client.hello())
        client.handshake(plain)
        plain.sendall(client.record(b"word\n"))
        assert client.receive(receive_all(plain))[0] == b"secret word\n"


@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("end", ["eof", "reset", "server"])
def test_handler_whose_handshake_is_cut_ends_quietly(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, end: str, has_begun: bool
) -> None:
    def serve(peer: Peer) -> None:
        peer.start_tls(server_context)

    with HostedServer(handler=serve) as server, connect(server) as client:
        if has_begun:
            client.sendall(TlsClient(client_context).hello())
            assert client.recv(1, socket.MSG_PEEK)
        server.wait_for(active=1)
        if end == "eof":
            client.shutdown(socket.SHUT_WR)
        elif end == "reset":
            reset(client)
        else:
            server.disconnect()
        server.wait_for(active=0)
        assert server.connections[0].end == end


@pytest.mark.parametrize("method", ["receive", "receive_line"])
def test_handler_whose_client_is_gone_ends_quietly(method: str, options: dict[str, Any]) -> None:
    ended: list[str] = []

    def serve(peer: Peer) -> None:
        try:
            peer.receive(4) if method == "receive" else peer.receive_line()
        except ConnectionError as error:
            ended.append(str(error))
            raise

    with HostedServer(handler=serve, **options) as server:
        with connect(server) as client:
            client.sendall(b"abc")
            server.wait_for(bytes_in=3)
        server.wait_for(active=0)
        assert len(ended) == 1
        if not options.get("tls"):  # such a client has not read the session tickets, so its end is a reset
            assert server.connections[0].end == "eof"
            place = "after 3 of 4 bytes" if method == "receive" else "within a line, after 3 bytes"
            assert ended == [f"connection 1 ended by the client {place}"]


def exchange_without_reply(server: HostedServer) -> None:
    with suppress(ConnectionError), connect(server) as client:  # the reset may come before the message is sent
        client.sendall(b"one\n")
        assert client.recv(1) == b"", "no reply"


def failing(peer: Peer) -> None:
    assert peer.receive_line() == b"expected\n"


def fail_to_reply(message: bytes) -> bytes:
    raise LookupError(message)


def leave_pytest(peer: Peer) -> None:
    pytest.fail("failed in a handler")


@pytest.mark.parametrize(
    ("options", "error", "place"),
    [
        ({"handler": failing}, AssertionError, "failing"),
        ({"handler": leave_pytest}, pytest.fail.Exception, "leave_pytest"),
        ({"reply": fail_to_reply}, LookupError, "fail_to_reply"),
    ],
)
def test_error_of_a_function_is_raised_by_close(options: Any, error: type[BaseException], place: str) -> None:
    server = HostedServer(**options)
    exchange_without_reply(server)
    with pytest.raises(error) as caught:
        server.close()
    assert place in [each.name for each in caught.traceback]
    server.close()
    assert server.stats.failed == 0


def test_errors_of_several_connections_are_a_group() -> None:
    server = HostedServer(handler=failing)
    for _ in range(2):
        exchange_without_reply(server)
    with pytest.raises(BaseExceptionGroup, match="2 connections failed"):
        server.close()


def test_handler_conflicts_with_what_it_replaces() -> None:
    replies: dict[str, Any] = {"greeting": b"ok\n", "reply": b"ok\n", "replies": [b"ok\n"]}
    others: dict[str, Any] = {"mode": "raw", "fault": "drop", "fault_sequence": ["drop"]}
    for name, value in (replies | others).items():
        with pytest.raises(ConfigError, match=f"handler conflicts with {name}$"):
            HostedServer(handler=failing, **{name: value})
    with HostedServer(handler=failing) as server, pytest.raises(ConfigError), server.fault("drop"):
        pass
    with pytest.raises(ConfigError, match="reply and replies are mutually exclusive"):
        HostedServer(reply=b"ok\n", replies=[b"ok\n"])


async def serve_async(peer: Peer) -> None:
    pytest.fail("never called")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"greeting": "220\n"}, "greeting: '220\\n' (must be bytes)"),
        ({"reply": "PONG\n"}, "reply: 'PONG\\n' (must be bytes, or a function that returns bytes or None)"),
        ({"replies": [b"ok\n", "ok\n"]}, "replies: [b'ok\\n', 'ok\\n'] (must be a list of bytes and None)"),
        ({"replies": b"ok\n"}, "replies: b'ok\\n' (must be a list of bytes and None)"),
        ({"replies": 1}, "replies: 1 (must be a list of bytes and None)"),
        ({"handler": b"ok\n"}, "handler: b'ok\\n' (must be a function, and not async)"),
        ({"handler": serve_async}, "handler: <function serve_async at 0x...> (must be a function, and not async)"),
        ({"engine": "protocol"}, "engine: 'protocol' (must be 'threads')"),
        ({"tls": "old"}, "tls: 'old' (choose from False, True, expired, wrong-host, untrusted, stalled, plain)"),
    ],
)
def test_option_of_a_wrong_type_is_an_error_at_start(options: Any, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HostedServer(**options)
    assert re.sub("0x[0-9a-f]+", "0x...", str(caught.value)) == f"invalid {error}"


def test_reply_function_that_returns_text_fails_the_block() -> None:
    function: Any = bytes.decode
    reason = r"^invalid value returned by reply: 'one\\n' \(must be bytes or None\)$"
    with pytest.raises(TypeError, match=reason), HostedServer(reply=function) as server:
        exchange_without_reply(server)


# TLS that a client has to refuse


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("expired", "certificate has expired"),
        ("wrong-host", "Hostname mismatch"),
        ("untrusted", "unable to get local issuer certificate"),
    ],
)
def test_certificate_of_each_kind_is_refused_by_a_client(kind: Any, reason: str) -> None:
    with HostedServer(tls=kind) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            connect(server)
        server.wait_for(tls_failures=1)


def test_server_without_a_handshake_is_refused_by_a_client() -> None:
    with HostedServer(tls="stalled") as server, support.connect(server) as client:
        client.settimeout(0.1)
        assert server.client_context is not None
        with pytest.raises(TimeoutError):
            server.client_context.wrap_socket(client, server_hostname="localhost")
    with HostedServer(tls="plain") as server, pytest.raises(ssl.SSLError, match=r"(?i)wrong.version.number"):
        connect(server)


def test_calls_from_many_threads_are_safe() -> None:
    """Clients connect all the time, while the server refuses, has faults, and holds replies."""

    def change(begin: Callable[[], Any]) -> None:
        for _ in range(30):
            with begin():
                pass

    with HostedServer() as server:
        with reconnecting(server, threads=3), ThreadPoolExecutor(3) as pool:
            list(pool.map(change, [server.refusing, lambda: server.fault("reset"), server.holding], timeout=TIMEOUT))
        with connect(server) as client:
            assert is_echoed(client)
        assert server.stats.failed == 0
