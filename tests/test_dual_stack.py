"""``--host ::`` and several hosts: clients of both families reach the server, and IPv4 clients are shown as such."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import ssl
import subprocess
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
    command_process,
    receive_all,
    receive_line,
    server_process,
    wait_until,
)

import echo_async


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")

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
    with start_server(host="::", mode="stream", **PORTS[port]) as server:
        assert server.addresses == [("::", server.port)]
        for host in ("127.0.0.1", "::1"):
            with connect_to((host, server.port or 0), client_context if port == "tls" else None) as client:
                assert_echoed(client, header + b"Hola Server!\n")
                line = f"{name_of(client)} 13 bytes: Hola Server!"
                wait_until(lambda line=line: line in caplog.messages)  # type: ignore[misc]
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
@pytest.mark.parametrize("engine", ["streams", "protocol", "threads"])
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
    arguments = ["Hola Server!"] if command == "client" else ["load", "--duration", "0.1", "--warmup", "0"]
    words = [sys.executable, "-m", f"echo_async.{command}", *arguments, "--host", host, "--port", str(port)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr


@needs_ipv6
@pytest.mark.parametrize("host", ["::", "127.0.0.1", "::1"])
@pytest.mark.parametrize("command", ["client", "bench"])
def test_commands_reach_a_server_on_all_addresses(host: str, command: str) -> None:
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
        wait_until(lambda: " metrics available at " in server.log)
        assert [get_health(host, server.log) for host in ("127.0.0.1", "::1")] == [b"serving\n"] * 2


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--host", "127.0.0.1", "--host", "127.0.0.2"], ""),
        ([], "127.0.0.1,127.0.0.2"),
        ([], " 127.0.0.1, 127.0.0.2 "),
        ([], "127.0.0.1 127.0.0.2"),
        (["--host", "127.0.0.1", "--host", "127.0.0.2"], "no-such-host.invalid"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_command_with_several_hosts_uses_one_port(arguments: list[str], environment: str, workers: str) -> None:
    with server_process(*arguments, "--workers", workers, env={"ECHO_ASYNC_HOST": environment}) as server:
        port = server.address[1]
        assert server.startup_line == f"listening on 127.0.0.1:{port}\n"
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == f"listening on 127.0.0.2:{port}\n"
        for host in ("127.0.0.1", "127.0.0.2"):
            with connect_to((host, port)) as client:
                assert_echoed(client)


@pytest.mark.parametrize("host", [(), ("127.0.0.1", ""), ["127.0.0.1", 1], ("a\0b",)])
def test_config_with_an_invalid_host_among_several_raises(host: Any) -> None:
    with pytest.raises(echo_async.ConfigError, match=r"^invalid host: .* \(must be a host name or an address\)$"):
        echo_async.ServerConfig(host=host)


OLD_KERNEL = """
import errno, socket, sys

class OldKernel(socket.socket):
    def __init__(self, family=-1, *args, **more):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        super().__init__(family, *args, **more)

socket.socket = OldKernel
from echo_async.cli.server import main
sys.exit(main())
"""


def command_without_ipv6(*arguments: str) -> AbstractContextManager[ServerProcess]:
    words = ["--host", "::", "--port", "0", "--loop", "asyncio", *arguments]
    return command_process([sys.executable, "-c", OLD_KERNEL, *words])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_command_on_a_kernel_without_ipv6_uses_ipv4(workers: str) -> None:
    with command_without_ipv6("--workers", workers, "--metrics-port", "0", "--metrics-address", "::") as server:
        assert server.startup_line.startswith("listening on 0.0.0.0:")
        with connect_to(("127.0.0.1", server.address[1])) as client:
            assert_echoed(client)
        wait_until(lambda: " metrics available at " in server.log)
        assert get_health("127.0.0.1", server.log) == b"serving\n"
        assert server.stop()[0] == 0


NAMESPACE = """
ip link set lo up && sysctl -qw net.ipv6.conf.all.disable_ipv6=1 && exec "$@"
"""
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


def can_make_namespace() -> bool:
    if not all(map(shutil.which, ("unshare", "ip", "sysctl"))):
        return False
    return subprocess.run(["unshare", "-rn", "sh", "-c", NAMESPACE, "sh", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_make_namespace(), reason="this user may not make a network namespace")
@pytest.mark.parametrize("options", [(), ("--engine", "threads"), ("--workers", "2"), ("--loop", "asyncio")])
def test_server_in_a_namespace_without_ipv6_serves_ipv4(options: tuple[str, ...]) -> None:
    command = ["unshare", "-rn", "sh", "-c", NAMESPACE, "sh", sys.executable, "-c", IN_NAMESPACE, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout == "Hola Server!\nHola Server!\n[0, 0] 0\n", done.stderr
    assert " 127.0.0.1:" in done.stderr
    assert "::ffff:" not in done.stderr
