"""Several listeners in one server: each with its own options, counted apart, stopped together."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import ssl
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import (
    Backend,
    connect,
    connect_tls,
    counters,
    is_echoed,
    listening,
    receive_all,
    receive_exactly,
    receive_line,
    run,
    scrape_metrics,
    single_error_line,
)

from echo_async import ServerConfig, StartError
from echo_async.cli.server import main
from echo_async.server.acceptor import AsyncioAcceptor
from echo_async.server.listeners import ListenerConfig
from echo_async.server.server import start_server
from echo_async.server.thread_acceptor import ThreadAcceptor


def add(parts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part.get(name, 0) for part in parts) for name in set().union(*parts)}


@pytest.mark.parametrize(
    "variant", [("--engine", "streams", "--loop", "asyncio"), ("--engine", "threads", "--workers", "2")], ids=" ".join
)
def test_listeners_differ_and_one_signal_drains_all(
    variant: tuple[str, ...], certificate: Path, client_context: ssl.SSLContext
) -> None:
    specs = ("0", "0,tls,mode=stream", "0,mode=raw,fault=slice=1")
    options = (*variant, "--ssl-certfile", str(certificate))
    with listening(*specs, options=options) as (server, listeners), ExitStack() as stack:
        with connect(listeners[0]) as client:
            client.sendall(b"Hola\nmore")
            assert receive_all(client) == b"Hola\n"
        plain, raw = (stack.enter_context(connect(listeners[index])) for index in (0, 2))
        secure = stack.enter_context(connect_tls(listeners[1], client_context))
        raw.sendall(b"bytes")
        assert receive_exactly(raw, 5) == b"bytes"
        assert is_echoed(secure, b"Hola\n")  # the handshake is complete: a shutdown ends those in progress
        for client in (plain, secure):
            client.sendall(b"first ")
        server.process.send_signal(signal.SIGTERM)
        assert receive_all(raw) == b""  # the shutdown has begun
        for client in (plain, secure):
            client.sendall(b"part\n")
            assert receive_line(client) == b"first part\n"
        log = server.wait()
    parts = [counters(log, f"listener {each.name} stopped: ") for each in listeners]
    expected = [(2, 2, 16, None), (1, 2, 16, None), (1, None, 5, 1)]
    names = ("accepted", "messages", "bytes_out", "fault_slice")
    assert [tuple(map(part.get, names)) for part in parts] == expected
    assert counters(log) == add(parts)
    assert re.search(r"listener \S+ started: mode message\n.*\n?.*listener \S+ started: mode stream, TLS\n", log)
    assert "server started: 3 listeners, engine " in log


def test_single_listener_logs_as_without_listen() -> None:
    with listening("0,mode=stream", options=("--metrics-port", "0")) as (server, [listener]):
        with connect(listener) as client:
            assert is_echoed(client)
        server.wait_for_log(" server started: ")
        assert scrape_metrics(server.log)[f"echo_async_listener_messages_total[{listener.name}]"] == 1
        log = server.stop()
    assert "server started: mode stream, engine streams\n" in log
    assert "listener" not in log


def test_listeners_identify_with_labels_of_their_own() -> None:
    options = ("--mode", "identify", "--label", "zone=eu-1", "--log-format", "json", "--workers", "2")
    with listening("0", "0,label=role=main", options=options) as (process, listeners):
        for listener, own in zip(listeners, [{}, {"role": "main"}], strict=True):
            with connect(listener) as client:
                client.sendall(b"Hola\n")
                server = json.loads(receive_line(client))["server"]
            assert (server["address"], server["labels"]) == (listener.name, {"zone": "eu-1", **own})
        entries = [json.loads(line) for line in process.stop().splitlines()]
    assert {str(entry["labels"]) for entry in entries} == {"{'zone': 'eu-1'}"}
    messages = [entry["listener"] for entry in entries if entry["logger"] == "echo_async.access"]
    assert sorted(messages) == sorted(each.name for each in listeners)


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
    closed_port: int, tmp_path: Path, no_leaks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path, missing = tmp_path / "socket", tmp_path / "missing.pem"
    for variant in ((), ("--engine", "threads"), ("--workers", "2")):
        for invalid, reason in (
            (f"{closed_port}", f"cannot listen on 127.0.0.1:{closed_port}: address already in use"),
            ("0,tls", f"ssl_certfile {missing}: "),
        ):
            specs = ("--listen", f"unix:{path}", "--listen", "0", "--listen", invalid)
            assert main([*specs, "--ssl-certfile", str(missing), *variant]) == 3
            assert reason in single_error_line(*capsys.readouterr())
            assert not path.exists()


def test_listeners_share_the_descriptor_limit() -> None:
    """One listener that is full leaves the connections of the others to them."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (128, 128))
    share = (128 - 32 - 3 * 8 - 10) // 2  # reserved for the process, and for each listener; the third has 10
    specs, places = ("0", "0", "0,limit-connections=10"), [share, share, 10]
    options = ("--mode", "stream")
    with listening(*specs, options=options, preexec_fn=limit) as (server, listeners), ExitStack() as stack:
        for listener, expected in zip(listeners, places, strict=True):
            clients = [stack.enter_context(connect(listener)) for _ in range(60)]
            answered = 0
            for client in clients:
                with suppress(ConnectionError):
                    client.sendall(b"one\n")
                    answered += client.recv(100) == b"one\n"
            assert answered == expected
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 128
        log = server.stop()
    parts = [counters(log, f"listener {each.name} stopped: ") for each in listeners]
    assert [(part["accepted"], part["refused"]) for part in parts] == [(each, 60 - each) for each in places]
    assert "accept failed" not in log


def test_workers_counters_of_each_listener_add_up() -> None:
    options = ("--workers", "2", "--engine", "threads", "--no-access-log", "--mode", "stream", "--metrics-port", "0")
    with listening("0", "0,fault=duplicate", options=options) as (server, listeners):
        server.wait_for_log(" server started: ")
        with ExitStack() as stack:
            for number in range(60):
                times = 1 + (number % 3 == 2)
                client = stack.enter_context(connect(listeners[times - 1]))
                client.sendall(b"hello\n")
                assert receive_line(client, 6 * times) == times * b"hello\n"
            samples = scrape_metrics(server.log)
        log = server.stop()
    for metric, parts in {
        "connections_accepted_total": [40, 20],
        "connections_active": [40, 20],
        "messages_total": [40, 20],
        "received_bytes_total": [240, 120],
        "sent_bytes_total": [240, 240],
    }.items():
        found = [samples[f"echo_async_listener_{metric}[{each.name}]"] for each in listeners]
        assert (metric, found, samples[f"echo_async_{metric}"]) == (metric, parts, sum(parts))
    assert samples[f"echo_async_listener_faults_total[duplicate][{listeners[1].name}]"] == 20
    assert samples["echo_async_faults_total[duplicate]"] == 20
    stopped = [counters(log, f"listener {each.name} stopped: ") for each in listeners]
    assert stopped == [
        {"accepted": 40, "messages": 40, "bytes_in": 240, "bytes_out": 240, "ended_closed": 40},
        {"accepted": 20, "messages": 20, "bytes_in": 120, "bytes_out": 240, "ended_closed": 20, "fault_duplicate": 20},
    ]
    assert counters(log) == add(stopped)
