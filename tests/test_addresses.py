"""Addresses that need care, most in network namespaces: a client connected to itself, zones, names with a final dot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import resolve_to, run_in_namespace

import echo_async
from echo_async import sync
from echo_async.client.endpoint import Endpoint

PORTS = "echo '40000 {}' >/proc/sys/net/ipv4/ip_local_port_range"  # the ports that the system selects for clients
ONE_PORT, TWO_PORTS = PORTS.format(40000), PORTS.format(40001)
LINK_LOCAL = "ip addr add fe80::1/64 dev lo nodad"
ZONE = "fe80::1%lo"

ECHO = """
import asyncio, json, logging, socket, ssl, sys
from contextlib import redirect_stderr, redirect_stdout
from tempfile import TemporaryFile
import echo_async
from echo_async import sync
from echo_async.cli.main import main
from echo_async.loops import loop_factory
from echo_async.testing import HostedServer

def echo(client, host, port, **options):
    if client == "sync":
        return sync.echo("hola", host, int(port), **options)
    with asyncio.Runner(loop_factory=loop_factory(client)) as runner:
        return runner.run(echo_async.echo("hola", host, int(port), **options))

def command(words):
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
        out.seek(0), err.seek(0)
        return code, out.read(), err.read()
"""


def run_code(setup: str, code: str, *arguments: str) -> list[str]:
    """Run code in a namespace, after ``ECHO``; return the lines that it prints."""
    done = run_in_namespace(setup, sys.executable, "-c", ECHO + code, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_resolve_interleaves_address_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable family delays a connection by one attempt, however many addresses it has (RFC 8305)."""
    addresses = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1", "192.0.2.2", "192.0.2.1"]
    resolve_to(monkeypatch, *((each, 7) for each in addresses))
    found = [info[4][0] for info in Endpoint("several.example", 7).resolve()]
    assert found == ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "2001:db8::3"]


# A client connected to itself

CONNECT_TO_ITSELF = """
clients = [*((client, host) for client in ("asyncio", "sync") for host in ("127.0.0.1", "::1"))]
for client, host in [*clients, ("uvloop", "0.0.0.0"), ("uvloop", "::"), ("sync", "::")]:
    for _ in range(2):
        try:
            print(echo(client, host, 40000))
        except echo_async.ConnectError as error:
            name = f"[{host}]" if ":" in host else host
            assert isinstance(error.__cause__, ConnectionRefusedError), error
            assert str(error) == f"cannot connect to {name}:40000: connection refused; is the server running?", error
    with sync.serve(host=host, port=40000):
        print("served")
"""


def test_connection_to_itself_is_refused_and_frees_port() -> None:
    assert run_code(ONE_PORT, CONNECT_TO_ITSELF) == ["served"] * 7


RETRY = """
servers = []

class StartServer(logging.Handler):
    def emit(self, record):
        if "retrying" in record.getMessage() and not servers:
            servers.append(sync.serve(port=40000))

log = logging.getLogger("echo_async.client")
log.setLevel(logging.DEBUG)
log.addHandler(StartServer())
for client in ("asyncio", "sync"):
    print(echo(client, "127.0.0.1", 40000, retry=10))
    with servers.pop() as server:
        print(server.stats.messages)
"""


def test_connection_to_itself_is_retried() -> None:
    assert run_code(TWO_PORTS, RETRY) == ["hola", "1"] * 2


COMMANDS_AND_LOADS = """
from time import perf_counter
from echo_async.bench.disturbance import open_idle_connections
from echo_async.bench.generator import LoadGenerator
from echo_async.bench.plan import LoadPlan

for words in ("client hola", "client --udp", "client --count 2", "bench load", "bench load --udp"):
    code, out, err = command([*words.split(), "--json", "--port", "40000"])
    assert err == "error: cannot connect to 127.0.0.1:40000: connection refused; is the server running?\\n", err
    print(code, json.loads(out)["error"]["kind"] if out else "")
try:
    with open_idle_connections(LoadPlan(family=socket.AF_INET6, address=("::1", 40000, 0, 0)), 1):
        print("opened")
except echo_async.EchoError as error:
    print(error)
for address, options in (
    (["127.0.0.1", 40000], {}),
    (["127.0.0.1", 40000], {"udp": True}),
    (["127.0.0.2", 40000], {"mode": "message"}),
    (["127.0.1.1", 40000], {"mode": "message"}),  # one of the source addresses of the load
    (["::1", 40000, 0, 0], {}),
):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    options = {"family": family, "address": address, "connections": 1, "timeout": 0.1, **options}
    generator = LoadGenerator(LoadPlan.from_json({"duration": 0.1, "warmup": 0, **options}))
    generator.connect()
    recorder = generator.run(perf_counter())
    print(len(recorder.counts), *recorder.failures)
"""


def test_command_or_load_connected_to_itself_is_refused() -> None:
    commands = ["3 refused"] * 3 + ["3 "] * 2
    idle = "cannot open 1 idle connections: connection refused"
    assert run_code(ONE_PORT, COMMANDS_AND_LOADS) == [*commands, idle, *["0 connection refused"] * 5]


# Zones

SERVE = """
async def serve(engine):
    async with echo_async.serve(host=sys.argv[1], port=0, engine=engine) as server:
        replies = [await asyncio.to_thread(echo, client, *server.address) for client in ("asyncio", "uvloop", "sync")]
        print(server.address[0], *replies)

for engine in ("streams", "protocol", "threads"):
    for loop in ("asyncio", "uvloop"):
        with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
            runner.run(serve(engine))
"""


def test_server_address_with_a_zone_reaches_it() -> None:
    assert run_code(LINK_LOCAL, SERVE, ZONE) == [f"{ZONE} hola hola hola"] * 6


LOAD_OPTIONS = ("--duration", "0.1", "--warmup", "0", "--connections", "1", "--json")
COMMANDS = """
load = sys.argv[2:]
for options, words in (
    ({}, ["client", "hola"]),
    ({"udp": True, "udp_allow_from": "fe80::/10"}, ["client", "--udp"]),
    ({"proxy_protocol": "v1", "proxy_allow_from": "fe80::/10"}, ["client", "--send-proxy", "v1", "hola"]),
    ({}, ["bench", "load", "--mode", "stream", *load]),
    ({"udp": True, "udp_allow_from": "fe80::/10"}, ["bench", "load", "--udp", *load]),
):
    with HostedServer(host=sys.argv[1], **options) as server:
        code, out, err = command([*words, "--host", server.address[0], "--port", str(server.port)])
    assert code == 0, err
    assert "--json" not in words or json.loads(out)["address"].startswith(f"[{sys.argv[1]}]:"), out
"""


def test_commands_connect_to_address_with_a_zone() -> None:
    run_code(LINK_LOCAL, COMMANDS, ZONE, *LOAD_OPTIONS)


def test_log_and_identify_show_zones_of_all_addresses() -> None:
    metrics = ("--metrics-port", "0", "--metrics-address", ZONE, "--log-level", "info")
    command = (sys.executable, "-m", "echo_async")
    server = (*command, "run", "--listen", f"[{ZONE}]:0,mode=identify", *metrics)
    done = run_in_namespace(LINK_LOCAL, *server, "--", *command, "client", "--identify", "hola")
    identity = json.loads(done.stdout)
    assert identity["client"]["address"] == ZONE
    assert identity["server"]["address"].startswith(f"[{ZONE}]:")
    assert f"metrics available at http://[{ZONE}]:" in done.stderr
    assert f" [{ZONE}]:" in next(line for line in done.stderr.splitlines() if "hola" in line)


def test_error_escapes_control_characters_of_the_host() -> None:
    for text in ("a\nb", "\x1b[31m"):
        with pytest.raises(echo_async.ConnectError) as caught:
            sync.connect(text)
        assert str(caught.value).isprintable()


# Names with a final dot

NAME = "localhost."
OVER_TLS = """
certificate, authority, name, *load = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
with HostedServer(ssl_certfile=certificate, mode="identify") as server, sync.connect(
    "127.0.0.1", server.port, ssl=context, server_hostname=name
) as client:
    print(client.identify("hola").tls.sni)
with HostedServer(ssl_certfile=certificate) as server:
    for host, server_hostname in ((name, None), ("127.0.0.1", name)):
        for client in ("asyncio", "uvloop", "sync"):
            print(echo(client, host, server.port, ssl=context, server_hostname=server_hostname))
    for words in (
        ["client", "hola", "--host", "127.0.0.1", "--server-hostname", name],
        ["bench", "load", *load, "--host", name],
    ):
        code, _, err = command([*words, "--ssl-ca-certs", authority, "--port", str(server.port)])
        assert code == 0, err
"""


def test_name_with_a_final_dot_is_verified_without_it(tmp_path: Path, certificate: Path, ca_file: Path) -> None:
    """The resolver gets the dot; SNI and the verification of the certificate do not."""
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost {NAME}\n")
    hosts = f"mount --bind '{tmp_path}/hosts' /etc/hosts"
    lines = run_code(hosts, OVER_TLS, str(certificate), str(ca_file), NAME, *LOAD_OPTIONS)
    assert lines == ["localhost", *["hola"] * 6]
