"""UDP: datagrams are answered byte for byte, and never where a reply could do harm."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from time import monotonic

import pytest
from support import (
    BACKENDS,
    LOOPS,
    TIMEOUT,
    Backend,
    HasAddress,
    StartServer,
    in_its_loop,
    listening,
    run,
    wait_for,
    wait_in_loop,
)

import echo_async
from echo_async import Identity, StartError, Stats
from echo_async.config import EngineName, ServerConfig, ServerOptions
from echo_async.loops import LoopName
from echo_async.net import bind_udp
from echo_async.server.datagram_responder import BATCH
from echo_async.server.listeners import ListenerConfig
from echo_async.server.server import start_server
from echo_async.testing import HostedServer
from echo_async.wire.datagrams import REPLY_TRAFFIC_CLASS, Refusals

SIZES = [0, 1, 13, 1472, 65_507]
PADDED = b"Hola\n".ljust(1400)  # has room for a reply in identify mode
RECEIVERS = [each for each in BACKENDS if each.engine != "protocol"]  # which receives as streams does

DROPPED_WITH_SEED_7 = {6, 46, 54, 60, 63, 76, 106, 116, 123, 139, 153, 175, 188, 193, 196}  # of 200, with p=0.1

each_receiver = pytest.mark.parametrize("backend", RECEIVERS, ids="-".join, indirect=True)


@contextmanager
def udp_client(host: str = "127.0.0.1", source: tuple[str, int] | None = None) -> Iterator[socket.socket]:
    """Open a socket for datagrams, with a timeout. Skip the test if it may not use the port of ``source``."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT)
        if source is not None:
            try:
                client.bind(source)
            except PermissionError:
                pytest.skip("this user may not bind the port")
        yield client


def is_echoed(server: HasAddress, data: bytes, host: str = "127.0.0.1") -> bool:
    """Send a datagram from a socket of its own, and compare the reply with it."""
    with udp_client(host) as client:
        client.connect((host, server.address[1]))
        client.send(data)
        return client.recv(65_535) == data


@each_receiver
def test_udp_datagrams_are_echoed_byte_for_byte(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "echo_async.access")
    with start_server(udp=True, host="::") as server:
        for host in ("127.0.0.1", "::1"):
            assert all(is_echoed(server, b"\xff\n" * (size // 2) + b"\0" * (size % 2), host) for size in SIZES)
            assert is_echoed(server, b"Hola", host)
        stats = server.stats
    assert stats.datagrams == 2 * len(SIZES) + 2
    assert stats.bytes_in == stats.bytes_out == 2 * sum(SIZES) + 8
    assert (stats.accepted, stats.messages, stats.datagrams_refused, stats.failed) == (0, 0, {}, 0)
    lines = [each.split(" ", 1) for each in caplog.messages if each.endswith(" datagram: 4 bytes: Hola")]
    assert [peer.rpartition(":")[0] for peer, _ in lines] == ["127.0.0.1", "[::1]"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_udp_reply_comes_from_the_address_asked(host: str) -> None:
    """A connected socket receives only what comes from the address that it is connected to: not from a broadcast."""
    options: ServerOptions = {"udp": True, "mode": "identify", "host": host, "fault_sequence": "delay=0.01"}
    with HostedServer(**options) as server, udp_client() as client:
        for _ in ("delayed", "not delayed"):
            with udp_client() as asking:
                asking.connect(("127.0.0.2", server.port))
                asking.send(PADDED)
                assert Identity.parse(asking.recv(65_535)).server.address == f"127.0.0.2:{server.port}"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.sendto(PADDED, ("127.255.255.255", server.port))
        assert Identity.parse(client.recv(65_535)).message == "Hola"


@pytest.mark.internal_errors
@each_receiver
def test_udp_logging_error_is_counted_and_others_are_answered(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(record: logging.LogRecord) -> bool:
        if "first" in record.getMessage():
            raise ConnectionRefusedError("log server")
        return True

    monkeypatch.setattr(logging.getLogger("echo_async.access"), "filters", [fail])
    caplog.set_level(logging.INFO, "echo_async.access")
    with start_server(udp=True) as server, udp_client() as client:
        client.sendto(b"first", server.address)
        client.sendto(b"second", server.address)
        assert client.recv(100) == b"second"
    stats = server.stats
    assert (stats.failed, stats.bytes_in, stats.bytes_out, stats.datagrams_refused) == (1, 11, 6, {})


@each_receiver
def test_udp_source_ports_of_services_are_refused(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    """So is the server's own port, on any address."""
    host = f"127.9.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"  # other processes run this test as well
    with start_server(udp=True) as server:
        sources = [(host, 7), (host, 1023), ("127.0.0.2", server.address[1])]
        for source, refused in zip(sources, [{"port": 1}, {"port": 2}, {"loop": 1}], strict=True):
            with udp_client(source=source) as client:
                client.sendto(b"refused", server.address)
                wait_for(server, datagrams_refused=refused)
                client.setblocking(False)
                with pytest.raises(BlockingIOError):
                    client.recv(1)
    assert server.stats == Stats(datagrams_refused={"port": 2, "loop": 1})
    assert f"{host}:7 datagram refused: source port below 1024" in caplog.messages


@each_receiver
def test_udp_marked_replies_are_refused(start_server: StartServer) -> None:
    """A datagram with the traffic class of a reply is one of another server."""
    marks = [("127.0.0.1", socket.IPPROTO_IP, socket.IP_TOS), ("::1", socket.IPPROTO_IPV6, socket.IPV6_TCLASS)]
    with start_server(udp=True, host="::") as server:
        for peer, level, name in marks:
            with udp_client(peer) as client:
                client.setsockopt(level, name, REPLY_TRAFFIC_CLASS)
                client.sendto(b"refused", (peer, server.address[1]))
                client.setsockopt(level, name, 0x10)
                client.sendto(b"answered", (peer, server.address[1]))
                assert client.recv(100) == b"answered"
    assert server.stats.datagrams_refused == {"loop": 2}


def test_udp_sources_not_allowed_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with HostedServer(udp=True, udp_allow_from="127.0.0.1,10.0.0.0/8", host="::") as server:
        with udp_client(source=("127.0.0.2", 0)) as client:
            client.sendto(b"refused", ("127.0.0.1", server.port))
            peer = f"127.0.0.2:{client.getsockname()[1]}"
            wait_for(server, datagrams_refused={"address": 1})
        assert is_echoed(server, b"allowed")
    assert f"{peer} datagram refused: not in udp_allow_from" in caplog.messages


def test_udp_refusals_of_the_defaults() -> None:
    refusals = Refusals(ServerConfig(udp=True).udp_allow_from, [5500])
    answered = [("127.0.0.1", 5501), ("127.255.0.1", 1024), ("::ffff:127.0.0.1", 5501), ("::1", 65_535)]
    assert [refusals[source] for source in answered] == 4 * [None]
    not_allowed = [("fe80::1%lo", 5501), ("::ffff:192.0.2.1", 5501), ("192.0.2.1", 5500)]
    assert [refusals[source] for source in not_allowed] == 3 * ["address"]
    assert [refusals[source] for source in (("127.0.0.1", 5500), ("::1", 1023), ("::1", 0))] == ["loop", "port", "port"]


def test_udp_port_in_use_raises_start_error(reserved_port: int) -> None:
    error = f"cannot listen on 127.0.0.1:{reserved_port}/udp: address already in use; stop the other server"
    with udp_client(source=("127.0.0.1", reserved_port)), pytest.raises(StartError, match=f"^{re.escape(error)}"):
        HostedServer(udp=True, port=reserved_port)
    with HostedServer(udp=True, port=reserved_port):
        pass


def test_udp_on_other_inherited_sockets_raises_start_error(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, udp_client(source=("127.0.0.1", 0)) as receiver:
        listener.bind(f"{tmp_path}/echo.sock")
        listener.listen()
        with pytest.raises(StartError, match=r"^cannot receive datagrams on /.*: not an IP address; omit udp$"):
            HostedServer(udp=True, fd=listener.detach())
        with pytest.raises(StartError, match="UDP socket alone; pass a"):
            HostedServer(udp=True, fd=receiver.detach())


def test_udp_port_0_is_free_for_both_protocols(monkeypatch: pytest.MonkeyPatch, reserved_port: int) -> None:
    """The first TCP port that the system selects is one whose UDP port is in use: the server tries another."""
    with udp_client(source=("127.0.0.1", reserved_port)):
        selected = [reserved_port]
        bind_to = socket.socket.bind

        def bind(self: socket.socket, address: tuple[str, int]) -> None:
            is_any = self.type == socket.SOCK_STREAM and address[1] == 0 and selected
            bind_to(self, (address[0], selected.pop()) if is_any else address)

        monkeypatch.setattr(socket.socket, "bind", bind)
        with HostedServer(udp=True) as server:
            assert not selected
            assert server.port != reserved_port
            assert is_echoed(server, b"another port")


@each_receiver
@in_its_loop
async def test_udp_stop_answers_what_has_arrived(backend: Backend) -> None:
    """The event loop does not run between the arrival of the datagrams and the stop."""
    messages = [b"%d" % number for number in range(100)]
    async with echo_async.serve(port=0, udp=True, engine=backend.engine) as server:
        with udp_client() as client:
            for message in messages:
                client.sendto(message, server.address)
            server.close()
            await server.wait_closed()
            assert [client.recv(100) for _ in messages] == messages
            client.connect(server.address)
            client.send(b"nobody")
            with pytest.raises(ConnectionRefusedError):
                client.recv(1)


@pytest.mark.parametrize("loop", LOOPS)
@in_its_loop
async def test_udp_burst_is_answered_in_shares(loop: LoopName) -> None:
    """No turn of the event loop answers more than 32 of the 200 datagrams that have arrived."""
    async with echo_async.serve(port=0, udp=True) as server:
        with udp_client() as client:
            for _ in range(200):
                client.sendto(b"burst", server.address)
            counts = [0]
            while counts[-1] < 200:
                await asyncio.sleep(0)
                counts.append(server.stats.datagrams)
        assert max(after - before for before, after in pairwise(counts)) == BATCH


@contextmanager
def inherited_sockets(host: str) -> Iterator[tuple[list[int], socket.socket]]:
    """Open a TCP and a UDP socket; return their numbers, which a server takes over, and the UDP socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener, bind_udp([listener])[0] as receiver:
        yield [os.dup(listener.fileno()), os.dup(receiver.fileno())], receiver


def test_udp_reply_that_cannot_be_sent_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The reply is longer than the MTU, and may not be fragmented."""

    async def main() -> None:
        with inherited_sockets("::1") as (descriptors, receiver), udp_client("::1") as client:
            receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DONTFRAG, 1)
            client.connect(receiver.getsockname())
            server = await start_server([ListenerConfig(ServerConfig(udp=True), descriptors)])
            client.send(bytes(65_527))
            client.send(b"still there")
            assert await asyncio.to_thread(client.recv, 100) == b"still there"
            server.close()
            await server.wait_closed()
        assert server.stats.datagrams_refused == {"send": 1}
        assert (server.stats.datagrams, server.stats.bytes_in, server.stats.bytes_out) == (1, 11, 11)

    run(main)
    assert any(each.endswith(" datagram refused: cannot send the reply: message too long") for each in caplog.messages)


@pytest.mark.parametrize("engine", ["streams", "threads"])
@in_its_loop
async def test_udp_error_of_an_earlier_reply_is_counted(engine: EngineName) -> None:
    """A connected socket reports that the previous reply reached no client; so does every socket on Windows."""
    with inherited_sockets("127.0.0.1") as (descriptors, receiver):
        with udp_client(source=("127.0.0.1", 0)) as client:
            source = client.getsockname()
            client.sendto(b"gone", receiver.getsockname())
            receiver.connect(source)
        config = ServerConfig(udp=True, engine=engine)
        server = await start_server([ListenerConfig(config, descriptors)])
        await wait_in_loop(lambda: server.stats.datagrams_refused == {"send": 1})
        with udp_client(source=source) as client:
            client.sendto(b"back", receiver.getsockname())
            assert await asyncio.to_thread(client.recv, 100) == b"back"
        server.close()
        await server.wait_closed()
    assert (server.stats.datagrams, server.stats.failed) == (2, 0)


def exchange(server: HostedServer, messages: Sequence[bytes], count: int) -> list[bytes]:
    """Send datagrams from one socket. Return the ``count`` replies; no more may come until the server is closed."""
    with udp_client() as client:
        client.connect(server.address)
        for message in messages:
            client.send(message)
        replies = [client.recv(100) for _ in range(count)]
        wait_for(server, datagrams=len(messages))
        server.close()
        client.settimeout(0.01)
        with pytest.raises((TimeoutError, ConnectionRefusedError)):
            replies.append(client.recv(100))
    return replies


def faulty_server(fault: str) -> HostedServer:
    return HostedServer(udp=True, fault=fault, fault_seed=7, no_access_log=True)


def test_udp_fault_drop_is_reproducible() -> None:
    messages = [b"%d" % number for number in range(200)]
    with faulty_server(fault="drop,p=0.1") as server:
        received = exchange(server, messages, 200 - len(DROPPED_WITH_SEED_7))
        stats = server.stats
    assert received == [each for number, each in enumerate(messages) if number not in DROPPED_WITH_SEED_7]
    assert (stats.datagrams, stats.faults) == (200, {"drop": len(DROPPED_WITH_SEED_7)})
    assert stats.bytes_out == sum(map(len, received)) < stats.bytes_in


def test_udp_faults_change_replies() -> None:
    """``corrupt`` flips one bit, ``duplicate`` sends each reply twice, faults of connections do not apply."""
    with faulty_server(fault="corrupt") as server:
        corrupted, empty = exchange(server, [b"datagram", b""], 2)
        assert server.stats.faults == {"corrupt": 1}
    assert int.from_bytes(corrupted, "big") ^ int.from_bytes(b"datagram", "big") in {1 << bit for bit in range(64)}
    assert empty == b""
    with faulty_server(fault="duplicate") as server:
        assert exchange(server, [b"one", b""], 4) == [b"one", b"one", b"", b""]
        assert (server.stats.datagrams, server.stats.bytes_out) == (2, 6)
    with faulty_server(fault="reset,slice=1") as server:
        assert exchange(server, [b"whole"], 1) == [b"whole"]
        assert server.stats.faults == {}


@each_receiver
def test_udp_fault_delay_delays_each_reply(start_server: StartServer) -> None:
    """A datagram without a fault, and one with a shorter delay, overtake those before them. A stop ends the delay."""
    delays = {b"delayed until the stop": 60, b"slow": 0.8, b"healthy": 0, b"late": 0.1}
    sequence = [f"delay={seconds}" if seconds else "none" for seconds in delays.values()]
    with udp_client() as client:
        with start_server(udp=True, fault_sequence=sequence) as server:
            client.connect(server.address)
            started_at = monotonic()
            for message in delays:
                client.send(message)
            for message in (b"healthy", b"late", b"slow"):
                assert client.recv(100) == message
                assert monotonic() - started_at >= delays[message]
        assert client.recv(100) == b"delayed until the stop"


def test_udp_fault_delay_holds_limited_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_async.server.datagram_responder.MAX_DELAYED_SIZE", 2000)
    with faulty_server(fault="delay=60") as server, udp_client() as client:
        for _ in range(5):
            client.sendto(bytes(100), server.address)
        wait_for(server, datagrams=5)
        assert server.stats.datagrams_refused == {"limit": 3}


def test_udp_identify_answers_what_has_room() -> None:
    """The bytes after the newline are padding. The reply has at most as many as the datagram."""
    with HostedServer(udp=True, mode="identify", labels={"zone": "a"}) as server, udp_client() as client:
        client.connect(server.address)
        client.send(PADDED)
        reply = client.recv(65_535)
        identity = Identity.parse(reply)
        for size in (len(reply) - 1, len(reply), 5, 0):
            client.send(b"Hola\n".ljust(size)[:size])
        client.send(bytes(1400))  # no newline: the whole datagram is the message
        assert len(client.recv(65_535)) == len(reply)
        wait_for(server, datagrams_refused={"size": 4})
    assert (identity.message, identity.bytes, identity.number) == ("Hola", 5, 1)
    assert (identity.client.address, identity.server.labels) == ("127.0.0.1", {"zone": "a"})
    assert identity.server.address == f"127.0.0.1:{server.port}"
    assert (server.stats.datagrams, server.stats.bytes_out) == (2, 2 * len(reply))


def test_udp_of_listeners_has_options_of_its_own() -> None:
    """Two workers share each socket."""
    specs = ("0,udp", "127.0.0.1:0,udp,udp-allow-from=127.0.0.2", "0")
    options = ("--workers", "2", "--log-format", "json")
    with listening(*specs, options=options) as (server, listeners), udp_client() as client:
        for listener in listeners[1:]:
            client.sendto(b"refused", listener.address)
        # A server of another test may have the third port for UDP.
        replies = (data for data, source in iter(lambda: client.recvfrom(100), None) if source == listeners[0].address)
        for number in range(200):
            client.sendto(b"%d" % number, listeners[0].address)
            assert next(replies) == b"%d" % number
        peer = f"127.0.0.1:{client.getsockname()[1]}"
        server.wait_for_log("not in udp_allow_from")
        log = server.stop()
    entries = [each for each in map(json.loads, log.splitlines()) if each["logger"] == "echo_async.access"]
    assert sorted(int(each["text"]) for each in entries) == [*range(200)]
    [entry] = [each for each in entries if each["text"] == "199"]
    facts = {"client": peer, "listener": listeners[0].name, "bytes": 3, "message": f"{peer} datagram: 3 bytes: 199"}
    assert {key: entry[key] for key in facts} == facts
    assert f"listener {listeners[0].name} started: mode message, UDP" in log
    assert " datagrams=200 datagrams_refused_address=1" in log
