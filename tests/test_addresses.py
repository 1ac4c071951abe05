"""Addresses that need care, in network namespaces: a client connected to itself, zones, names with a final dot."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import pytest
from support import BACKENDS, LOOPS, Backend, run_in_namespace

import echo_async
from echo_async import sync

PYTHON = sys.executable
COMMAND = (PYTHON, "-m", "echo_async")
CLIENTS = (*LOOPS, "sync")
PORT = "40000"
PORTS = "echo '{} {}' >/proc/sys/net/ipv4/ip_local_port_range"  # the ports that the system selects for clients
ONE_PORT, TWO_PORTS = PORTS.format(PORT, PORT), PORTS.format(PORT, 40001)
LINK_LOCAL = "ip addr add fe80::1/64 dev lo nodad"
ZONE = "fe80::1%lo"

ECHO = """
import asyncio, logging, os, sys
import echo_async
from echo_async import sync
from echo_async.loops import loop_factory

def echo(client, host, port, **options):
    if client == "sync":
        return sync.echo("hola", host, int(port), **options)
    with asyncio.Runner(loop_factory=loop_factory(client)) as runner:
        return runner.run(echo_async.echo("hola", host, int(port), **options))
"""

# A client connected to itself

CONNECT_TO_ITSELF = """
for _ in range(3):
    try:
        print(echo(*sys.argv[1:]))
    except echo_async.ConnectError as error:
        print(type(error.__cause__).__name__, error)
with sync.serve(host=sys.argv[2], port=int(sys.argv[3])):
    print("served")
"""


@pytest.mark.parametrize(
    ("client", "host"),
    [*product(("asyncio", "sync"), ("127.0.0.1", "::1")), ("uvloop", "0.0.0.0"), ("uvloop", "::"), ("sync", "::")],
)
def test_connection_to_itself_is_refused_and_frees_port(client: str, host: str) -> None:
    done = run_in_namespace(ONE_PORT, PYTHON, "-c", ECHO + CONNECT_TO_ITSELF, client, host, PORT)
    *errors, last = done.stdout.splitlines()
    name = f"[{host}]" if ":" in host else host
    text = f"cannot connect to {name}:{PORT}: connection refused; is the server running?"
    assert errors == 3 * [f"ConnectionRefusedError {text}"], done.stderr
    assert last == "served"


RETRY = """
servers = []

class StartServer(logging.Handler):
    def emit(self, record):
        if "retrying" in record.getMessage() and not servers:
            servers.append(sync.serve(port=int(sys.argv[3])))

log = logging.getLogger("echo_async.client")
log.setLevel(logging.DEBUG)
log.addHandler(StartServer())
print(echo(*sys.argv[1:], retry=10))
with servers[0] as server:
    print(server.stats.messages)
"""


@pytest.mark.parametrize("client", CLIENTS)
def test_connection_to_itself_is_retried(client: str) -> None:
    done = run_in_namespace(TWO_PORTS, PYTHON, "-c", ECHO + RETRY, client, "127.0.0.1", PORT)
    assert done.stdout == "hola\n1\n", done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("client", "hola"),
        ("client", "--udp"),
        ("client", "--count", "2"),
        ("bench", "load"),
        ("bench", "load", "--udp"),
    ],
    ids=" ".join,
)
def test_command_connected_to_itself_is_refused(options: tuple[str, ...]) -> None:
    done = run_in_namespace(ONE_PORT, *COMMAND, *options, "--json", "--port", PORT)
    assert done.returncode == 3
    assert done.stderr == f"error: cannot connect to 127.0.0.1:{PORT}: connection refused; is the server running?\n"
    if options[0] == "client":
        assert json.loads(done.stdout)["error"]["kind"] == "refused"


LOAD = """
import json, socket, sys
from time import perf_counter
from echo_async.bench.generator import LoadGenerator
from echo_async.bench.plan import LoadPlan

options = json.loads(sys.argv[1])
family = socket.AF_INET6 if ":" in options["address"][0] else socket.AF_INET
plan = LoadPlan.from_json({"family": family, "connections": 1, "duration": 0.2, "warmup": 0, "timeout": 0.2, **options})
generator = LoadGenerator(plan)
generator.connect()
recorder = generator.run(perf_counter())
print(len(recorder.counts), *recorder.failures)
"""
LOADS = [
    {"address": ["127.0.0.1", 40000]},
    {"address": ["127.0.0.1", 40000], "mode": "message"},
    {"address": ["127.0.1.1", 40000], "mode": "message"},  # one of the source addresses of the load
    {"address": ["::1", 40000, 0, 0]},
    {"address": ["::1", 40000, 0, 0], "mode": "message"},
    {"address": ["127.0.0.1", 40000], "udp": True},
]


@pytest.mark.parametrize("options", LOADS, ids=str)
def test_load_connected_to_itself_is_refused(options: dict[str, object]) -> None:
    done = run_in_namespace(ONE_PORT, PYTHON, "-c", LOAD, json.dumps(options))
    assert done.stdout == "0 connection refused\n", done.stderr


IDLE = """
import socket, sys
from echo_async import EchoError
from echo_async.bench.disturbance import open_idle_connections
from echo_async.bench.plan import LoadPlan

try:
    with open_idle_connections(LoadPlan(family=socket.AF_INET6, address=("::1", int(sys.argv[1]), 0, 0)), 1):
        print("opened")
except EchoError as error:
    print(error)
"""


def test_idle_connection_to_itself_is_refused() -> None:
    done = run_in_namespace(ONE_PORT, PYTHON, "-c", IDLE, PORT)
    assert done.stdout == "cannot open 1 idle connections: connection refused\n", done.stderr


# Zones

SERVE = """
async def main():
    async with echo_async.serve(host=sys.argv[1], port=0, engine=sys.argv[2]) as server:
        replies = [await asyncio.to_thread(echo, client, *server.address) for client in ("asyncio", "uvloop", "sync")]
        print(server.address[0], *replies)

with asyncio.Runner(loop_factory=loop_factory(sys.argv[3])) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("backend", BACKENDS, ids="-".join)
def test_server_address_with_a_zone_reaches_it(backend: Backend) -> None:
    done = run_in_namespace(LINK_LOCAL, PYTHON, "-c", ECHO + SERVE, ZONE, *backend)
    assert done.stdout == f"{ZONE} hola hola hola\n", done.stderr


LOAD_OPTIONS = ("--duration", "0.1", "--warmup", "0", "--connections", "1", "--json")


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ((), ("client", "hola")),
        (("--udp",), ("client", "--udp")),
        (("--proxy-protocol", "v1", "--proxy-allow-from", "fe80::/10"), ("client", "--send-proxy", "v1", "hola")),
        (("--mode", "stream"), ("bench", "load", "--mode", "stream", *LOAD_OPTIONS)),
        (("--udp",), ("bench", "load", "--udp", *LOAD_OPTIONS)),
        (("--listen", f"[{ZONE}]:0"), ("client", "hola")),
    ],
    ids=lambda options: " ".join(options),
)
def test_command_connects_to_address_with_a_zone(server: tuple[str, ...], client: tuple[str, ...]) -> None:
    address = () if "--listen" in server else ("--host", ZONE)
    udp = ("--udp-allow-from", "fe80::/10") if "--udp" in server else ()
    done = run_in_namespace(LINK_LOCAL, *COMMAND, "run", *address, *server, *udp, "--", *COMMAND, *client)
    assert done.returncode == 0, done.stdout + done.stderr
    if "--json" in client:
        assert json.loads(done.stdout)["address"].startswith(f"[{ZONE}]:")


def test_identify_reports_zones_of_both_addresses() -> None:
    server = ("run", "--host", ZONE, "--mode", "identify")
    done = run_in_namespace(LINK_LOCAL, *COMMAND, *server, "--", *COMMAND, "client", "--identify", "hola")
    identity = json.loads(done.stdout)
    assert identity["client"]["address"] == ZONE
    assert identity["server"]["address"].startswith(f"[{ZONE}]:")


def test_log_shows_zones_of_all_addresses() -> None:
    options = ("--host", ZONE, "--metrics-port", "0", "--metrics-address", ZONE, "--log-level", "info")
    done = run_in_namespace(LINK_LOCAL, *COMMAND, "run", *options, "--", *COMMAND, "client", "hola")
    assert f"metrics available at http://[{ZONE}]:" in done.stderr
    assert f" [{ZONE}]:" in next(line for line in done.stderr.splitlines() if "hola" in line)


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31m"])
def test_error_escapes_control_characters_of_the_host(text: str) -> None:
    with pytest.raises(echo_async.ConnectError) as caught:
        sync.connect(text)
    assert str(caught.value).isprintable()


# Names with a final dot

NAME = "localhost."
ECHO_OVER_TLS = """
import ssl
from echo_async.testing import HostedServer

host, name, certificate, authority = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
with sync.serve(port=0, ssl_certfile=certificate) as server:
    for client in ("asyncio", "uvloop", "sync"):
        print(echo(client, host, server.port, ssl=context, server_hostname=name or None))
"""
ADDRESSES = pytest.mark.parametrize(
    ("host", "name"), [(NAME, ""), ("127.0.0.1", NAME)], ids=["host", "server_hostname"]
)


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    """The shell command that lets the resolver know the name."""
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost {NAME}\n")
    return f"mount --bind '{tmp_path}/hosts' /etc/hosts"


@ADDRESSES
def test_tls_name_with_a_final_dot_is_verified(
    host: str, name: str, hosts: str, certificate: Path, ca_file: Path
) -> None:
    arguments = (host, name, str(certificate), str(ca_file))
    done = run_in_namespace(hosts, PYTHON, "-c", ECHO + ECHO_OVER_TLS, *arguments)
    assert done.stdout == "hola\nhola\nhola\n", done.stderr


@pytest.mark.parametrize(
    ("client", "host", "name"),
    [(("client", "hola"), "127.0.0.1", NAME), (("bench", "load", *LOAD_OPTIONS), NAME, "")],
    ids=["client", "bench"],
)
def test_command_verifies_name_with_a_final_dot(
    client: tuple[str, ...], host: str, name: str, hosts: str, certificate: Path, ca_file: Path
) -> None:
    options = ("--ssl-ca-certs", str(ca_file), "--host", host, *(("--server-hostname", name) if name else ()))
    server = ("run", "--ssl-certfile", str(certificate))
    done = run_in_namespace(hosts, *COMMAND, *server, "--", *COMMAND, *client, *options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sni_has_no_final_dot(certificate: Path, ca_file: Path) -> None:
    server = ("run", "--ssl-certfile", str(certificate), "--mode", "identify")
    client = ("client", "--identify", "--ssl-ca-certs", str(ca_file), "--server-hostname", NAME, "hola")
    done = run_in_namespace("true", *COMMAND, *server, "--", *COMMAND, *client)
    assert json.loads(done.stdout)["tls"]["sni"] == "localhost"
