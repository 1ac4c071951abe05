"""The command ``bench compare``: table, JSON, picture, exit code."""

from __future__ import annotations

import json
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from support import TIMEOUT, ChildProcess, Cli, Done, child_processes, open_sockets, wait_until

from echo_async import EchoError, StartError
from echo_async.bench.disturbance import Disturbance
from echo_async.bench.load import find_server
from echo_async.bench.plan import LoadPlan
from echo_async.bench.server import ServerProcess
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer


def compare(cli: Cli, options: str) -> Done:
    """Run a short comparison. Measure longer if a busy machine answers no message in time."""
    is_disturbed = "--disturb" in options
    connections = "" if is_disturbed else "--connections 2"
    for duration in ("0.3" if is_disturbed else "0.1", "4"):
        done = cli(f"bench compare --warmup 0.02 {connections} {options} --duration {duration}")
        if "no replies within" not in done.err:
            break
    return done


@pytest.mark.timeout(180)  # on a busy machine, the processes start slowly
def test_compare_prints_a_table_and_saves_every_round(tmp_path: Path, cli: Cli) -> None:
    options = "--engines threads,protocol --loops uvloop --chunk-sizes 20 --sizes 1000 --rounds 2"
    files = (tmp_path / "compare.json", tmp_path / "compare.svg")
    code, out, err = compare(cli, f"{options} --save {files[0]} --plot {files[1]}")
    assert (code, err) == (0, "")
    assert re.search(r"1,000 bytes per message, 2 connections, 1 in flight on each; 2 rounds of [0-9.]+ s\n", out)
    titles = ["server", "messages/s", "ratio", "CPU µs", "p50 ms", "p99 ms"]
    assert any(all(title in line for title in titles) for line in out.splitlines())
    assert any(line.strip().startswith("threads 20 B ") and "1.00 (1.00-1.00)" in line for line in out.splitlines())
    facts = json.loads(files[0].read_text())
    check_results(facts)
    machine = facts["machine"]
    assert {"date", "echo_async", "python", "uvloop", "system", "processor", "cpus", "memory_gib"} <= set(machine)
    assert machine["python"].endswith(sys.version.split()[0])
    picture = files[1].read_text()
    assert picture.startswith("<?xml")
    assert "<svg" in picture


def check_results(facts: dict[str, Any]) -> None:
    assert (facts["rounds"], facts["connections"], facts["base"]) == (2, 2, "threads 20 B")
    names = ["threads 20 B", "protocol uvloop"]
    results = facts["results"]
    assert [(each["model"], each["size"]) for each in results] == [(name, 1000) for name in names]
    for each in results:
        assert len(each["messages_per_second_rounds"]) == len(each["cpu_per_message_rounds"]) == 2
        assert each["messages_per_second"] > 0
        assert 0 < each["cpu_per_message"] < 0.01
        ratio = each["cpu_per_message_ratio"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert 0 < each["service_time"]["p50"] <= each["service_time"]["p99"]
    assert results[0]["messages_per_second_ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_compare_beside_a_flood_reports_round_trips_and_its_rate(tmp_path: Path, cli: Cli) -> None:
    options = "--disturb flood --engines protocol --loops uvloop:new_event_loop --sizes 64 --rounds 1"
    files = (tmp_path / "flood.json", tmp_path / "flood.svg")
    code, out, err = compare(cli, f"{options} --save {files[0]} --plot {files[1]}")
    assert (code, err) == (0, "")
    assert re.search("^64 bytes per message, 1 connection, 1 in flight on each beside a flood; 1 round of", out, re.M)
    titles = ["server", "p50 ms", "p99 ms", "ratio", "max ms", "flood MB/s"]
    assert any(all(title in line for title in titles) for line in out.splitlines())
    facts = json.loads(files[0].read_text())
    [result] = facts["results"]
    assert result["model"] == "protocol uvloop:new_event_loop"
    assert (facts["disturbance"], facts["connections"], result["idle_cpu"]) == ("flood", 1, None)
    assert len(result["flood_bytes_per_second_rounds"]) == len(result["p99_rounds"]) == 1
    assert result["flood_bytes_per_second"] > 0
    assert result["messages_per_second"] <= 1000  # a millisecond apart
    assert 0 < result["service_time"]["p50"] <= result["service_time"]["p99"] <= result["longest"]
    assert "<svg" in files[1].read_text()


def test_compare_beside_idle_connections_reports_idle_cpu(cli: Cli) -> None:
    """They are printed although the file that is to have them cannot be written."""
    options = "--disturb idle=150 --engines protocol --loops asyncio --rounds 1 --json --save /proc/facts.json"
    code, out, err = compare(cli, options)
    assert (code, err) == (1, "error: cannot write /proc/facts.json: no such file or directory\n")
    facts = json.loads(out)
    [result] = facts["results"]
    assert (facts["disturbance"], result["flood_bytes_per_second"]) == ("idle=150", None)
    assert 0 <= result["idle_cpu"] < 1
    assert 0 < result["service_time"]["p99"] <= result["longest"]


def test_compare_sigint_exits_130_without_output() -> None:
    command = [sys.executable, "-m", "echo_async.bench", "compare", "--engines", "protocol", "--duration", "60"]
    with ChildProcess(command, stdout=PIPE, stderr=PIPE) as process:
        wait_until(lambda: any(map(is_loading, child_processes(process.pid))))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def is_loading(process: int) -> bool:
    """Return whether a process is a load generator that has opened its connections."""
    with suppress(OSError):  # it has exited
        is_generator = "echo_async.bench.worker" in Path(f"/proc/{process}/cmdline").read_text()
        return is_generator and sum("socket:" in each for each in open_sockets(process)) >= 10
    return False


def test_compare_server_without_replies_is_an_error(cli: Cli) -> None:
    options = "--engines protocol --loops asyncio --sizes 10000 --duration 1e-6 --warmup 0"
    error = cli.error(f"bench compare {options}", code=1)
    assert "cannot measure protocol asyncio: no replies within 1e-06 s; increase --duration" in error


def test_server_process_failed_start_shows_its_output() -> None:
    for command, output in (
        (["sh", "-c", "echo invalid option >&2; exit 1"], "invalid option"),
        (["echo", "hello"], "hello"),
        (["/nonexistent/server"], "no such file"),
    ):
        with pytest.raises(StartError, match=output), ServerProcess(command):
            pass


def plan_for(server: HostedServer) -> LoadPlan:
    return find_server(LoadPlan(), *server.address)


def test_flood_with_a_wrong_reply_is_an_error(faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="corrupt")
    with Disturbance.parse("flood").run(plan_for(server), []) as finish:
        server.wait_for(messages=1, active=0, timeout=TIMEOUT)  # the client has left
        with pytest.raises(EchoError, match="the flood failed: reply mismatch at byte"):
            finish()


def test_idle_connections_over_the_limit_are_an_error() -> None:
    disturbance = Disturbance.parse("idle=3")
    with HostedServer(limit_connections=2) as server:
        idle = disturbance.run(plan_for(server), [])
        with pytest.raises(EchoError, match="cannot open 3 idle connections: "), idle:
            pass


def test_idle_connections_closed_by_the_server_are_an_error() -> None:
    with HostedServer() as server, Disturbance.parse("idle=3").run(plan_for(server), []) as finish:
        assert finish() is None
        server.close()
        with pytest.raises(EchoError, match="the server closed 3 of 3 idle connections"):
            finish()
