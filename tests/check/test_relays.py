"""``echo-async check`` through HAProxy in TCP mode: two servers behind it, with and without PROXY headers."""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL

import pytest
from support import TIMEOUT, ChildProcess, server_process

from echo_async.check.checks import run_checks
from echo_async.check.context import Settings
from echo_async.check.result import Result
from echo_async.client.endpoint import Endpoint
from echo_async.config import Mode
from echo_async.testing import HostedServer

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(not shutil.which("haproxy"), reason="haproxy is not installed"),
]

CONFIGURATION = """
global
    maxconn 200
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen echo
    bind fd@{descriptor}
    balance roundrobin
{servers}
"""


@contextmanager
def haproxy(directory: Path, option: str, *servers: tuple[str, int]) -> Iterator[tuple[str, int]]:
    """Run HAProxy in front of ``servers``; yield its address."""
    lines = [f"    server s{number} {host}:{port} {option}" for number, (host, port) in enumerate(servers)]
    path = directory / "haproxy.cfg"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        path.write_text(CONFIGURATION.format(descriptor=listener.fileno(), servers="\n".join(lines)))
        command = ["haproxy", "-db", "-q", "-f", str(path)]
        process = ChildProcess(command, pass_fds=[listener.fileno()], stdout=DEVNULL, stderr=DEVNULL)
        address = listener.getsockname()
    with process:
        yield address
        process.terminate()


def check(address: tuple[str, int]) -> dict[str, Result]:
    endpoint, settings = Endpoint(*address, timeout=TIMEOUT), Settings(connections=20, idle=0.2)
    return {each.check: each for each in run_checks(endpoint, settings)}


@pytest.mark.parametrize("option", ["send-proxy-v2", ""])
def test_identity_through_haproxy_shows_both_servers(option: str, tmp_path: Path) -> None:
    options = ("--mode", "identify", *(("--proxy-protocol", "v2") if option else ()))
    with (
        server_process(*options) as one,
        server_process(*options) as two,
        haproxy(tmp_path, option, one.address, two.address) as address,
    ):
        results = check(address)
    assert [each for each in results.values() if each.result == "failed"] == []
    servers, client, *facts = results["identity"].seen.split("; ")
    assert len(re.findall(r"\(4 of 8\)", servers)) == 2
    for server in (one, two):
        assert f" pid {server.process.pid} at 127.0.0.1:{server.address[1]} " in servers
    if option:
        assert re.fullmatch(r"client address 127\.0\.0\.1:\d+ is ours", client)
        assert facts == ["PROXY v2 from 127.0.0.1", "no TLS"]
    else:
        assert re.fullmatch(
            r"client address 127\.0\.0\.1:\d+ is not ours \(127\.0\.0\.1:\d+\), but that of a proxy or NAT", client
        )
        assert facts == ["no PROXY header", "no TLS"]


def test_check_through_haproxy_without_a_server_fails_once(tmp_path: Path, closed_port: int) -> None:
    with haproxy(tmp_path, "", ("127.0.0.1", closed_port)) as address:
        connect, mode = check(address).values()
    assert (connect.result, mode.check, mode.result) == ("ok", "mode", "failed")
    assert "a proxy has no server behind it" in (mode.reason or "")


@pytest.mark.parametrize("mode", ["message", "stream", "raw"])
def test_check_through_haproxy_finds_nothing(mode: Mode, tmp_path: Path) -> None:
    with HostedServer(mode=mode) as server, haproxy(tmp_path, "", server.address) as address:
        results = check(address)
    assert [each for each in results.values() if each.result == "failed"] == []
