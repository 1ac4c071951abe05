"""``bench load --udp`` against UDP servers that echo, drop, duplicate and corrupt datagrams, and disappear."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from support import Cli, ScriptedDatagrams, StartDatagrams, resolve_to

from echo_async.bench.generator import LoadGenerator
from echo_async.bench.load import find_udp_server
from echo_async.bench.plan import LoadPlan
from echo_async.bench.recorder import Recorder
from echo_async.bench.report import print_load
from echo_async.bench.result import Distribution, LoadResult
from echo_async.errors import ConnectTimeout


def run_load(server: ScriptedDatagrams, **options: Any) -> Recorder:
    """Run a load in this process."""
    defaults = {"size": 100, "connections": 2, "duration": 0.3, "warmup": 0.0, "timeout": 5.0}
    plan = LoadPlan(udp=True, family=socket.AF_INET, address=server.address, **{**defaults, **options})
    generator = LoadGenerator(LoadPlan.from_json(json.loads(json.dumps(asdict(plan)))))
    generator.connect()
    return generator.run(perf_counter())


def drop_tenth(number: int, data: bytes) -> Iterable[bytes]:
    return [] if int.from_bytes(data[:4], "big") % 10 == 3 else [data]


def count_dropped(server: ScriptedDatagrams) -> int:
    return sum(not drop_tenth(0, data) for data in server.received)


@pytest.mark.parametrize(("rate", "size"), [(None, 2), (None, 65_507), (1000.0, 100)])
def test_udp_load_without_loss_is_answered(start_datagrams: StartDatagrams, rate: float | None, size: int) -> None:
    server = start_datagrams()
    recorder = run_load(server, rate=rate, size=size, connections=1 if size > 100 else 3, duration=0.1)
    assert (recorder.lost, recorder.failures, recorder.mismatch, recorder.duplicated) == (0, {}, None, 0)
    assert len(server.received) == sum(recorder.counts) > 0
    assert {len(data) for data in server.received} == {size}


def test_udp_load_lost_is_what_was_dropped(start_datagrams: StartDatagrams) -> None:
    """In a closed loop and in an open one, at the same time."""
    servers = [start_datagrams(drop_tenth), start_datagrams(drop_tenth)]
    options: list[dict[str, Any]] = [{"pipeline": 4}, {"rate": 500.0}]
    with ThreadPoolExecutor() as pool:
        load = partial(run_load, timeout=1.5, connections=1)
        running = [pool.submit(load, server, **each) for server, each in zip(servers, options, strict=True)]
    for server, recorder in zip(servers, (each.result() for each in running), strict=True):
        assert recorder.lost == count_dropped(server) > 0
        assert recorder.lost + sum(recorder.counts) == len(server.received)
        assert all(reason.startswith("reply timeout: no reply within 1.5 s") for reason in recorder.failures)


def test_udp_load_counts_duplicates(start_datagrams: StartDatagrams) -> None:
    recorder = run_load(start_datagrams(lambda number, data: [data] * (2 if number == 1 else 1)))
    assert (recorder.duplicated, recorder.lost, recorder.mismatch) == (1, 0, None)


def test_udp_load_reply_to_another_socket_stops(start_datagrams: StartDatagrams) -> None:
    first: list[bytes] = []

    def answer(number: int, data: bytes) -> Iterable[bytes]:
        first.append(data)
        return [first[0]] if number == 2 else [] if number == 1 else [data]

    recorder = run_load(start_datagrams(answer), connections=2)
    assert recorder.mismatch is not None
    assert recorder.mismatch["what"] == "received 100 bytes that were not sent"


def test_udp_load_server_gone_is_a_loss(start_datagrams: StartDatagrams) -> None:
    def answer(number: int, data: bytes) -> Iterable[bytes]:
        if number == 1:
            server.stop_soon()
        return [data]

    server = start_datagrams(answer)
    recorder = run_load(server, rate=100.0, timeout=0.1, duration=0.4)
    assert recorder.failures["connection refused"] > 0
    assert recorder.lost > 0


def test_udp_load_json_has_no_mode(start_datagrams: StartDatagrams, cli: Cli) -> None:
    options = "--connections 1 --warmup 0 --duration 0.2 --rate 200 --timeout 5"
    facts = json.loads(cli.output(f"bench load --udp --json --port {start_datagrams().address[1]} {options}"))
    expected = {"udp": True, "mode": None, "tls": False, "lost": 0, "lost_share": 0, "duplicated": 0}
    assert {name: facts[name] for name in expected} == expected


def test_udp_load_table_has_the_share_of_losses(capsys: pytest.CaptureFixture[str]) -> None:
    plan = LoadPlan(udp=True, family=socket.AF_INET, address=("127.0.0.1", 1), connections=1, size=20, rate=200)
    times = Distribution(np.array([0.001]), np.array([36], dtype=np.uint64))
    print_load(LoadResult(plan=plan, answered=36, lost=4, duplicated=2, service=times, response=times), [])
    out = " ".join(capsys.readouterr().out.split())
    assert ", UDP: 1 socket, any number in flight, 20 bytes per message, open loop at 200 messages/s" in out
    assert out.endswith("lost: 4 messages (10 %) duplicated: 2 datagrams")


def test_udp_server_that_drops_the_first_is_found(start_datagrams: StartDatagrams) -> None:
    server = start_datagrams(lambda number, data: [data] if number > 1 else [])
    assert find_udp_server(LoadPlan(udp=True), *server.address).address == server.address


def test_udp_server_without_reply_times_out(start_datagrams: StartDatagrams) -> None:
    with pytest.raises(ConnectTimeout, match=r"timed out after 0\.15 s"):
        find_udp_server(LoadPlan(udp=True, timeout=0.15), *start_datagrams(lambda number, data: []).address)


def test_udp_server_at_the_second_address_is_found(
    start_datagrams: StartDatagrams, closed_udp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_datagrams()
    resolve_to(monkeypatch, ("127.0.0.1", closed_udp_port), server.address)
    assert find_udp_server(LoadPlan(udp=True), "several.example", 1).address == server.address
