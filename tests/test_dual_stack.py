"""``--host ::`` and several hosts: clients of both families reach the server, and IPv4 clients are shown as such."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import (
    OldKernel,
    StartServer,
    connect,
    is_echoed,
    needs_ipv6,
    receive_all,
    run_in_namespace,
    server_process,
)

from echo_async.cli.main import main
from echo_async.net import format_address
from echo_async.testing import HostedServer

PORTS: dict[str, dict[str, Any]] = {"plain": {}, "tls": {"tls": True}, "proxy": {"proxy_protocol": "auto"}}


class At(NamedTuple):
    """Where a server is reached."""

    address: tuple[str, int]


@needs_ipv6
def test_host_unspecified_serves_ipv4_and_ipv6_clients(
    start_server: StartServer, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "echo_async")
    lines = []
    for port, options in PORTS.items():
        with start_server(host="::", mode="stream", **options) as server:
            assert server.addresses == [("::", server.port)]
            for host in ("127.0.0.1", "::1"):
                with connect(At((host, server.port or 0)), client_context if port == "tls" else None) as client:
                    client.sendall(b"PROXY UNKNOWN\r\n" if port == "proxy" else b"")
                    assert is_echoed(client, b"Hola Server!\n")
                    lines.append(f"{format_address(client.getsockname())} 13 bytes: Hola Server!")
    assert {*lines} <= {*caplog.messages}
    assert "::ffff:" not in caplog.text


@needs_ipv6
def test_command_serves_ipv4_and_ipv6(certificate: Path, client_context: ssl.SSLContext) -> None:
    options = ("--host", "::", "--workers", "2", "--engine", "protocol", "--ssl-certfile", str(certificate))
    names = []
    with server_process(*options, "--mode", "stream", "--metrics-port", "0", "--metrics-address", "::") as server:
        port = server.address[1]
        assert server.startup_line == f"listening on [::]:{port}\n"
        server.wait_for_log(" metrics available at ")
        [metrics] = re.findall(r" metrics available at http://\[::\]:(\d+)/metrics\n", server.log)
        for host in ("127.0.0.1", "::1"):
            with connect(At((host, port)), client_context) as client:
                assert is_echoed(client, b"Hola Server!\n")
                names.append(format_address(client.getsockname()))
            with connect(At((host, int(metrics)))) as client:
                client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert receive_all(client).endswith(b"\r\nserving\n")
        log = server.stop()
    for name in names:
        assert f" INFO {name} 13 bytes: Hola Server!\n" in log


COMMANDS = (["client", "--count", "1"], ["bench", "load", "--duration", "0.1", "--warmup", "0"])


def assert_reached(host: str, server: HostedServer, *options: str) -> None:
    """Run the client and the load with a server at ``host`` and its port, which replies."""
    for command in COMMANDS:
        assert main([*command, *options, "--host", host, "--port", str(server.port)]) == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "workers"),
    [
        ([], " 127.0.0.1, 127.0.0.2 ", "2"),
        (["--host", "127.0.0.1", "--host", "127.0.0.2"], "no-such-host.invalid", "1"),
    ],
)
def test_command_with_several_hosts_uses_one_port(arguments: list[str], environment: str, workers: str) -> None:
    with server_process(*arguments, "--workers", workers, env={"ECHO_ASYNC_HOST": environment}) as server:
        port = server.address[1]
        assert server.startup_line == f"listening on 127.0.0.1:{port}\n"
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == f"listening on 127.0.0.2:{port}\n"
        for host in ("127.0.0.1", "127.0.0.2"):
            with connect(At((host, port))) as client:
                assert is_echoed(client)


@pytest.mark.parametrize("has_ipv6", [pytest.param(True, marks=needs_ipv6), False])
def test_commands_with_host_unspecified_try_ipv4(has_ipv6: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether connecting over IPv6 is refused, or the kernel does not know it."""
    if has_ipv6:
        with HostedServer(host="::") as server:
            assert_reached("::1", server)
    else:
        monkeypatch.setattr(socket, "socket", OldKernel)
    with HostedServer(udp=True) as server:
        assert_reached("::", server)
        assert_reached("::", server, "--udp")


WITHOUT_IPV6 = "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
SERVE = """
import asyncio, logging, sys
import echo_async
from echo_async import sync
from echo_async.loops import loop_factory
from echo_async.testing import HostedServer

logging.basicConfig(level=logging.INFO)

async def serve(*clients, **options):
    async with echo_async.serve(port=0, **options) as server:
        replies = [await echo_async.echo("Hola Server!", host, server.port) for host in clients]
        print([host for host, _ in server.addresses], *replies)

for engine, loop in (("streams", "asyncio"), ("protocol", "uvloop"), ("threads", "asyncio")):
    with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
        runner.run(serve("127.0.0.1", "::", host="::", engine=engine))
asyncio.run(serve(host="localhost"))
asyncio.run(serve(host=["127.0.0.2", "localhost"], udp=True, engine="threads"))
for host in ("::", "localhost"):
    with sync.serve(host=host, port=0) as server:
        print("sync", server.address[0], sync.echo("Hola Server!", host, server.port))
with HostedServer(host="localhost", tls=True) as server:
    print("hosted", server.address[0])
for host in ("::1", "missing.test"):
    try:
        sync.serve(host=host, port=0)
    except echo_async.StartError as error:
        print(error)
"""


@pytest.fixture
def names(tmp_path: Path) -> str:
    """The setup of a namespace in which ``localhost`` has an address that the machine does not have."""
    hosts = tmp_path / "hosts"
    localhost, missing, both = ("127.0.0.1", "::1"), ("::2", "::3"), ("127.0.0.1", "::1", "127.0.0.2")
    names = {"localhost": localhost, "missing.test": missing, "both.test": both}
    hosts.write_text("".join(f"{each} {name}\n" for name, addresses in names.items() for each in addresses))
    return f"mount --bind '{hosts}' /etc/hosts && {WITHOUT_IPV6}"


def test_server_in_a_namespace_without_ipv6_serves_ipv4(names: str) -> None:
    done = run_in_namespace(names, sys.executable, "-c", SERVE)
    *lines, given, missing = done.stdout.splitlines()
    assert lines == [
        *["['::'] Hola Server! Hola Server!"] * 3,
        "['127.0.0.1']",
        "['127.0.0.2', '127.0.0.1']",
        "sync :: Hola Server!",
        "sync 127.0.0.1 Hola Server!",
        "hosted 127.0.0.1",
    ], done.stderr
    assert given.startswith("cannot listen on [::1]:"), "an address that is given as such is required"
    assert missing.startswith("cannot listen on [::")
    assert done.stderr.count(":127.0.0.1:") == 8
    assert "::ffff:" not in done.stderr


GET_HEALTH = """
from urllib.request import urlopen
for host in ("127.0.0.1", "127.0.0.2"):
    with urlopen(f"http://{host}:5739/healthz", timeout=10) as response:
        print(response.read())
"""


def test_command_serves_names_and_logs_what_is_left_out(names: str) -> None:
    listen = ("--workers", "2", "--log-level", "info", "--listen", "localhost:0,udp")
    metrics = ("--metrics-address", "both.test", "--metrics-port", "5739")
    client = (sys.executable, "-c", GET_HEALTH)
    done = run_in_namespace(names, sys.executable, "-m", "echo_async", "run", *listen, *metrics, "--", *client)
    assert done.stdout == "b'serving\\n'\n" * 2, done.stderr
    for port in (0, 5739):
        assert f"INFO [::1]:{port} not served: this machine does not have the address\n" in done.stderr
