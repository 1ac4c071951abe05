"""``client --udp`` against UDP servers that drop, duplicate, reorder, corrupt and delay."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import Any

import pytest
from support import (
    LOOPS,
    TIMEOUT,
    Answer,
    ChildProcess,
    ScriptedDatagrams,
    echo_datagram,
    resolve_to,
    run,
    without_slow_callbacks,
)

from echo_async.cli.client import main
from echo_async.cli.datagram_ping import ping
from echo_async.cli.output import Output
from echo_async.client.endpoint import Endpoint
from echo_async.loops import LoopName

Capture = pytest.CaptureFixture[str]
FAST = ("--interval", "0")


@pytest.fixture
def start() -> Iterator[Any]:
    """Return a function that starts a UDP server, which stops after the test."""
    with ExitStack() as stack:
        yield lambda answer=echo_datagram, *host: stack.enter_context(ScriptedDatagrams(answer, *host))


def client(port: int, *options: str, code: int = 0) -> None:
    assert main(["--udp", "--port", str(port), *options]) == code


def counts(capfd: Capture, port: int, *options: str, code: int) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Run a client with ``--json`` that exits with ``code``; return its counters and its other objects."""
    client(port, "--json", *options, code=code)
    *objects, last = map(json.loads, capfd.readouterr().out.splitlines())
    return last, objects


# Echoes


@pytest.mark.parametrize("loop", LOOPS)
def test_udp_any_size_comes_back(start: Any, loop: LoopName, capfd: Capture) -> None:
    for host, size in (*(("127.0.0.1", n) for n in (0, 1, 4, 8, 65_507)), ("::1", 65_527)):
        server = start(echo_datagram, host)
        endpoint = Endpoint(*server.address, timeout=TIMEOUT)
        assert run(partial(ping, endpoint, size, 30, 0, Output(quiet=True, verbose=False)), loop)
        assert [len(each) for each in server.received] == [size] * 30
        counters = "30 sent, 30 received, 0 lost (0%), time t ms\n0 late, 0 duplicated, 0 reordered, 0 corrupted\n"
        assert counters in re.sub(r"\d+ ms\n", "t ms\n", capfd.readouterr().out, count=1)


def test_udp_prints_round_trips_and_summary(start: Any, capfd: Capture) -> None:
    server = start()
    client(server.address[1], "--count", "2", *FAST)
    out, err = capfd.readouterr()
    name = f"127.0.0.1:{server.address[1]}"
    assert re.sub(r"\d+(\.\d+)? ms", "t ms", re.sub(r"(?<== )[\d./]+", "t", out)) == (
        f"ECHO {name}: 64 bytes over UDP\n"
        f"64 bytes from {name}: seq=1 time=t ms\n"
        f"64 bytes from {name}: seq=2 time=t ms\n"
        f"--- {name} echo statistics ---\n"
        "2 sent, 2 received, 0 lost (0%), time t ms\n"
        "0 late, 0 duplicated, 0 reordered, 0 corrupted\n"
        "round trip min/avg/median/p99/max = t ms\n"
    )
    assert err == ""


def test_udp_json_has_an_object_per_reply_and_counts(start: Any, capfd: Capture) -> None:
    last, [reply] = counts(capfd, start().address[1], code=0)
    assert 0 < reply.pop("seconds") < TIMEOUT
    marks = {"late": False, "duplicated": False, "reordered": False}
    assert list(reply.items()) == [("seq", 1), ("bytes", 64), ("ok", True), *marks.items()]
    assert last == {"sent": 1, "received": 1, "lost": 0, "late": 0, "duplicated": 0, "reordered": 0, "corrupted": 0}


def test_udp_size_over_the_limit_exits_with_2(start: Any, capfd: Capture) -> None:
    for size, limit in (
        ("65508", "at most 65507 bytes over IPv4, 65527 over IPv6"),
        ("65528", "must be an integer from 0 to 65527"),
    ):
        client(start().address[1], "--size", size, "--quiet", code=2)
        out, err = capfd.readouterr()
        assert out == ""
        assert re.fullmatch(rf"error: .*{re.escape(limit)}.*\n", err)


# What can happen to datagrams


def test_udp_lost_is_what_the_server_dropped(start: Any, capfd: Capture) -> None:
    dropped = sorted(Random(7).sample(range(1, 1001), 100))
    server = start(lambda number, data: [] if number in dropped else [data])
    client(server.address[1], "--count", "1000", "--timeout", "3", *FAST, code=1)
    out, err = capfd.readouterr()
    assert len(server.received) == 1000
    assert f"1000 sent, {1000 - len(dropped)} received, {len(dropped)} lost " in out
    assert [int(number) for number in re.findall(r"^error: datagram (\d+): reply timeout", err, re.M)] == dropped


def duplicate_second(number: int, data: bytes) -> Iterable[bytes]:
    return [data, data] if number == 2 else [data]


def corrupt_second(number: int, data: bytes) -> Iterable[bytes]:
    return [data[:-1] + bytes([data[-1] ^ 1]), data] if number == 2 else [data]


def swap_second_and_third(number: int, data: bytes, held: list[bytes] = []) -> Iterable[bytes]:  # noqa: B006
    if number == 2:
        held.append(data)
        return []
    return [data, held.pop()] if number == 3 else [data]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(duplicate_second, "duplicated"), (swap_second_and_third, "reordered"), (corrupt_second, "corrupted")],
)
def test_udp_faults_are_counted(answer: Answer, kind: str, start: Any, capfd: Capture) -> None:
    code = int(kind == "corrupted")
    last, objects = counts(capfd, start(answer).address[1], "--count", "4", *FAST, code=code)
    expected = {"sent": 4, "received": 4, "lost": 0, "late": 0, "duplicated": 0, "reordered": 0, "corrupted": 0}
    assert last == {**expected, kind: 1}
    [special] = [each for each in objects if not each["ok"] or each.get(kind)]
    if kind == "corrupted":
        assert (special["seq"], special["error"]["kind"]) == (None, "mismatch")
    else:
        assert (special["seq"], special["seconds"] is None) == (2, kind == "duplicated")


def test_udp_late_reply_is_a_failure_and_not_lost(start: Any, capfd: Capture) -> None:
    first: list[bytes] = []

    def answer(number: int, data: bytes) -> Iterable[bytes]:
        first.append(data)
        return first if number == 2 else []  # after the timeout of number 1

    options = ("--count", "2", "--interval", "1.1", "--timeout", "1")
    last, objects = counts(capfd, start(answer).address[1], *options, code=1)
    assert (last["sent"], last["received"], last["lost"], last["late"]) == (2, 2, 0, 1)
    assert [(each["seq"], each.get("late"), each.get("error", {}).get("kind")) for each in objects] == [
        *((1, None, "late"), (1, True, None), (2, False, None))
    ]


# Refusal


def test_udp_refused_exits_with_3(closed_udp_port: int, capfd: Capture) -> None:
    client(closed_udp_port, "--json", "--count", "3", code=3)
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["kind"] == "refused"
    assert re.fullmatch(r"error: cannot connect to .*: connection refused; is the server running\?\n", err)


def test_udp_refused_tries_the_next_address(
    start: Any, closed_udp_port: int, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    server = start()
    resolve_to(monkeypatch, ("127.0.0.1", closed_udp_port), server.address)
    client(server.address[1], "--host", "several.example")
    assert "1 sent, 1 received" in capfd.readouterr().out
    assert len(server.received) == 1


def test_udp_unknown_host_exits_with_3(capfd: Capture) -> None:
    client(1, "--host", "\udcff", code=3)
    assert "check the host name" in capfd.readouterr().err


def test_udp_refusal_after_a_reply_counts_as_lost(start: Any, capfd: Capture) -> None:
    def answer(number: int, data: bytes) -> Iterable[bytes]:
        if number == 3:
            server.stop_soon()
        return [data] if number <= 3 else []

    server = start(answer)
    client(server.address[1], "--count", "5", "--interval", "0.2", "--timeout", "1", code=1)
    out, err = capfd.readouterr()
    assert "5 sent, 3 received, 2 lost" in out
    assert re.search(r"^error: datagram [45]: .*: connection refused", err, re.M)


# Options


def test_udp_conflicting_option_exits_with_2(capfd: Capture) -> None:
    for options in (
        *(["--ssl"], ["--ssl-no-verify"], ["--server-hostname", "x"], ["--identify"], ["--retry", "1"]),
        *(["--uds", "x"], ["--send-proxy", "v1"], ["hola"], ["-"]),
    ):
        client(1, *options, code=2)
        name = options[0] if options[0].startswith("--") else "MESSAGE"
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: --udp conflicts with {name}")


def test_udp_ctrl_c_prints_the_summary(start: Any) -> None:
    command = [sys.executable, "-m", "echo_async.client", "--udp", "--port", str(start().address[1]), "--count", "0"]
    with ChildProcess(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        assert "seq=1 " in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert "1 sent, 1 received, 0 lost (0%)" in out
    assert (without_slow_callbacks(err), process.returncode) == ("", 0)
