"""``--host ::`` and several hosts: clients of both families reach the server, and IPv4 clients are shown as such."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import (
    TIMEOUT,
    ServerProcess,
    StartServer,
    command_in_namespace,
    command_process,
    needs_ipv6,
    receive_all,
    receive_line,
    run_in_namespace,
    run_process,
    server_process,
)

import echo_async

SHORT_LOAD = ["--duration", "0.1", "--warmup", "0"]
PORTS: dict[str, dict[str, Any]] = {"plain": {}, "tls": {"tls": True}, "proxy": {"proxy_protocol": "auto"}}


@contextmanager
def connect_to(address: tuple[str, int], context: ssl.SSLContext | None = None) -> Iterator[socket.socket]:
    with socket.create_connection(address, TIMEOUT) as plain:
        if context is None:
            yield plain
            return
        with context.wrap_socket(plain, server_hostname="localhost") as client:
            yield client


def ipv4_address(server: echo_async.EchoServer) -> tuple[str, int]:
    return "127.0.0.1", server.address[1]


def name_of(client: socket.socket) -> str:
    """Return the address that the log shows for this client."""
    host, port = client.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def assert_echoed(client: socket.socket, message: bytes = b"Hola Server!\n") -> None:
    client.sendall(message)
    assert receive_line(client) == message.rpartition(b"\r\n")[2]


@needs_ipv6
@pytest.mark.parametrize("port", PORTS)
def test_host_unspecified_serves_ipv4_and_ipv6_clients(
    start_server: StartServer, port: str, client_context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "echo_async")
    header = b"PROXY UNKNOWN\r\n" if port == "proxy" else b""
    lines = []
    with start_server(host="::", mode="stream", **PORTS[port]) as server:
        assert server.addresses == [("::", server.port)]
        for host in ("127.0.0.1", "::1"):
            with connect_to((host, server.port or 0), client_context if port == "tls" else None) as client:
                assert_echoed(client, header + b"Hola Server!\n")
                lines.append(f"{name_of(client)} 13 bytes: Hola Server!")
    assert {*lines} <= {*caplog.messages}
    assert "::ffff:" not in caplog.text


@needs_ipv6
def test_proxy_allow_from_an_ipv4_address_matches_it(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"host": "::", "mode": "stream", "proxy_protocol": "v1"}
    with start_server(proxy_allow_from="127.0.0.0/8", **options) as server, connect_to(ipv4_address(server)) as client:
        assert_echoed(client, b"PROXY UNKNOWN\r\nHola Server!\n")
    with start_server(proxy_allow_from="192.0.2.0/24", **options) as server, connect_to(ipv4_address(server)) as client:
        assert client.recv(1) == b""
        refused = name_of(client)
    assert f"{refused} connection refused: not in proxy_allow_from" in caplog.messages


@needs_ipv6
@pytest.mark.parametrize("engine", ["protocol", "threads"])
def test_command_with_workers_serves_ipv4_and_ipv6(
    engine: str, certificate: Path, client_context: ssl.SSLContext
) -> None:
    options = ("--host", "::", "--workers", "2", "--engine", engine, "--ssl-certfile", str(certificate))
    names = []
    with server_process(*options, "--mode", "stream") as server:
        port = server.address[1]
        assert server.startup_line == f"listening on [::]:{port}\n"
        for host in ("127.0.0.1", "::1"):
            with connect_to((host, port), client_context) as client:
                assert_echoed(client)
                names.append(name_of(client))
        code, log = server.stop()
    assert code == 0
    for name in names:
        assert f" INFO {name} 13 bytes: Hola Server!\n" in log


def assert_reached(command: str, host: str, port: int) -> None:
    """Run a client command with a server at ``host`` and ``port``, which replies."""
    arguments = ["Hola Server!"] if command == "client" else ["load", *SHORT_LOAD]
    words = [sys.executable, "-m", f"echo_async.{command}", *arguments, "--host", host, "--port", str(port)]
    done = run_process(words)
    assert done.returncode == 0, done.stderr


@needs_ipv6
@pytest.mark.parametrize(("command", "host"), [("client", "::"), ("client", "::1"), ("bench", "::"), ("bench", "::1")])
def test_commands_reach_a_server_on_all_addresses(command: str, host: str) -> None:
    with server_process("--host", "::", "--mode", "stream") as server:
        assert_reached(command, host, server.address[1])


@pytest.mark.parametrize("command", ["client", "bench"])
def test_commands_with_host_unspecified_try_ipv4(command: str) -> None:
    with server_process("--mode", "stream") as server:
        assert_reached(command, "::", server.address[1])


def get_health(host: str, log: str) -> bytes:
    """Request ``/healthz`` at ``host`` and the port of the metrics, which the log shows."""
    found = re.search(r"metrics available at http://(?:\[::\]|0\.0\.0\.0):(\d+)/metrics\n", log)
    assert found
    with socket.create_connection((host, int(found[1])), TIMEOUT) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        return receive_all(client).rpartition(b"\r\n")[2]


@needs_ipv6
def test_metrics_address_unspecified_serves_both_families() -> None:
    with server_process("--metrics-port", "0", "--metrics-address", "::") as server:
        server.wait_for_log(" metrics available at ")
        assert [get_health(host, server.log) for host in ("127.0.0.1", "::1")] == [b"serving\n"] * 2


@pytest.mark.parametrize(
    ("arguments", "environment", "workers"),
    [
        ([], " 127.0.0.1, 127.0.0.2 ", "1"),
        ([], "127.0.0.1 127.0.0.2", "2"),
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
            with connect_to((host, port)) as client:
                assert_echoed(client)


OLD_KERNEL = """
import errno, socket, sys

class OldKernel(socket.socket):
    def __init__(self, family=-1, *args, **more):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        super().__init__(family, *args, **more)

socket.socket = OldKernel
from echo_async.cli.main import main
sys.exit(main())
"""


def command_without_ipv6(*arguments: str) -> AbstractContextManager[ServerProcess]:
    words = ["server", "--host", "::", "--port", "0", "--loop", "asyncio", *arguments]
    return command_process([sys.executable, "-c", OLD_KERNEL, *words])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_command_on_a_kernel_without_ipv6_uses_ipv4(workers: str) -> None:
    with command_without_ipv6("--workers", workers, "--metrics-port", "0", "--metrics-address", "::") as server:
        assert server.startup_line.startswith("listening on 0.0.0.0:")
        with connect_to(("127.0.0.1", server.address[1])) as client:
            assert_echoed(client)
        server.wait_for_log(" metrics available at ")
        assert get_health("127.0.0.1", server.log) == b"serving\n"
        assert server.stop()[0] == 0


@pytest.mark.parametrize(
    "command", [["client", "--count", "1"], ["bench", "load", *SHORT_LOAD]], ids=lambda each: each[0]
)
@pytest.mark.parametrize("options", [[], ["--udp"]], ids=["tcp", "udp"])
def test_commands_on_a_kernel_without_ipv6_reach_ipv4(command: list[str], options: list[str]) -> None:
    with server_process("--mode", "stream", *options) as server:
        arguments = [*command, *options, "--host", "::", "--port", str(server.address[1])]
        words = [sys.executable, "-c", OLD_KERNEL, *arguments]
        done = run_process(words)
    assert done.returncode == 0, done.stderr


WITHOUT_IPV6 = "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
IN_NAMESPACE = """
import sys
import socket
from subprocess import PIPE, Popen

command = [sys.executable, "-m", "echo_async.server", "--host", "::", "--port", "0", *sys.argv[1:]]
server = Popen(command, stdout=PIPE, text=True)
port = server.stdout.readline().strip().rpartition(":")[2]
codes = []
for host in ("127.0.0.1", "::"):
    client = Popen([sys.executable, "-m", "echo_async.client", "--host", host, "--port", port, "Hola Server!"])
    codes.append(client.wait())
server.terminate()
print(codes, server.wait())
"""


@pytest.mark.parametrize("options", [("--engine", "threads"), ("--workers", "2"), ("--loop", "asyncio")])
def test_server_in_a_namespace_without_ipv6_serves_ipv4(options: tuple[str, ...]) -> None:
    done = run_in_namespace(WITHOUT_IPV6, sys.executable, "-c", IN_NAMESPACE, *options)
    assert done.stdout == "Hola Server!\nHola Server!\n[0, 0] 0\n", done.stderr
    assert " 127.0.0.1:" in done.stderr
    assert "::ffff:" not in done.stderr


SERVE_NAME = """
import asyncio, sys
import echo_async
from echo_async import sync
from echo_async.testing import HostedServer

async def serve(**options):
    async with echo_async.serve(port=0, **options) as server:
        print("asyncio", [host for host, _ in server.addresses])

asyncio.run(serve(host="localhost"))
asyncio.run(serve(host=["127.0.0.2", "localhost"], udp=True, engine="threads"))
with sync.serve(host="localhost", port=0) as server:
    print("sync", server.address[0], sync.echo("one", "localhost", server.port))
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
    names = {"localhost": ("127.0.0.1", "::1"), "missing.test": ("::2", "::3"), "both.test": ("127.0.0.1", "127.0.0.2")}
    hosts.write_text("".join(f"{each} {name}\n" for name, addresses in names.items() for each in addresses))
    return f"mount --bind '{hosts}' /etc/hosts && {WITHOUT_IPV6}"


def test_name_is_served_on_the_addresses_that_exist(names: str) -> None:
    done = run_in_namespace(names, sys.executable, "-c", SERVE_NAME)
    *lines, given, missing = done.stdout.splitlines()
    assert lines == [
        "asyncio ['127.0.0.1']",
        "asyncio ['127.0.0.2', '127.0.0.1']",
        "sync 127.0.0.1 one",
        "hosted 127.0.0.1",
    ]
    assert given.startswith("cannot listen on [::1]:"), "an address that is given as such is required"
    assert missing.startswith("cannot listen on [::")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("options", "workers"), [(["--host", "localhost", "--port", "0"], "2"), (["--listen", "localhost:0,udp"], "1")]
)
def test_command_serves_a_name_and_logs_what_is_left_out(names: str, options: list[str], workers: str) -> None:
    metrics = ["--metrics-address", "localhost", "--metrics-port", "0"]
    command = (sys.executable, "-m", "echo_async", "server", "--workers", workers, *options, *metrics)
    with command_process(command_in_namespace(names, *command)) as server:
        assert server.startup_line.startswith("listening on 127.0.0.1:")
        server.wait_for_log(" metrics available at http://127.0.0.1:")
        code, log = server.stop()
    assert code == 0
    assert log.count("INFO [::1]:0 not served: this machine does not have the address\n") == 2


METRICS_OF_NAME = """
import sys
from subprocess import PIPE, Popen
from urllib.request import urlopen

options = ["--port", "0", "--metrics-address", "both.test", "--metrics-port", "5739"]
with Popen([sys.executable, "-m", "echo_async.server", *options], stdout=PIPE) as server:
    try:
        server.stdout.readline()
        for host in ("127.0.0.1", "127.0.0.2"):
            with urlopen(f"http://{host}:5739/healthz", timeout=10) as response:
                print(response.read())
    finally:
        server.terminate()
"""


def test_metrics_are_served_on_all_addresses_of_a_name(names: str) -> None:
    done = run_in_namespace(names, sys.executable, "-c", METRICS_OF_NAME)
    assert done.stdout == "b'serving\\n'\n" * 2, done.stderr
