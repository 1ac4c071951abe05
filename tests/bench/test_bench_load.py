"""The command ``bench load`` against working and faulty servers: table, JSON, exit code."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from support import MAX_DELAY, TIMEOUT, ChildProcess, Cli, ServerThread, child_processes, lines, wait_for

from echo_async.config import Mode
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, Peer

LOAD = (sys.executable, "-m", "echo_async.bench", "load")
SHORT = "--duration 0.04 --warmup 0.01"
FLIPPED_WITH_SEED_7 = 5  # the offset in the message
DURATIONS = ("0.2", "2", "20")  # a test that needs replies within the measurement repeats it on a busy machine
MODES: list[Mode] = ["stream", "message"]


@pytest.fixture(scope="module")
def port() -> Iterator[int | None]:
    """The port of this package's server, in stream mode."""
    with ServerThread("asyncio", {"port": 0, "mode": "stream", "engine": "protocol"}) as server:
        yield server.port


Load = Callable[..., dict[str, Any]]


@pytest.fixture
def load(cli: Cli) -> Load:
    """Run a load of options, which exits with ``code``; return its JSON."""

    def run(options: str, code: int = 0) -> dict[str, Any]:
        done = cli(f"bench load --json {options}")
        assert done.code == code, done.err
        facts: dict[str, Any] = json.loads(done.out)
        return facts

    return run


def load_until_measured(load: Load, start: Callable[[], int | None], options: str, code: int = 0) -> dict[str, Any]:
    """Load the port that ``start()`` returns, until replies are received within the measurement."""
    for duration in DURATIONS:
        facts = load(f"--port {start()} --duration {duration} --warmup 0 {options}", code)
        if facts["messages"]:
            break
    return facts


def check_replies(facts: dict[str, Any]) -> None:
    """Check that replies were received and none was lost. On a busy machine all may arrive after the measurement."""
    assert (facts["lost"], facts["failures"]) == (0, {})
    assert facts["service_time"]["min"] > 0


def test_load_closed_loop_json_has_all_results(load: Load, port: int) -> None:
    options = "--mode stream --connections 3 --size 100 --timeout 1e11"
    facts = load_until_measured(load, lambda: port, options)
    expected = {
        "address": f"127.0.0.1:{port}",
        "model": "closed",
        "mode": "stream",
        "connections": 3,
        "size": 100,
        "pipeline": 1,
        "processes": 1,
        "rate": None,
        "tls": False,
        "response_time": None,
        "late": 0,
        "late_by_generator": 0,
        "lost": 0,
        "failures": {},
        "mismatch": None,
        "expectations": [],
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["messages"] > 0
    assert facts["messages_per_second"] == pytest.approx(facts["messages"] / facts["duration"])
    assert facts["megabytes_per_second"] == pytest.approx(facts["messages_per_second"] * 100 / 1e6)
    assert 0.1 < facts["duration"] < float(DURATIONS[-1]) + MAX_DELAY
    times = facts["service_time"]
    assert list(times) == ["min", "mean", "p50", "p90", "p99", "p99.9", "max"]
    assert (
        0 < times["min"] <= times["p50"] <= times["p90"] <= times["p99"] <= times["p99.9"] <= times["max"] < MAX_DELAY
    )
    assert 0 < facts["generator_cpu"][0] <= 1.1


def test_load_open_loop_keeps_its_rate(load: Load) -> None:
    """The processes share the connections and the rate."""
    options = "--rate 1000 --processes 2 --connections 5 --duration 0.1 --warmup 0"
    with HostedServer() as server:
        facts = load(f"--port {server.port} --mode stream {options}")
    assert (facts["model"], facts["rate"], len(facts["generator_cpu"])) == ("open", 1000, 2)
    assert 100 <= server.stats.messages <= 102
    assert server.stats.accepted == 6  # the first checks that the server is reachable
    check_replies(facts)
    assert facts["response_time"]["p50"] >= facts["service_time"]["p50"]


def test_load_pipeline_keeps_messages_in_flight(load: Load, faulty_server: MakeEchoServer) -> None:
    """The server answers none of them."""
    server = faulty_server(fault="drop")
    facts = load(f"--port {server.port} --connections 1 --pipeline 7 --timeout 0.1 {SHORT}", code=1)
    assert (facts["mode"], facts["pipeline"], facts["lost"], server.stats.messages) == ("stream", 7, 7, 7)


def test_load_message_of_any_size_is_answered(load: Load, port: int) -> None:
    for size in (1, 300_000):
        check_replies(load(f"--port {port} --mode stream --size {size} --connections 2 {SHORT}"))


def test_load_unix_socket_is_measured(tmp_path: Path, load: Load) -> None:
    path = str(tmp_path / "echo")
    with HostedServer(uds=path):
        assert load(f"--uds {path} --mode stream {SHORT}")["address"] == path
    with HostedServer(uds=path, backlog=1, mode="message") as server:  # whose backlog is full most of the time
        facts = load(f"--uds {path} --connections 50 {SHORT}")
    check_replies(facts)
    assert facts["mode"] == "message"
    assert server.stats.messages >= max(50, facts["messages"])
    assert server.stats.accepted == server.stats.messages + 1  # the first checks that the server is reachable


def test_load_tls_verifies_and_shows_certificates(ca_file: Path, certificate: Path, load: Load, cli: Cli) -> None:
    serve_tls = partial(HostedServer, host="localhost", ssl_certfile=str(certificate))
    trusting = f"--ssl-ca-certs {ca_file} --connections 2 {SHORT}"
    with serve_tls(chunk_size=65536) as server:
        where = f"--host localhost --port {server.port}"
        for more in ("--mode message", "--pipeline 4 --size 30000"):
            facts = load(f"{where} {trusting} {more}")
            assert facts["tls"]
            check_replies(facts)
        assert "certificate verify failed" in cli.error(f"bench load {where} --ssl", code=3)
        load(f"{where} --ssl-no-verify {SHORT}")
    with serve_tls(ssl_ca_certs=str(ca_file)) as server:
        where = f"--host localhost --port {server.port}"
        check_replies(load(f"{where} {trusting} --ssl-certfile {certificate}"))
        load(f"{where} {trusting}", code=1)


def test_load_flipped_byte_is_located(cli: Cli, faulty_server: MakeEchoServer) -> None:
    message = 9_876
    server = faulty_server(fault=f"corrupt,after={message - 1}", fault_seed=7)
    where = f"--port {server.port} --connections 1 --size 20 --pipeline 1000"
    done = cli(f"bench load --json {where} --duration 20 --warmup 0")
    found = json.loads(done.out)["mismatch"]
    assert (found["connection"], found["message"], found["offset"]) == (0, message, FLIPPED_WITH_SEED_7)
    assert f"byte {FLIPPED_WITH_SEED_7} of message {message} on connection 0: received 0x" in done.err
    assert done.code == 1


def test_load_unexpected_bytes_are_a_mismatch(load: Load, faulty_server: MakeEchoServer) -> None:
    server = faulty_server(fault="duplicate")
    facts = load(f"--port {server.port} --size 1 --mode stream --duration 9", code=1)
    assert facts["mismatch"]["message"] >= 1


def test_load_open_loop_shows_a_server_pause(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    messages, never = 0, threading.Event()

    def pause_at_20th(record: logging.LogRecord) -> bool:
        nonlocal messages
        messages += 1
        if messages == 20:
            never.wait(0.3)  # blocks the connection
        return False

    def measure(times: str, value: str, options: str) -> dict[str, Any]:
        """Measure again if the pause comes too late, as on a busy machine."""
        nonlocal messages
        for _ in range(3):
            wait_for(server, active=0)
            messages = 0
            facts = load(f"--port {server.port} --mode stream --connections 1 --warmup 0 {options}")
            if facts[times][value] > 0.25:
                break
        return facts

    monkeypatch.setattr(logging.getLogger("echo_async.access"), "filters", [pause_at_20th])
    caplog.set_level(logging.INFO, "echo_async.access")
    with HostedServer() as server:
        closed = measure("service_time", "max", "--duration 0.6")
        assert closed["service_time"]["p90"] < 0.25  # the pause is one message of many
        assert closed["service_time"]["max"] > 0.25
        opened = measure("response_time", "p99", "--duration 0.5 --rate 1000")
    assert opened["response_time"]["p99"] > 0.25
    assert opened["service_time"]["p90"] < 0.25
    assert opened["late"] > 100
    assert opened["late_by_generator"] < opened["late"]  # the others waited for the pause to end


def test_load_stream_mode_against_message_server_fails(cli: Cli) -> None:
    with HostedServer(mode="message") as server:
        for duration in DURATIONS:
            done = cli(f"bench load --port {server.port} --mode stream --warmup 0 --duration {duration}")
            if done.code == 1:
                break
    assert "failed: connection closed by the server between replies" in done.out
    assert "requires --mode message" in done.out


def test_load_missing_replies_are_lost(load: Load, faulty_server: MakeEchoServer) -> None:
    where = f"--port {faulty_server(fault='drop').port} --timeout 0.2 {SHORT}"
    closed = load(f"{where} --mode stream", code=1)
    assert (closed["lost"], closed["messages"]) == (10, 0)
    assert list(closed["failures"]) == ["reply timeout: no reply within 0.2 s after the end"]
    opened = load(f"{where} --rate 210 --expect p99<1s", code=1)
    assert opened["lost"] == 11
    assert opened["expectations"] == [{"expect": "p99<1s", "value": 0, "met": False}]


@pytest.mark.parametrize("mode", MODES)
def test_load_lost_connection_is_reopened(mode: Mode, load: Load, faulty_server: MakeEchoServer) -> None:
    def start() -> int | None:
        # The first connection only checks that the server is reachable.
        return faulty_server(fault_sequence="none;close=1023", mode=mode).port

    facts = load_until_measured(load, start, f"--mode {mode} --connections 1", code=1)
    assert (facts["lost"], facts["failures"]) == (1, {"connection closed by the server in the middle of a reply": 1})
    assert facts["messages"] > 0  # all of them after the connection was lost


@pytest.mark.parametrize("mode", MODES)
def test_load_stopped_server_is_reported(
    mode: Mode, load: Load, faulty_server: MakeEchoServer, until_the_end: ExitStack
) -> None:
    def start() -> int | None:
        def serve(peer: Peer) -> None:
            for message in itertools.islice(lines(peer), 1 if mode == "message" else 5):
                peer.send(message)
            if peer.number > 1:  # the first connection only checks that the server is reachable
                until_the_end.enter_context(stopping.refusing())

        stopping = faulty_server(handler=serve)
        return stopping.port

    for duration in ("0.5", *DURATIONS[1:]):  # enough to reconnect
        facts = load(f"--port {start()} --mode {mode} --connections 1 --duration {duration} --warmup 0", code=1)
        if "connection refused" in facts["failures"]:
            return
    pytest.fail(f"not refused: {facts}")


def test_load_prints_a_table_and_expectations(cli: Cli, port: int) -> None:
    expectations = "--expect p99<9s --expect lost<1 --expect p50<0.1us"
    done = cli(f"bench load --port {port} --mode stream --rate 300 --size 2048 {SHORT} {expectations}")
    assert (done.code, done.err) == (1, "error: expectation not met: p50<0.1us\n")
    heading, *table = done.out.splitlines()
    assert heading == (
        f"127.0.0.1:{port}: 10 connections, up to 1 in flight on each, 2,048 bytes per message, "
        "open loop at 300 messages/s"
    )
    titles = ["messages/s", "MB/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms"]
    assert any(all(title in line for title in titles) for line in table)
    assert any(line.strip().startswith("service time") for line in table)
    assert any("response time" in line for line in table)
    assert "sent late (over 1 ms): " in done.out
    assert "expectation p99<9s: met, measured " in done.out
    assert "expectation p50<0.1us: NOT met, measured " in done.out
    assert "\x1b" not in done.out
    assert "use --rate for the latency that clients see" in cli.output(f"bench load --port {port} {SHORT}")


def test_load_progress_bar_is_on_stderr_of_a_terminal(port: int) -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(controller, "rb", buffering=0) as screen:
        command = [*LOAD, "--port", str(port), *SHORT.split(), "--json"]
        with ChildProcess(command, stdout=PIPE, stderr=terminal) as process:
            os.close(terminal)
            out, _ = process.communicate(timeout=TIMEOUT)
        assert screen.read(65536).startswith(b"\x1b[?25l")
    assert process.returncode == 0
    check_replies(json.loads(out))


@contextmanager
def loading(server: HostedServer) -> Iterator[ChildProcess]:
    """Run a load of a minute, from its first message on."""
    command = [*LOAD, "--port", str(server.port), "--warmup", "0", "--duration", "60", "--json"]
    with ChildProcess(command, stdout=PIPE, stderr=PIPE) as process:
        server.wait_for(messages=1, timeout=TIMEOUT)
        yield process


def test_load_sigint_reports_the_partial_result() -> None:
    with HostedServer() as server, loading(server) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (0, b"")
    facts = json.loads(out)
    assert facts["interrupted"]
    assert facts["duration"] < TIMEOUT


def test_load_killed_worker_is_an_error() -> None:
    with HostedServer() as server, loading(server) as process:
        [child] = child_processes(process.pid)
        os.kill(child, signal.SIGKILL)
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (1, b"")
    assert err == b"error: load generator process exited with code -9; try fewer --connections\n"


def test_load_json_without_rich_and_stderr_succeeds(load: Load, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    load(f"--port {port} {SHORT}")
    monkeypatch.delitem(sys.modules, "rich")
    monkeypatch.setattr(sys, "stderr", None)
    check_replies(load(f"--port {port} {SHORT}"))


def test_load_unreachable_rate_ends_and_is_reported(load: Load, port: int) -> None:
    facts = load(f"--port {port} --mode stream --rate 1e8 --timeout 0.2 {SHORT}", code=1)
    assert facts["generator_was_the_limit"]
    assert "load generator could not keep up with the rate" in facts["failures"]


def test_load_closed_stdout_keeps_the_exit_code(port: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*LOAD, "--port", str(port), *SHORT.split(), "--expect", "p50<1us"]
    done = subprocess.run(command, stdout=writing, stderr=PIPE, timeout=TIMEOUT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"error: expectation not met: p50<1us\n")


def test_load_full_disk_is_one_line(cli: Cli, port: int) -> None:
    with open("/dev/full", "w") as full, redirect_stdout(full):
        error = cli.error(f"bench load --port {port} {SHORT}", code=1)
    assert error == "error: cannot write to stdout: no space left on device\n"
