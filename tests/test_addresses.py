"""Addresses that need care, in network namespaces: a client connected to itself."""

from __future__ import annotations

import json
import sys

import pytest
from support import LOOPS, run_in_namespace

PYTHON = sys.executable
COMMAND = (PYTHON, "-m", "echo_async")
CLIENTS = (*LOOPS, "sync")
PORT = "40000"
PORTS = "echo '{} {}' >/proc/sys/net/ipv4/ip_local_port_range"  # the ports that the system selects for clients
ONE_PORT, TWO_PORTS = PORTS.format(PORT, PORT), PORTS.format(PORT, 40001)

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


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::"])
@pytest.mark.parametrize("client", CLIENTS)
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
