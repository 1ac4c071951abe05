"""``echo-async check`` finds nothing in correct servers: each engine and mode, TLS, Unix sockets, others, relays."""

from __future__ import annotations

import re
import shutil
import ssl
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import TIMEOUT, ChildProcess, StartServer, command_process, haproxy, lines, needs

from echo_async.check.checks import run_checks
from echo_async.check.connection import Connection
from echo_async.check.context import Context, Settings
from echo_async.check.identity import check_identity
from echo_async.check.load import check_backpressure, check_concurrent, check_slow
from echo_async.check.messages import make_text
from echo_async.check.opening import check_connect, check_mode
from echo_async.check.result import Failure
from echo_async.client.endpoint import Endpoint
from echo_async.config import Mode
from echo_async.net import format_address
from echo_async.testing import HostedServer, Peer

pytestmark = pytest.mark.usefixtures("no_leaks")

Results = dict[str, str]
Address = tuple[str, int]


def check(endpoint: Endpoint, *, udp: bool = False) -> Results:
    """Run all checks, none of which fails; return what they saw, or ``skipped``, by name."""
    results = list(run_checks(endpoint, Settings(connections=20, size=70_000, idle=0.2, udp=udp)))
    assert [each for each in results if each.result == "failed"] == []
    return {each.check: each.seen or "skipped" for each in results}


def skipped(results: Results) -> set[str]:
    return {name for name, seen in results.items() if seen == "skipped"}


NOT_APPLICABLE = {
    "message": {"identity"},
    "stream": {"close", "identity"},
    "raw": {"close", "identity"},
    "identify": {"close", "udp"},
}


def test_check_of_our_server_finds_nothing(
    start_server: StartServer, client_context: ssl.SSLContext, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(**options: Any) -> Any:
            return stack.enter_context(start_server(chunk_size=4096, **options)).address

        plain = {mode: pool.submit(check, Endpoint(*start(mode=mode, udp=True)), udp=True) for mode in NOT_APPLICABLE}
        over_tls = [
            pool.submit(check, Endpoint(*address, ssl=client_context, server_hostname="localhost"))
            for address in (start(mode="message", tls=True), start(mode="identify", tls=True))
        ]
        start(mode="identify", uds=path)
        over_unix = pool.submit(check, Endpoint(uds=path))
        assert {mode: each.result()["mode"] for mode, each in plain.items()} == {mode: mode for mode in plain}
        assert {mode: skipped(each.result()) for mode, each in plain.items()} == NOT_APPLICABLE
        assert [skipped(each.result()) for each in over_tls] == [{"half-close", "identity"}, {"half-close", "close"}]
        assert over_tls[0].result()["tls"].startswith("TLSv1.3, TLS_")
        assert skipped(over_unix.result()) == {"close"}
        assert over_unix.result()["identity"].endswith("; Unix socket; no PROXY header; no TLS")


def test_check_of_a_slow_path_waits_for_a_reply_that_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply of 8,000 bytes takes longer than the timeout, and then than all timeouts together."""
    with HostedServer(fault="slice=1500,interval=0.3") as server, checking(server.address, timeout=1.0) as context:
        context.exchange(context.connection(), make_text(8000), "")
        monkeypatch.setattr("echo_async.check.context.MAX_TIMEOUTS", 1)
        with pytest.raises(Failure) as failed:
            context.exchange(context.connection(), make_text(8000), "")
    assert re.fullmatch(r"[\d,]{5} bytes of replies in 1 s, and not the last one", failed.value.seen)
    assert "give a longer --timeout" in failed.value.reason


def test_check_of_backpressure_waits_as_long_as_it_has_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP tries a full path again after intervals that double."""
    monkeypatch.setattr("echo_async.check.load.STALL_TIME", 0.6)
    resumed, stopped, stalls = threading.Event(), threading.Event(), []
    receive_again = Connection.resume

    def resume(connection: Connection) -> None:
        receive_again(connection)
        resumed.set()

    def serve(peer: Peer) -> None:
        for line in lines(peer):
            if len(line) > 1000 and peer not in stalls:
                stalls.append(peer)
                resumed.wait(TIMEOUT)
                stopped.wait(0.4)
            peer.send(line)

    monkeypatch.setattr(Connection, "resume", resume)
    with HostedServer(handler=serve) as server, checking(server.address, timeout=0.1) as context:
        assert check_backpressure(context).startswith("4,194,304 bytes, ")
    assert len(stalls) == 1


def test_check_of_backpressure_forgives_one_stall() -> None:
    """TCP can cause it."""
    stalls, stopped = iter([True]), threading.Event()

    def serve(peer: Peer) -> None:
        for number, line in enumerate(lines(peer)):
            if number > 10 and next(stalls, False):
                stopped.wait(TIMEOUT)
            peer.send(line)

    with HostedServer(handler=serve) as server:
        with checking(server.address, timeout=0.5) as context:
            assert check_backpressure(context).startswith("4,194,304 bytes, ")
        stopped.set()
    assert next(stalls, None) is None


def test_check_of_backpressure_forgives_no_changed_byte() -> None:
    changes = iter([True])

    def serve(peer: Peer) -> None:
        for number, line in enumerate(lines(peer)):
            peer.send(b"?" + line[1:] if number > 10 and next(changes, False) else line)

    with (
        HostedServer(handler=serve) as server,
        checking(server.address, timeout=TIMEOUT) as context,
        pytest.raises(Failure, match="from byte"),
    ):
        check_backpressure(context)


def test_check_of_slow_forgives_a_server_that_is_busy() -> None:
    """It processes what a client has sent that does not read. Meanwhile it answers late."""
    late, stopped = [0], threading.Event()

    def serve(peer: Peer) -> None:
        for line in lines(peer):
            if len(line) > 1000:
                late[0] = 3
            elif late[0]:
                late[0] -= 1
                stopped.wait(0.2)
            peer.send(line)

    with HostedServer(handler=serve) as server, checking(server.address, timeout=TIMEOUT) as context:
        assert check_slow(context).startswith("others were delayed by at most ")


@contextmanager
def checking(address: Address, timeout: float) -> Iterator[Context]:
    """Yield the context of checks after the first ones, with a ``timeout`` for what follows."""
    with closing(Context(Endpoint(*address), Settings())) as context:
        check_connect(context)
        check_mode(context)
        context.close_connections()
        context.endpoint = Endpoint(*address, timeout=timeout)
        context.largest = 20_000
        yield context


def test_check_of_concurrent_begins_the_silence_of_idle() -> None:
    """So that it takes no time of its own."""
    with HostedServer(mode="message") as server, checking(server.address, timeout=TIMEOUT) as context:
        check_concurrent(context)
        assert context.silent is not None


PEERS = Path(__file__).parent.parent.parent / "benchmarks" / "peers"
OTHERS = [
    ["node", str(PEERS / "node.js")],
    [sys.executable, str(PEERS / "trio_streams.py")],
    [sys.executable, str(PEERS / "threads.py")],
]


@contextmanager
def running_socat(port: int) -> Iterator[Address]:
    command = ["socat", "-d", "-d", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork", "EXEC:cat"]
    with ChildProcess(command, stderr=-1, text=True) as process:
        assert any("listening" in line for line in process.stderr)
        process.stderr.close()
        yield "127.0.0.1", port
        process.kill()


def test_check_of_other_servers_finds_nothing(reserved_port: int) -> None:
    with ExitStack() as stack:
        commands = [each for each in OTHERS if shutil.which(each[0])]
        addresses = [stack.enter_context(command_process(each)).address for each in commands]
        if shutil.which("socat"):
            addresses.append(stack.enter_context(running_socat(reserved_port)))
        with ThreadPoolExecutor(len(addresses)) as pool:
            modes = {each["mode"] for each in pool.map(lambda address: check(Endpoint(*address)), addresses)}
    assert modes == {"raw", "stream"}


CONFIGURATION = """
global
    maxconn 1000
defaults
    mode tcp
    retries 0
    timeout connect 10s
    timeout client 60s
    timeout server 60s
"""


@contextmanager
def relaying(directory: Path, *relays: list[str]) -> Iterator[list[Address]]:
    """Run HAProxy in front of each list of servers, which are addresses with options; yield its addresses."""
    configuration = CONFIGURATION
    for number, servers in enumerate(relays):
        configuration += f"listen relay{number}\n    bind :5500\n    balance roundrobin\n"
        configuration += "".join(f"    server s{number} {each}\n" for number, each in enumerate(servers))
    with haproxy(configuration, directory) as (addresses, _):
        yield addresses


@needs("haproxy")
def test_check_through_haproxy_fails_only_without_a_server(tmp_path: Path, closed_port: int) -> None:
    modes: list[Mode] = ["message", "stream", "raw"]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = [stack.enter_context(HostedServer(mode=mode, chunk_size=4096)) for mode in modes]
        relays = [[format_address(each.address)] for each in servers]
        *addresses, alone = stack.enter_context(relaying(tmp_path, *relays, [f"127.0.0.1:{closed_port}"]))
        found = list(pool.map(lambda address: check(Endpoint(*address)), addresses))
        connect, mode = run_checks(Endpoint(*alone), Settings())
    assert [each["mode"] for each in found] == modes
    assert (connect.result, mode.check, mode.result) == ("ok", "mode", "failed")
    assert "a proxy has no server behind it" in (mode.reason or "")


@needs("haproxy")
def test_identity_through_haproxy_shows_both_servers(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(HostedServer(mode="identify")).address for _ in range(2)]
        informed = [stack.enter_context(HostedServer(mode="identify", proxy_protocol="v2")).address for _ in range(2)]
        headers = [f"{format_address(each)} send-proxy-v2" for each in informed]
        seen = []
        for address in stack.enter_context(relaying(tmp_path, [*map(format_address, servers)], headers)):
            with checking(address, TIMEOUT) as context:
                seen.append(check_identity(context).split("; "))
    for (names, *_), addresses in zip(seen, (servers, informed), strict=True):
        assert set(re.findall(r" at (\S+) \(4 of 8\)", names)) == set(map(format_address, addresses))
    plain, v2 = seen
    ours = r"127\.0\.0\.1:\d+"
    assert re.fullmatch(rf"client address {ours} is not ours \({ours}\), but that of a proxy or NAT", plain[1])
    assert re.fullmatch(rf"client address {ours} is ours", v2[1])
    assert plain[2:] == ["no PROXY header", "no TLS"]
    assert v2[2:] == ["PROXY v2 from 127.0.0.1", "no TLS"]
