"""Prometheus metrics and the health check, over HTTP, from servers with one and several processes."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import fields
from functools import partial
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from support import (
    MAX_DELAY,
    TIMEOUT,
    ChildProcess,
    ServerProcess,
    connect_to,
    count_events,
    in_its_loop,
    is_echoed,
    paused_processes,
    receive_all,
    scrape_metrics,
    server_process,
    single_error_line,
    wait_until,
)

import echo_async
from echo_async import Stats
from echo_async.cli.server import main
from echo_async.config import EngineName
from echo_async.loops import logged_errors
from echo_async.service import metrics as module
from echo_async.service.metrics import COUNTERS, MAX_CONNECTIONS, TIMEOUTS, MetricsServer, ServiceCollector
from echo_async.service.worker_process import Worker
from echo_async.stats import COUNTERS_BY_KIND


def wait_for_sample(server: ServerProcess, name: str, value: float) -> None:
    wait_until(lambda: scrape_metrics(server.log)[name] == value)


@pytest.fixture(scope="module")
def idle_server() -> Iterator[ServerProcess]:
    """A server with metrics that no client connects to: no request at the metrics port is a line of its log."""
    with server_with_metrics("protocol", 1) as server:
        yield server
        assert scrape_metrics(server.log)["echo_async_connections_accepted_total"] == 0
        lines = server.stop()
    assert len(lines.splitlines()) == 4, lines


@contextmanager
def server_with_metrics(engine: EngineName, workers: int, *args: str, **popen: Any) -> Iterator[ServerProcess]:
    """Start a server in ``stream`` mode with metrics on a free port."""
    options = ("--engine", engine, "--workers", str(workers), "--mode", "stream", "--no-access-log")
    with server_process(*options, "--metrics-port", "0", *args, **popen) as server:
        server.wait_for_log(" server started: mode stream, ")
        yield server


def address_of(log: str) -> tuple[str, int]:
    [port] = re.findall(r" metrics available at http://127\.0\.0\.1:(\d+)/metrics\n", log)
    return "127.0.0.1", int(port)


def send(address: tuple[str, int], request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send a request; return the status, the headers, and every byte that follows them."""
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(request)
        head, _, body = receive_all(client).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def request(server: ServerProcess, method: str, path: str, headers: str = "") -> tuple[int, dict[str, str], bytes]:
    return send(address_of(server.log), f"{method} {path} HTTP/1.0\r\n{headers}\r\n".encode())


def health(server: ServerProcess) -> tuple[int, bytes]:
    status, _, body = request(server, "GET", "/healthz")
    return status, body


@pytest.mark.parametrize(("engine", "workers"), [("threads", 1), ("protocol", 2)])
def test_metrics_match_what_was_sent_until_the_stop(engine: EngineName, workers: int) -> None:
    with server_with_metrics(engine, workers) as server, ExitStack() as stack, server.connect() as last:
        assert health(server) == (200, b"serving\n")
        clients = [stack.enter_context(server.connect()) for _ in range(8)]

        def send(client: socket.socket) -> None:
            for number in range(100):
                assert is_echoed(client, b"%d \xf1\n" % number)

        senders = [threading.Thread(target=send, args=(client,), daemon=True) for client in clients]
        for sender in senders:
            sender.start()
        for sender in senders:
            scrape_metrics(server.log)  # while messages are sent
            sender.join(TIMEOUT)
        samples = scrape_metrics(server.log)
        size = 8 * sum(len(b"%d \xf1\n" % number) for number in range(100))
        assert samples["echo_async_messages_total"] == 800
        assert samples["echo_async_received_bytes_total"] == samples["echo_async_sent_bytes_total"] == size
        assert samples["echo_async_connections_accepted_total"] == samples["echo_async_connections_active"] == 9
        clients.pop().sendall(b"incomplete")
        stack.close()
        wait_for_sample(server, "echo_async_connections_active", 1)
        samples = scrape_metrics(server.log)
        assert (samples["echo_async_connections_accepted_total"], samples["echo_async_lost_total"]) == (9, 1)
        last.sendall(b"first ")
        wait_for_sample(server, "echo_async_received_bytes_total", size + 16)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log(" SIGTERM received: shutting down")
        assert health(server) == (503, b"not serving\n")
        assert scrape_metrics(server.log)["echo_async_messages_total"] == 800
        last.sendall(b"part\n")
        assert receive_all(last) == b"first part\n"
        lines = server.wait()
    assert " accepted=9 active=0 " in lines
    assert f" messages=801 bytes_in={size + 21} bytes_out={size + 11} lost=1 " in lines


def test_metrics_count_refusals_and_timeouts_by_kind() -> None:
    with server_with_metrics("streams", 1, "--limit-connections", "1", "--timeout-idle", "1") as server:
        with server.connect() as idle, server.connect() as refused:
            assert receive_all(refused) == receive_all(idle) == b""
        samples = scrape_metrics(server.log)
    assert samples["echo_async_connections_refused_total"] == samples["echo_async_timeouts_total[idle]"] == 1
    assert [samples[f"echo_async_timeouts_total[{kind}]"] for kind in ("message", "write", "handshake")] == [0, 0, 0]
    assert samples[f"echo_async_info[streams][stream][{echo_async.__version__}][1]"] == 1


def test_metrics_keep_the_counters_of_a_killed_worker() -> None:
    with server_with_metrics("protocol", 2) as server, ExitStack() as stack:
        killed_worker, survivor = server.worker_pids
        for worker in [killed_worker] * 3 + [survivor] * 2:
            assert is_echoed(stack.enter_context(connect_to(worker, server)), b"hello\n")
        samples = scrape_metrics(server.log)
        accepted = samples["echo_async_connections_accepted_total"]
        assert (samples["echo_async_messages_total"], samples["echo_async_worker_restarts_total"]) == (5, 0)
        os.kill(killed_worker, signal.SIGKILL)
        server.wait_for_log(" exited with code -9, restarting")
        samples = scrape_metrics(server.log)
        assert samples["echo_async_messages_total"] == 5
        assert samples["echo_async_connections_accepted_total"] == accepted
        assert samples["echo_async_connections_active"] == 2
        with paused_processes(survivor):  # a hung worker keeps its last report
            assert scrape_metrics(server.log)["echo_async_messages_total"] == 5
            wait_until(lambda: health(server)[0] == 200)  # as soon as the replacement is ready
        wait_for_sample(server, "echo_async_worker_restarts_total", 1)
        with paused_processes(*server.worker_pids):
            assert health(server) == (503, b"not serving\n")
        lines = server.stop()
    assert " messages=5 " in lines


def test_exited_worker_reports_nothing_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        channel, worker_channel = socket.socketpair()
        worker = Worker(process, *await asyncio.open_connection(sock=channel))
        request = asyncio.create_task(worker.fetch_stats())
        await asyncio.to_thread(worker_channel.recv, 1)
        worker_channel.close()
        for _ in range(20):
            worker.send_command("stats")
        assert await worker.run_until_exit(lambda: None) == 0
        assert await request is False

    with ChildProcess([sys.executable, "-c", ""]) as process:
        asyncio.run(main())
    assert not caplog.records


def test_metrics_options_that_cannot_be_used_are_one_line(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    used = f"127.0.0.1:{closed_port}: address already in use; choose another --metrics-port or --metrics-address"
    for options, code, error in (
        (["--metrics-port", str(closed_port)], 3, f"cannot serve metrics on {used}\n"),
        (["--metrics-port", "0", "--metrics-address", "192.0.2.1"], 3, "cannot serve metrics on 192.0.2.1:0: "),
        (["--metrics-address", "0.0.0.0"], 2, "--metrics-address requires --metrics-port\n"),
        *(
            (["--label", label], 2, f"invalid --label: {label!r} (must be KEY=VALUE in UTF-8")
            for label in ("zone=\udcf1", "version=v2", "__name__=x")  # which no scrape can show
        ),
    ):
        assert main(["--port", "0", *options]) == code
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: {error}")


def test_missing_prometheus_client_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert main(["--port", "0", "--metrics-port", "0"]) == 3
    assert "pip install 'echo-async[metrics]'" in single_error_line(*capsys.readouterr())


def test_every_stats_field_is_a_metric() -> None:
    assert {field for field, _ in COUNTERS.values()} | {*TIMEOUTS, "active", *COUNTERS_BY_KIND} == {
        each.name for each in fields(Stats)
    }


def test_counters_never_decrease() -> None:
    seen = iter([Stats(bytes_out=10, active=5), Stats(bytes_out=9, active=4, lost=1), Stats(bytes_out=11, active=6)])
    service: Any = SimpleNamespace(certificates=[], worker_restarts=0)
    collector = ServiceCollector(service, lambda: [next(seen)], {}, [])

    def collected() -> dict[str, float]:
        return {sample.name: sample.value for metric in collector.collect() for sample in metric.samples}

    for bytes_out, active, lost in [(10, 5, 0), (10, 4, 1), (11, 6, 1)]:
        samples = collected()
        assert samples["echo_async_sent_bytes_total"] == bytes_out
        assert samples["echo_async_connections_active"] == active
        assert samples["echo_async_lost_total"] == lost


def test_http_methods_and_their_headers(idle_server: ServerProcess) -> None:
    for path, expected in (("/healthz", 200), ("/metrics", 200), ("/", 404)):
        status, headers, body = request(idle_server, "GET", path)
        head = request(idle_server, "HEAD", path)
        assert (head[0], status, head[2]) == (status, expected, b"")
        assert body
        assert head[1]["Content-Type"] == headers["Content-Type"]
        if path != "/metrics":  # whose body changes
            assert head[1]["Content-Length"] == headers["Content-Length"] == str(len(body))
        assert int(head[1]["Content-Length"]) > 0
    for method, path in (("DELETE", "/healthz"), ("POST", "/metrics")):
        status, headers, _ = request(idle_server, method, path)
        assert (status, headers["Allow"]) == (405, "GET, HEAD"), (method, path)


def test_idle_http_connections_delay_no_scrape() -> None:
    """They use neither the descriptors of echo clients nor the time of a scrape."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    with server_with_metrics("streams", 1, preexec_fn=limit) as server, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(address_of(server.log), TIMEOUT))
        start = monotonic()
        assert health(server) == (200, b"serving\n")
        assert monotonic() - start < MAX_DELAY
        for _ in range(20):
            assert is_echoed(stack.enter_context(server.connect()), b"served\n")
        assert scrape_metrics(server.log)["echo_async_connections_active"] == 20


def test_metrics_have_the_format_that_is_accepted(idle_server: ServerProcess) -> None:
    default = "text/plain; version=0.0.4; charset=utf-8"
    expected = {
        "": default,
        "Accept: application/openmetrics-text; version=1.0.0\r\n": "application/openmetrics-text; version=",
        "Accept: text/plain; version=abc\r\n": default,
        "ACCEPT:application/openmetrics-text;version=;;=,\r\n": "application/openmetrics-text; ",
    }
    for headers, content_type in expected.items():
        status, fields, body = request(idle_server, "GET", "/metrics", headers)
        assert (status, int(fields["Content-Length"])) == (200, len(body))
        assert fields["Content-Type"].startswith(content_type), headers
        assert b"\necho_async_messages_total 0.0\n" in body
    fields, body = request(idle_server, "GET", "/metrics", "Accept-Encoding: gzip\r\n")[1:]
    assert (fields["Content-Encoding"], int(fields["Content-Length"])) == ("gzip", len(body))
    assert b"\necho_async_messages_total 0.0\n" in gzip.decompress(body)


def test_http_request_forms_and_limits(idle_server: ServerProcess) -> None:
    address = address_of(idle_server.log)
    for data, status in (
        (b"GET /healthz\r\n\r\n", 400),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"GET http://[/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + 101 * b"A: 1\r\n" + b"\r\n", 400),
        (b"GET /" + bytes(20_000) + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + 100 * b"A: 1\r\n" + b"\r\n", 200),
        (b"GET http://example.org/healthz?a=b HTTP/1.1\n\n", 200),
    ):
        assert send(address, data)[0] == status, data[:40]
    for data in (b"", b"\n", b"GET /metrics", b"\0\xff\r\n\r\n", b"GET /metrics HTTP/1.1\r\n\r\n"):
        with socket.create_connection(address, TIMEOUT) as client:
            client.sendall(data)


@asynccontextmanager
async def metrics_in_loop(caplog: pytest.LogCaptureFixture) -> AsyncIterator[tuple[str, int]]:
    """Serve metrics in the running event loop."""
    async with echo_async.serve(port=0) as server:
        with closing(MetricsServer("127.0.0.1", 0)) as metrics:
            caplog.set_level("INFO", "echo_async")
            await metrics.start(server, {}, ())
            yield address_of(caplog.text)


@in_its_loop
async def test_new_http_connections_close_idle_ones_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scrape that waits for the counters is answered, however many connections come meanwhile."""
    arrived, release = asyncio.Semaphore(0), asyncio.Event()

    async def fetch_stats(self: echo_async.EchoServer) -> list[Stats]:
        arrived.release()
        await release.wait()
        return [self.stats]

    monkeypatch.setattr(echo_async.EchoServer, "fetch_stats", fetch_stats)
    async with metrics_in_loop(caplog) as address:
        scrapes = [await asyncio.open_connection(*address) for _ in range(MAX_CONNECTIONS)]
        for _, writer in scrapes:
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            await arrived.acquire()
        others = [await asyncio.open_connection(*address) for _ in range(20)]
        assert [await reader.read() for reader, _ in others] == [b""] * 20
        release.set()
        for reader, _ in scrapes:
            assert (await reader.read()).startswith(b"HTTP/1.0 200 OK\r\n")
        for _, writer in (*scrapes, *others):
            writer.close()


def test_metrics_request_that_fails_is_a_500_and_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fetch_stats(self: echo_async.EchoServer) -> list[Stats]:
        raise MemoryError

    monkeypatch.setattr(echo_async.EchoServer, "fetch_stats", fetch_stats)
    with asyncio.Runner() as runner, logged_errors(runner.get_loop()):

        async def main() -> None:
            async with metrics_in_loop(caplog) as address:
                for _ in range(10):
                    reply = await asyncio.to_thread(send, address, b"GET /metrics HTTP/1.1\r\n\r\n")
                    assert (reply[0], reply[2]) == (500, b"internal error\n")
                assert (await asyncio.to_thread(send, address, b"GET /healthz HTTP/1.1\r\n\r\n"))[0] == 200

        runner.run(main())
    lines = [line for line in caplog.messages if "metrics request failed" in line]
    assert lines[0] == "event loop error: metrics request failed: MemoryError()"
    assert sum(count_events(line) for line in lines) == 10


@in_its_loop
async def test_incomplete_http_request_times_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT", 0.05)
    async with metrics_in_loop(caplog) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: a")
        assert await reader.read() == b""
        writer.close()
