"""``client --udp`` against UDP servers that drop, duplicate, reorder, corrupt and delay."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterable
from functools import partial
from random import Random
from subprocess import PIPE

import pytest
from support import (
    LOOPS,
    TIMEOUT,
    ChildProcess,
    Cli,
    StartDatagrams,
    echo_datagram,
    resolve_to,
    run,
    without_slow_callbacks,
)

from echo_async.cli.datagram_ping import ping
from echo_async.cli.output import Output
from echo_async.client.endpoint import Endpoint
from echo_async.loops import LoopName


@pytest.mark.parametrize("loop", LOOPS)
def test_udp_any_size_comes_back(
    start_datagrams: StartDatagrams, loop: LoopName, capfd: pytest.CaptureFixture[str]
) -> None:
    for host, size in (*(("127.0.0.1", n) for n in (0, 1, 4, 8, 65_507)), ("::1", 65_527)):
        server = start_datagrams(echo_datagram, host)
        endpoint = Endpoint(*server.address, timeout=TIMEOUT)
        assert run(partial(ping, endpoint, size, 30, 0, Output(quiet=True, verbose=False)), loop)
        assert [len(each) for each in server.received] == [size] * 30
        counters = "30 sent, 30 received, 0 lost (0%), time t ms\n0 late, 0 duplicated, 0 reordered, 0 corrupted\n"
        assert counters in re.sub(r"\d+ ms\n", "t ms\n", capfd.readouterr().out, count=1)


def test_udp_lost_is_what_the_server_dropped(start_datagrams: StartDatagrams, cli: Cli) -> None:
    dropped = sorted(Random(7).sample(range(1, 1001), 100))
    server = start_datagrams(lambda number, data: [] if number in dropped else [data])
    done = cli(f"client --udp --port {server.address[1]} --count 1000 --interval 0 --timeout 3")
    assert (done.code, len(server.received)) == (1, 1000)
    assert f"1000 sent, {1000 - len(dropped)} received, {len(dropped)} lost " in done.out
    assert [int(number) for number in re.findall(r"^error: datagram (\d+): reply timeout", done.err, re.M)] == dropped


def test_udp_json_marks_and_counts_each_fault(start_datagrams: StartDatagrams, cli: Cli) -> None:
    """The second datagram is duplicated, the third and fourth are swapped, and the fifth is also corrupted."""
    held = []

    def answer(number: int, data: bytes) -> Iterable[bytes]:
        if number == 3:
            held.append(data)
            return []
        return {2: [data] * 2, 4: [data, *held], 5: [data[:-1] + bytes([data[-1] ^ 1]), data]}.get(number, [data])

    port = start_datagrams(answer).address[1]
    done = cli(f"client --udp --json --port {port} --count 6 --interval 0 --timeout {TIMEOUT}")
    first, *objects, last = map(json.loads, done.out.splitlines())
    counts = {"sent": 6, "received": 6, "lost": 0, "late": 0, "duplicated": 1, "reordered": 1, "corrupted": 1}
    assert (done.code, last) == (1, counts)
    assert 0 < first.pop("seconds") < TIMEOUT
    marks = {"late": False, "duplicated": False, "reordered": False}
    assert list(first.items()) == [("seq", 1), ("bytes", 64), ("ok", True), *marks.items()]
    [corrupted] = [each["error"] for each in objects if not each["ok"] and each["seq"] is None]
    assert corrupted["kind"] == "mismatch"
    for kind in ("duplicated", "reordered"):
        [(number, seconds)] = [(each["seq"], each["seconds"]) for each in objects if each.get(kind)]
        assert (number, seconds is None) == ((2, True) if kind == "duplicated" else (3, False))


def test_udp_late_reply_is_a_failure_and_not_lost(start_datagrams: StartDatagrams, cli: Cli) -> None:
    first: list[bytes] = []

    def answer(number: int, data: bytes) -> Iterable[bytes]:
        first.append(data)
        return first if number == 2 else []  # after the timeout of number 1

    port = start_datagrams(answer).address[1]
    done = cli(f"client --udp --json --port {port} --count 2 --interval 1.1 --timeout 1")
    *objects, last = map(json.loads, done.out.splitlines())
    assert (done.code, last["sent"], last["received"], last["lost"], last["late"]) == (1, 2, 2, 0, 1)
    assert [(each["seq"], each.get("late"), each.get("error", {}).get("kind")) for each in objects] == [
        *((1, None, "late"), (1, True, None), (2, False, None))
    ]


def test_udp_refused_exits_with_3(closed_udp_port: int, cli: Cli) -> None:
    done = cli(f"client --udp --json --count 3 --port {closed_udp_port}")
    assert (done.code, json.loads(done.out)["error"]["kind"]) == (3, "refused")
    assert re.fullmatch(r"error: cannot connect to .*: connection refused; is the server running\?\n", done.err)


def test_udp_refused_tries_the_next_address(
    start_datagrams: StartDatagrams, closed_udp_port: int, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    server = start_datagrams()
    resolve_to(monkeypatch, ("127.0.0.1", closed_udp_port), server.address)
    assert "1 sent, 1 received" in cli.output(f"client --udp --host several.example --port {server.address[1]}")
    assert len(server.received) == 1


def test_udp_refusal_after_a_reply_counts_as_lost(start_datagrams: StartDatagrams, cli: Cli) -> None:
    def answer(number: int, data: bytes) -> Iterable[bytes]:
        if number == 3:
            server.stop_soon()
        return [data] if number <= 3 else []

    server = start_datagrams(answer)
    done = cli(f"client --udp --port {server.address[1]} --count 5 --interval 0.2 --timeout 1")
    assert done.code == 1
    assert "5 sent, 3 received, 2 lost" in done.out
    assert re.search(r"^error: datagram [45]: .*: connection refused", done.err, re.M)


def test_udp_ctrl_c_prints_the_summary(start_datagrams: StartDatagrams) -> None:
    options = ["--udp", "--port", str(start_datagrams().address[1]), "--count", "0"]
    command = [sys.executable, "-m", "echo_async.client", *options]
    with ChildProcess(command, stdout=PIPE, stderr=PIPE, text=True) as process:
        process.stdout.readline()
        assert "seq=1 " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert "1 sent, 1 received, 0 lost (0%)" in out
    assert (without_slow_callbacks(err), process.returncode) == ("", 0)
