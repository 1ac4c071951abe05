"""Prometheus metrics and the health check, over HTTP, from servers with one and several processes."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import fields
from http.client import HTTPConnection
from itertools import product
from pathlib import Path
from time import monotonic

import pytest
from cryptography import x509
from support import (
    MAX_DELAY,
    TIMEOUT,
    ChildProcess,
    ServerProcess,
    command_process,
    connect_to,
    count_events,
    paused_processes,
    receive_all,
    receive_line,
    scrape_metrics,
    server_process,
    wait_until,
)

import echo_async
from echo_async import Stats
from echo_async.cli.server import main
from echo_async.config import EngineName
from echo_async.loops import logged_errors
from echo_async.service import metrics as module
from echo_async.service.metrics import COUNTERS, MAX_CONNECTIONS, TIMEOUTS, MetricsServer, StatsCollector
from echo_async.service.worker_process import Worker
from echo_async.stats import COUNTERS_BY_KIND

# Engine and number of workers
VARIANTS = [("streams", 1), ("threads", 1), ("protocol", 2)]
each_variant = pytest.mark.parametrize(("engine", "workers"), VARIANTS)


def wait_for_sample(server: ServerProcess, name: str, value: float) -> None:
    wait_until(lambda: scrape_metrics(server.log)[name] == value)


@contextmanager
def server_with_metrics(engine: EngineName, workers: int, *args: str) -> Iterator[ServerProcess]:
    """Start a server in ``stream`` mode with metrics on a free port."""
    options = ("--engine", engine, "--workers", str(workers), "--mode", "stream", "--no-access-log")
    with server_process(*options, "--metrics-port", "0", *args) as server:
        server.wait_for_log(" server started: mode stream, ")
        yield server


def address_of(log: str) -> tuple[str, int]:
    match = re.search(r" metrics available at http://(127\.0\.0\.1):(\d+)/metrics\n", log)
    assert match is not None
    return match[1], int(match[2])


def get(server: ServerProcess, path: str, **headers: str) -> tuple[int, str]:
    connection = HTTPConnection(*address_of(server.log), timeout=TIMEOUT)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def exchange(client: socket.socket, message: bytes) -> None:
    client.sendall(message)
    assert receive_line(client, len(message)) == message


@each_variant
def test_metrics_match_what_was_sent(engine: EngineName, workers: int) -> None:
    with server_with_metrics(engine, workers) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(8)]

        def send(client: socket.socket) -> None:
            for number in range(100):
                exchange(client, b"%d \xf1\n" % number)

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
        assert samples["echo_async_connections_accepted_total"] == samples["echo_async_connections_active"] == 8
        clients.pop().sendall(b"incomplete")
        stack.close()
        wait_for_sample(server, "echo_async_connections_active", 0)
        samples = scrape_metrics(server.log)
        assert (samples["echo_async_connections_accepted_total"], samples["echo_async_lost_total"]) == (8, 1)
        assert (samples["echo_async_messages_total"], samples["echo_async_sent_bytes_total"]) == (800, size)
        code, lines = server.stop()
    assert code == 0
    assert " accepted=8 active=0 " in lines
    assert f" messages=800 bytes_in={size + 10} bytes_out={size} lost=1 " in lines


def test_metrics_count_refusals_and_timeouts_by_kind() -> None:
    with server_with_metrics("streams", 1, "--limit-connections", "1", "--timeout-idle", "0.2") as server:
        with server.connect() as idle, server.connect() as refused:
            assert receive_all(refused) == receive_all(idle) == b""
        samples = scrape_metrics(server.log)
    assert samples["echo_async_connections_refused_total"] == samples["echo_async_timeouts_total[idle]"] == 1
    assert [samples[f"echo_async_timeouts_total[{kind}]"] for kind in ("message", "write", "handshake")] == [0, 0, 0]
    assert samples[f"echo_async_info[streams][stream][{echo_async.__version__}][1]"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_metrics_show_certificates_and_reloads_and_restarts(workers: int, certificate: Path, tmp_path: Path) -> None:
    path = tmp_path / "server.pem"
    path.write_bytes(certificate.read_bytes())
    with server_with_metrics("protocol", workers, "--ssl-certfile", str(path)) as server:
        samples = scrape_metrics(server.log)
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
        expiry = samples["echo_async_certificate_expiry_timestamp_seconds"]
        assert expiry == certificates[0].not_valid_after_utc.timestamp()
        server.process.send_signal(signal.SIGHUP)
        wait_for_sample(server, "echo_async_certificate_reloads_total[success]", 1)
        path.write_text("no certificate")
        server.process.send_signal(signal.SIGHUP)
        wait_for_sample(server, "echo_async_certificate_reloads_total[failure]", 1)
        assert scrape_metrics(server.log)["echo_async_worker_restarts_total"] == 0
        path.write_bytes(certificate.read_bytes())
        if workers > 1:
            os.kill(server.worker_pids[0], signal.SIGKILL)
            wait_for_sample(server, "echo_async_worker_restarts_total", 1)


def test_metrics_keep_the_counters_of_a_killed_worker() -> None:
    with server_with_metrics("protocol", 2) as server, ExitStack() as stack:
        killed_worker, survivor = server.worker_pids
        for worker in [killed_worker] * 10 + [survivor] * 5:
            exchange(stack.enter_context(connect_to(worker, server)), b"hello\n")
        samples = scrape_metrics(server.log)
        accepted = samples["echo_async_connections_accepted_total"]
        assert samples["echo_async_messages_total"] == 15
        os.kill(killed_worker, signal.SIGKILL)
        server.wait_for_log(" exited with code -9, restarting")
        samples = scrape_metrics(server.log)
        assert samples["echo_async_messages_total"] == 15
        assert samples["echo_async_connections_accepted_total"] == accepted
        assert samples["echo_async_connections_active"] == 5
        with paused_processes(survivor):  # a hung worker keeps its last report
            assert scrape_metrics(server.log)["echo_async_messages_total"] == 15
            wait_until(lambda: get(server, "/healthz")[0] == 200)  # as soon as the replacement is ready
        code, lines = server.stop()
    assert code == 0
    assert " messages=15 " in lines


@pytest.mark.parametrize("workers", [1, 2])
def test_healthz_is_200_until_the_stop(workers: int) -> None:
    with server_with_metrics("protocol", workers) as server, server.connect() as client:
        assert get(server, "/healthz") == (200, "serving\n")
        assert get(server, "/") == (404, "not found; use /metrics or /healthz\n")
        exchange(client, b"one\n")
        client.sendall(b"first ")
        wait_for_sample(server, "echo_async_received_bytes_total", 10)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log(" SIGTERM received: shutting down")
        assert get(server, "/healthz") == (503, "not serving\n")
        assert scrape_metrics(server.log)["echo_async_messages_total"] == 1
        client.sendall(b"part\n")
        assert receive_all(client) == b"first part\n"
        assert server.wait()[0] == 0


def test_healthz_is_503_if_no_worker_responds() -> None:
    with server_with_metrics("protocol", 2) as server:
        with paused_processes(*server.worker_pids):
            assert get(server, "/healthz") == (503, "not serving\n")
        assert server.stop()[0] == 0


def test_worker_exiting_during_a_stats_request_returns_false() -> None:
    async def main() -> None:
        channel, worker_channel = socket.socketpair()
        worker = Worker(process, *await asyncio.open_connection(sock=channel))
        request = asyncio.create_task(worker.fetch_stats())
        await asyncio.to_thread(worker_channel.recv, 1)
        worker_channel.close()
        assert await worker.run_until_exit(lambda: None) == 0
        assert await request is False

    with ChildProcess([sys.executable, "-c", ""]) as process:
        asyncio.run(main())


def test_commands_to_an_exited_worker_log_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        channel, worker_channel = socket.socketpair()
        worker = Worker(process, *await asyncio.open_connection(sock=channel))
        worker_channel.close()
        for _ in range(20):
            worker.send_command("stats")
        await worker.run_until_exit(lambda: None)

    with ChildProcess([sys.executable, "-c", ""]) as process:
        asyncio.run(main())
    assert not caplog.records


def test_metrics_address_that_cannot_be_used_is_one_line(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    used = f"127.0.0.1:{closed_port}: address already in use; choose another --metrics-port or --metrics-address"
    for options, code, error in (
        (["--metrics-port", str(closed_port)], 3, f"cannot serve metrics on {used}\n"),
        (["--metrics-port", "0", "--metrics-address", "192.0.2.1"], 3, "cannot serve metrics on 192.0.2.1:0: "),
        (["--metrics-address", "0.0.0.0"], 2, "--metrics-address requires --metrics-port\n"),
    ):
        assert main(["--port", "0", *options]) == code
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"error: {error}")


@pytest.mark.parametrize("label", ["zone=\udcf1", "version=v2", "__name__=x"])
def test_label_that_no_scrape_can_show_exits_with_code_2(
    label: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--port", "0", "--metrics-port", "0"]
    assert main([*options, "--label", label]) == 2
    monkeypatch.setenv("ECHO_ASYNC_LABEL", label)
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 2)
    assert f"error: invalid --label: {label!r} (must be KEY=VALUE in UTF-8" in err


def test_missing_prometheus_client_error_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['prometheus_client'] = None")
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with server_process("--metrics-port", "0", env=env) as server:
        code, lines = server.wait()
    assert (code, len(lines.splitlines())) == (3, 1)
    assert "pip install 'echo-async[metrics]'" in lines


# StatsCollector


def test_every_stats_field_is_a_metric() -> None:
    assert {field for field, _ in COUNTERS.values()} | {*TIMEOUTS, "active", *COUNTERS_BY_KIND} == {
        each.name for each in fields(Stats)
    }


def test_counters_never_decrease() -> None:
    seen = iter([Stats(bytes_out=10, active=5), Stats(bytes_out=9, active=4, lost=1), Stats(bytes_out=11, active=6)])
    collector = StatsCollector(lambda: [next(seen)], {}, [])

    def collected() -> dict[str, float]:
        return {sample.name: sample.value for metric in collector.collect() for sample in metric.samples}

    for bytes_out, active, lost in [(10, 5, 0), (10, 4, 1), (11, 6, 1)]:
        samples = collected()
        assert samples["echo_async_sent_bytes_total"] == bytes_out
        assert samples["echo_async_connections_active"] == active
        assert samples["echo_async_lost_total"] == lost


def send(address: tuple[str, int], request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send a request; return the status, the headers, and every byte that follows them."""
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(request)
        head, _, body = receive_all(client).partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def request(server: ServerProcess, method: str, path: str, headers: str = "") -> tuple[int, dict[str, str], bytes]:
    return send(address_of(server.log), f"{method} {path} HTTP/1.0\r\n{headers}\r\n".encode())


def test_http_methods_and_their_headers() -> None:
    with server_with_metrics("protocol", 1) as server:
        for path in ("/healthz", "/metrics", "/"):
            status, headers, body = request(server, "GET", path)
            head = request(server, "HEAD", path)
            assert (head[0], status, head[2]) == (status, 404 if path == "/" else 200, b"")
            assert body
            assert head[1]["Content-Type"] == headers["Content-Type"]
            if path != "/metrics":  # whose body changes
                assert head[1]["Content-Length"] == headers["Content-Length"] == str(len(body))
            assert int(head[1]["Content-Length"]) > 0
        for method, path in product(("DELETE", "POST", "PUT", "OPTIONS"), ("/healthz", "/metrics")):
            status, headers, _ = request(server, method, path)
            assert (status, headers["Allow"]) == (405, "GET, HEAD"), (method, path)


@pytest.mark.parametrize("descriptors", [64, 1024])
def test_idle_http_connections_delay_no_scrape(descriptors: int) -> None:
    """They use neither the descriptors of echo clients nor the time of a scrape."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))\n"
        "from echo_async.cli.server import main; sys.exit(main())"
    )
    options = ("--port", "0", "--mode", "stream", "--metrics-port", "0")
    command = [sys.executable, "-c", code, *options]
    with command_process(command) as server, ExitStack() as stack:
        server.wait_for_log(" server started: mode stream, ")
        for _ in range(100):
            stack.enter_context(socket.create_connection(address_of(server.log), TIMEOUT))
        start = monotonic()
        assert get(server, "/healthz") == (200, "serving\n")
        assert monotonic() - start < MAX_DELAY
        clients = [stack.enter_context(server.connect()) for _ in range(20)]
        for client in clients:
            exchange(client, b"served\n")
        assert scrape_metrics(server.log)["echo_async_connections_active"] == 20
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 64


def test_metrics_have_the_format_that_is_accepted() -> None:
    default = "text/plain; version=0.0.4; charset=utf-8"
    expected = {
        "": default,
        "Accept: application/openmetrics-text; version=1.0.0\r\n": "application/openmetrics-text; version=",
        "Accept: text/plain; version=abc\r\n": default,
        "ACCEPT:application/openmetrics-text;version=;;=,\r\n": "application/openmetrics-text; ",
    }
    with server_with_metrics("protocol", 1) as server:
        for headers, content_type in expected.items():
            status, fields, body = request(server, "GET", "/metrics", headers)
            assert (status, int(fields["Content-Length"])) == (200, len(body))
            assert fields["Content-Type"].startswith(content_type), headers
            assert b"\necho_async_messages_total 0.0\n" in body
        fields, body = request(server, "GET", "/metrics", "Accept-Encoding: gzip\r\n")[1:]
        assert (fields["Content-Encoding"], int(fields["Content-Length"])) == ("gzip", len(body))
        assert b"\necho_async_messages_total 0.0\n" in gzip.decompress(body)
        assert len(server.log.splitlines()) == 2, server.log


def test_http_request_forms_and_limits() -> None:
    with server_with_metrics("protocol", 1) as server:
        address = address_of(server.log)
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
        assert scrape_metrics(server.log)["echo_async_connections_accepted_total"] == 0
        code, lines = server.stop()
    assert code == 0
    assert len(lines.splitlines()) == 4, lines


@asynccontextmanager
async def metrics_in_loop(caplog: pytest.LogCaptureFixture) -> AsyncIterator[tuple[str, int]]:
    """Serve metrics in the running event loop."""
    async with echo_async.serve(port=0) as server:
        with closing(MetricsServer("127.0.0.1", 0)) as metrics:
            caplog.set_level("INFO", "echo_async")
            await metrics.start(server, {}, ())
            yield address_of(caplog.text)


def test_new_http_connections_close_idle_ones_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scrape that waits for the counters is answered, however many connections come meanwhile."""

    async def main() -> None:
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

    asyncio.run(main())


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


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: a"])
def test_incomplete_http_request_times_out(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT", 0.05)

    async def main() -> None:
        async with metrics_in_loop(caplog) as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(sent)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(main())
