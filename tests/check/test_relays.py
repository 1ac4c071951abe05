"""``echo-async check`` through HAProxy in TCP mode: servers of each mode, two servers, none."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from subprocess import DEVNULL

import pytest
from support import ChildProcess

from echo_async.check.checks import run_checks
from echo_async.check.context import Context, Settings
from echo_async.check.identity import check_identity
from echo_async.check.opening import check_connect, check_mode
from echo_async.check.result import Result
from echo_async.client.endpoint import Endpoint
from echo_async.config import Mode
from echo_async.net import format_address
from echo_async.testing import HostedServer

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed"),
]

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
Address = tuple[str, int]


@contextmanager
def haproxy(directory: Path, relays: dict[str, list[str]]) -> Iterator[list[Address]]:
    """Run HAProxy with a listener for each of ``relays``; yield the addresses. A server is an address with options."""
    path = directory / "haproxy.cfg"
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in relays]
        configuration = CONFIGURATION
        for listener, (name, servers) in zip(listeners, relays.items(), strict=True):
            configuration += f"listen {name}\n    bind fd@{listener.fileno()}\n    balance roundrobin\n"
            configuration += "".join(f"    server s{number} {each}\n" for number, each in enumerate(servers))
        path.write_text(configuration)
        descriptors = [each.fileno() for each in listeners]
        command = ["haproxy", "-db", "-q", "-f", str(path)]
        process = stack.enter_context(ChildProcess(command, pass_fds=descriptors, stdout=DEVNULL, stderr=DEVNULL))
        yield [each.getsockname() for each in listeners]
        process.terminate()


def check(address: Address) -> dict[str, Result]:
    settings = Settings(connections=20, size=70_000, idle=0.2)
    return {each.check: each for each in run_checks(Endpoint(*address), settings)}


def test_check_through_haproxy_fails_only_without_a_server(tmp_path: Path, closed_port: int) -> None:
    modes: list[Mode] = ["message", "stream", "raw"]
    with ExitStack() as stack:
        servers = [stack.enter_context(HostedServer(mode=mode, chunk_size=4096)) for mode in modes]
        relays = {str(mode): [format_address(each.address)] for mode, each in zip(modes, servers, strict=True)}
        addresses = stack.enter_context(haproxy(tmp_path, {**relays, "none": [f"127.0.0.1:{closed_port}"]}))
        *found, without_server = stack.enter_context(ThreadPoolExecutor(len(addresses))).map(check, addresses)
    assert [each for results in found for each in results.values() if each.result == "failed"] == []
    assert [each["mode"].seen for each in found] == modes
    connect, mode = without_server.values()
    assert (connect.result, mode.check, mode.result) == ("ok", "mode", "failed")
    assert "a proxy has no server behind it" in (mode.reason or "")


def identity(address: Address) -> list[str]:
    """Return what the check ``identity`` sees."""
    with closing(Context(Endpoint(*address), Settings())) as context:
        check_connect(context)
        check_mode(context)
        return check_identity(context).split("; ")


def test_identity_through_haproxy_shows_both_servers(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(HostedServer(mode="identify")).address for _ in range(2)]
        informed = [stack.enter_context(HostedServer(mode="identify", proxy_protocol="v2")).address for _ in range(2)]
        relays = {
            "plain": [format_address(each) for each in servers],
            "v2": [f"{format_address(each)} send-proxy-v2" for each in informed],
        }
        plain, v2 = map(identity, stack.enter_context(haproxy(tmp_path, relays)))
    for seen, addresses in ((plain[0], servers), (v2[0], informed)):
        assert set(re.findall(r" at (\S+) \(4 of 8\)", seen)) == set(map(format_address, addresses))
    ours = r"127\.0\.0\.1:\d+"
    assert re.fullmatch(rf"client address {ours} is not ours \({ours}\), but that of a proxy or NAT", plain[1])
    assert re.fullmatch(rf"client address {ours} is ours", v2[1])
    assert plain[2:] == ["no PROXY header", "no TLS"]
    assert v2[2:] == ["PROXY v2 from 127.0.0.1", "no TLS"]
