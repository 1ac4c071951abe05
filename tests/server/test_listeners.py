"""Several listeners in one server: each with its own options, counted apart, stopped together."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from support import (
    TIMEOUT,
    Backend,
    ServerProcess,
    command_process,
    receive_all,
    receive_exactly,
    receive_line,
    run,
    scrape_metrics,
    single_error_line,
    wait_until,
)

from echo_async import ServerConfig, StartError
from echo_async.cli.server import main
from echo_async.server.acceptor import AsyncioAcceptor
from echo_async.server.listeners import ListenerConfig
from echo_async.server.server import start_server
from echo_async.server.thread_acceptor import ThreadAcceptor

SERVER = (sys.executable, "-m", "echo_async.server")


class ListeningProcess:
    """A server process, and the addresses of its listeners in their order."""

    def __init__(self, server: ServerProcess, count: int) -> None:
        assert server.process.stdout is not None
        lines = [server.startup_line, *(server.process.stdout.readline() for _ in range(count - 1))]
        self.server = server
        self.names = [line.removeprefix("listening on ").rstrip("\n") for line in lines]

    def connect(self, index: int) -> socket.socket:
        name = self.names[index]
        if name.startswith("/"):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(TIMEOUT)
            client.connect(name)
            return client
        return socket.create_connection(("127.0.0.1", int(name.rpartition(":")[2])), TIMEOUT)

    def stop(self) -> tuple[list[dict[str, int]], str]:
        """Send SIGTERM. Return the counters of each listener, and the log."""
        log = self.server.stop()
        return [counters(log, f"listener {name} stopped: ") for name in self.names], log


def counters(log: str, prefix: str) -> dict[str, int]:
    """The counters that are not 0 in the line of the log that has ``prefix``."""
    [line] = re.findall(f"{re.escape(prefix)}(.*)", log)
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line) if count != "0"}


def add(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part.get(name, 0) for part in parts) for name in set().union(*parts)}


@contextmanager
def listening(
    *specs: str, options: Sequence[str] = (), env: dict[str, str] | None = None
) -> Iterator[ListeningProcess]:
    """Start a server with a listener for each spec."""
    arguments = [word for spec in specs for word in ("--listen", spec)]
    with command_process([*SERVER, *arguments, *options], env) as server:
        yield ListeningProcess(server, len(specs))


def wrap(client: socket.socket, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(client, server_hostname="localhost")


# Each does its own, and all stop together


@pytest.mark.parametrize(
    "variant", [("--engine", "streams", "--loop", "asyncio"), ("--engine", "threads", "--workers", "2")], ids=" ".join
)
def test_listeners_differ_and_one_signal_drains_all(
    variant: tuple[str, ...], certificate: Path, client_context: ssl.SSLContext
) -> None:
    specs = ("0", "0,tls,mode=stream", "0,mode=raw,fault=slice=1")
    with listening(*specs, options=(*variant, "--ssl-certfile", str(certificate))) as listeners, ExitStack() as stack:
        with listeners.connect(0) as client:
            client.sendall(b"Hola\nmore")
            assert receive_all(client) == b"Hola\n"
        with wrap(listeners.connect(1), client_context) as client:
            client.sendall(b"Hola\nmore")
            assert receive_line(client) == b"Hola\n"
        with listeners.connect(2) as client:
            client.sendall(b"Hola\nmore")
            assert receive_exactly(client, 9) == b"Hola\nmore"
        plain, raw = stack.enter_context(listeners.connect(0)), stack.enter_context(listeners.connect(2))
        secure = stack.enter_context(wrap(listeners.connect(1), client_context))
        raw.sendall(b"bytes")
        assert receive_exactly(raw, 5) == b"bytes"
        secure.sendall(b"one\n")
        assert receive_line(secure) == b"one\n"  # the handshake is complete: a shutdown ends those in progress
        for client in (plain, secure):
            client.sendall(b"first ")
        listeners.server.process.send_signal(signal.SIGTERM)
        assert receive_all(raw) == b""  # the shutdown has begun
        for client in (plain, secure):
            client.sendall(b"part\n")
            assert receive_line(client) == b"first part\n"
        log = listeners.server.wait()
    parts = [counters(log, f"listener {name} stopped: ") for name in listeners.names]
    assert [part["accepted"] for part in parts] == [2, 2, 2]
    assert [part.get("messages") for part in parts] == [2, 3, None]
    assert [part.get("fault_slice") for part in parts] == [None, None, 2]
    assert parts[2]["bytes_out"] == 14
    assert counters(log, " server stopped: ") == add(parts)
    assert re.search(r"listener \S+ started: mode message\n.*\n?.*listener \S+ started: mode stream, TLS\n", log)
    assert "server started: 3 listeners, engine " in log


def test_single_listener_logs_as_without_listen() -> None:
    with listening("0,mode=stream", options=("--metrics-port", "0")) as listeners, listeners.connect(0) as client:
        client.sendall(b"one\ntwo\n")
        assert receive_line(client, 8) == b"one\ntwo\n"
        listeners.server.wait_for_log(" server started: ")
        assert scrape_metrics(listeners.server.log)[f"echo_async_listener_messages_total[{listeners.names[0]}]"] == 2
        log = listeners.server.stop()
    assert "server started: mode stream, engine streams\n" in log
    assert "listener" not in log


def test_listeners_identify_with_labels_of_their_own() -> None:
    options = ("--mode", "identify", "--label", "zone=eu-1", "--log-format", "json", "--workers", "2")
    with listening("0", "0,label=role=main", options=options) as listeners:
        for index, own in enumerate([{}, {"role": "main"}]):
            with listeners.connect(index) as client:
                client.sendall(b"Hola\n")
                server = json.loads(receive_line(client))["server"]
            assert (server["address"], server["labels"]) == (listeners.names[index], {"zone": "eu-1", **own})
        log = listeners.server.stop()
    entries = [json.loads(line) for line in log.splitlines()]
    assert {str(entry["labels"]) for entry in entries} == {"{'zone': 'eu-1'}"}
    messages = [entry["listener"] for entry in entries if entry["logger"] == "echo_async.access"]
    assert sorted(messages) == sorted(listeners.names)


def test_sighup_reloads_the_certificate_of_tls_listeners(tmp_path: Path) -> None:
    served = tmp_path / "served.pem"

    def issue() -> ssl.SSLContext:
        authority = trustme.CA()
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(served)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(context)
        return context

    issue()
    with listening("0", "0,tls", "0,tls", options=("--ssl-certfile", str(served))) as listeners:
        context = issue()
        listeners.server.process.send_signal(signal.SIGHUP)
        listeners.server.wait_for_log("SIGHUP received: certificates reloaded\n")

        def has_new_certificate(index: int) -> bool:
            try:
                wrap(listeners.connect(index), context).close()
            except ssl.SSLCertVerificationError:
                return False
            return True

        wait_until(lambda: has_new_certificate(1) and has_new_certificate(2))
        listeners.stop()


# Starting: all or none


def test_group_with_an_address_in_use_starts_nothing(
    backend: Backend, closed_port: int, tmp_path: Path, no_leaks: None
) -> None:
    path = tmp_path / "socket"
    configs = [
        ServerConfig(engine=backend.engine, **address)
        for address in ({"uds": str(path)}, {"port": 0}, {"port": closed_port})
    ]

    async def start() -> None:
        with pytest.raises(StartError, match=f"^cannot listen on 127.0.0.1:{closed_port}: address already in use"):
            await start_server([ListenerConfig(each) for each in configs])

    run(start, backend.loop)
    assert not path.exists()


def test_group_that_fails_at_the_last_server_starts_nothing(
    backend: Backend, tmp_path: Path, no_leaks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All addresses are bound, and servers before the last one accept connections by then."""
    path = tmp_path / "socket"
    configs = [ServerConfig(engine=backend.engine, uds=str(path)), ServerConfig(engine=backend.engine, port=0)]

    async def start() -> None:
        acceptor: Any = ThreadAcceptor if backend.engine == "threads" else AsyncioAcceptor
        starts, original = iter([True, False]), acceptor.start

        async def failing_start(self: object) -> None:
            if not next(starts):
                raise OSError(24, "too many open files")
            await original(self)

        monkeypatch.setattr(acceptor, "start", failing_start)
        with pytest.raises(StartError, match="too many open files"):
            await start_server([ListenerConfig(each) for each in configs])

    run(start, backend.loop)
    assert not path.exists()


def test_listener_that_cannot_start_exits_with_3(
    closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, missing = tmp_path / "socket", tmp_path / "missing.pem"
    for variant in ((), ("--workers", "2")):
        for invalid, reason in (
            (f"{closed_port}", f"127.0.0.1:{closed_port}: address already in use"),
            ("0,tls", f"ssl_certfile {missing}: "),
        ):
            specs = ("--listen", f"unix:{path}", "--listen", invalid)
            assert main([*specs, "--ssl-certfile", str(missing), *variant]) == 3
            assert reason in single_error_line(*capsys.readouterr())
            assert not path.exists()


# Limits


def test_listeners_share_the_descriptor_limit() -> None:
    """One listener that is full leaves the connections of the others to them."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "from echo_async.cli.server import main; sys.exit(main())"
    )
    share = (128 - 32 - 3 * 8 - 10) // 2  # reserved for the process, and for each listener; the third has 10
    specs = ("--listen", "0", "--listen", "0", "--listen", "0,limit-connections=10")
    command = [sys.executable, "-c", program, *specs, "--mode", "stream"]
    with command_process(command) as server, ExitStack() as stack:
        listeners = ListeningProcess(server, 3)
        for index, expected in ((0, share), (1, share), (2, 10)):
            clients = [stack.enter_context(listeners.connect(index)) for _ in range(60)]
            answered = 0
            for client in clients:
                try:
                    client.sendall(b"one\n")
                    answered += client.recv(100) == b"one\n"
                except ConnectionError:
                    pass
            assert answered == expected
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 128
        parts, log = listeners.stop()
    assert [part["accepted"] for part in parts] == [share, share, 10]
    assert [part["refused"] for part in parts] == [60 - share, 60 - share, 50]
    assert "accept failed" not in log


# Counters, metrics and logs


def test_workers_counters_of_each_listener_add_up() -> None:
    options = ("--workers", "2", "--engine", "threads", "--no-access-log", "--mode", "stream", "--metrics-port", "0")
    with listening("0", "0,fault=duplicate", options=options) as listeners, ExitStack() as stack:
        server = listeners.server
        server.wait_for_log(" server started: ")
        for number in range(60):
            index = int(number % 3 == 2)
            client = stack.enter_context(listeners.connect(index))
            client.sendall(b"hello\n")
            assert receive_line(client, 6 * (index + 1)) == b"hello\n" * (index + 1)
        samples = scrape_metrics(server.log)
        for metric, parts in {
            "connections_accepted_total": (40, 20),
            "connections_active": (40, 20),
            "messages_total": (40, 20),
            "received_bytes_total": (240, 120),
            "sent_bytes_total": (240, 240),
        }.items():
            found = [samples[f"echo_async_listener_{metric}[{name}]"] for name in listeners.names]
            assert (metric, *found) == (metric, *parts)
            assert samples[f"echo_async_{metric}"] == sum(parts)
        names = "".join(f"[{value}]" for value in ("duplicate", listeners.names[1]))
        assert (
            samples[f"echo_async_listener_faults_total{names}"] == samples["echo_async_faults_total[duplicate]"] == 20
        )
        stack.close()
        stopped, log = listeners.stop()
    assert stopped == [
        {"accepted": 40, "messages": 40, "bytes_in": 240, "bytes_out": 240, "ended_closed": 40},
        {"accepted": 20, "messages": 20, "bytes_in": 120, "bytes_out": 240, "ended_closed": 20, "fault_duplicate": 20},
    ]
    assert counters(log, " server stopped: ") == add(stopped)
