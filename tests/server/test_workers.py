"""Worker processes: distribution of connections, replacement, graceful shutdown, and exit with the supervisor."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from logging import WARNING
from pathlib import Path
from time import monotonic
from typing import Any, Unpack, cast

import pytest
import trustme
from support import (
    MAX_DELAY,
    TIMEOUT,
    ChildProcess,
    Load,
    ServerProcess,
    child_processes,
    connect_to,
    counters,
    has_exited,
    is_closed,
    is_echoed,
    log_lines,
    paused_processes,
    receive_all,
    receive_line,
    run,
    server_process,
    wait_exited,
    wait_until,
)

from echo_async.config import EngineName, ServerConfig, ServerOptions
from echo_async.server.listeners import ListenerConfig
from echo_async.service.supervisor import Supervisor
from echo_async.service.worker_process import MAX_MISSED, Worker

each_acceptor = pytest.mark.parametrize("engine", ["protocol", "threads"])  # streams has that of protocol


@contextmanager
def two_workers(engine: EngineName, *args: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start a server of two workers in ``stream`` mode."""
    arguments = ("--workers", "2", "--engine", engine, "--mode", "stream", "--no-access-log", *args)
    with server_process(*arguments, env=env) as server:
        assert len(server.worker_pids) == 2
        yield server


def is_running(process: int) -> bool:
    """Return whether it uses the CPU, or waits for it."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("R")


def test_workers_share_connections_and_add_up_counters() -> None:
    """Each of two accepts at least a quarter of 200, except once in 10**12 times (the sum of binomials)."""
    with two_workers("threads", "--mode", "identify") as server, ExitStack() as clients:
        counts = dict.fromkeys(server.worker_pids, 0)
        size = 0
        for _ in range(200):
            client = clients.enter_context(server.connect())
            client.sendall(b"x\n")
            reply = receive_line(client)
            counts[json.loads(reply)["server"]["pid"]] += 1
            size += len(reply)
        assert min(counts.values()) >= 50
        assert len(counts) == 2
        clients.close()
        lines = server.stop()
        assert server.process.stdout.read() == ""
    assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", server.startup_line)
    expected = {"accepted": 200, "messages": 200, "bytes_in": 400, "bytes_out": size, "ended_closed": 200}
    assert counters(lines) == expected


def test_workers_share_a_unix_socket_and_its_file_is_removed(tmp_path: Path) -> None:
    """In debug mode, in which asyncio requires a non-blocking socket, also for PROXY headers."""
    path = str(tmp_path / "socket")
    options = ("--uds", path, "--proxy-protocol", "v1")
    with two_workers("protocol", *options, env={"PYTHONDEVMODE": "1"}) as server:
        assert server.startup_line == f"listening on {path}\n"
        for other in server.worker_pids:
            with paused_processes(other), socket.socket(socket.AF_UNIX) as client:
                client.settimeout(TIMEOUT)
                client.connect(path)
                client.sendall(b"PROXY UNKNOWN\r\nhello\n")
                assert receive_line(client) == b"hello\n"
        lines = server.stop()
    assert counters(lines)["messages"] == 2
    assert not os.path.exists(path)


def test_killed_worker_is_replaced_and_others_are_unaffected() -> None:
    with two_workers("threads") as server:
        killed_worker, survivor = server.worker_pids
        with (
            connect_to(killed_worker, server) as closed,
            connect_to(survivor, server) as open_client,
            Load(server.address) as load,
        ):
            load.wait_for(20)
            os.kill(killed_worker, signal.SIGKILL)
            wait_exited(killed_worker)
            killed_at = monotonic()
            wait_until(lambda: not {*server.worker_pids} <= {killed_worker, survivor})
            assert monotonic() - killed_at < MAX_DELAY
            assert is_closed(closed)
            assert is_echoed(open_client)
            load.wait_for(20)
        assert [failure for failure in load.failed if failure[0] >= killed_at] == []
        lines = server.stop()
    assert lines.count("restarting") == 1
    assert f"worker {killed_worker} exited with code -9, restarting" in lines


def sitecustomize(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which Python runs ``code`` at startup."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def failing_workers(folder: Path, count: int) -> dict[str, str]:
    """Return the environment in which only the first ``count`` workers start, and each adds a byte to ``starts``."""
    path = str(folder / "starts")
    code = f"""
import os, sys
if "echo_async.service.worker" in sys.orig_argv:
    with open({path!r}, "a") as starts:
        starts.write(".")
    if os.path.getsize({path!r}) > {count}:
        os.write(2, b"worker failed\\n")
        os._exit(1)
"""
    return sitecustomize(folder, code)


@pytest.mark.parametrize("count", [0, 1])
def test_worker_failing_to_start_stops_the_others(count: int, tmp_path: Path) -> None:
    with server_process("--workers", "4", env=failing_workers(tmp_path, count)) as server:
        lines = server.wait(3)
    assert server.startup_line == ""
    first, *_, last = lines.splitlines()
    assert first == "worker failed"
    assert "cannot start a worker" in last
    assert count < len((tmp_path / "starts").read_text()) <= 1 + 3 * count  # the others start together


def test_replacement_failing_to_start_stops_the_server(tmp_path: Path) -> None:
    with two_workers("protocol", env=failing_workers(tmp_path, 2)) as server:
        killed_worker, survivor = server.worker_pids
        with connect_to(survivor, server) as client:
            os.kill(killed_worker, signal.SIGKILL)
            assert receive_all(client) == b""  # the other worker shuts down gracefully
            lines = server.wait(3)
    assert 4 <= len((tmp_path / "starts").read_text()) <= 10
    assert lines.count("restarting") == 1
    assert "Traceback" not in lines
    assert has_exited(survivor)


@each_acceptor
def test_stop_answers_every_message_received(engine: EngineName) -> None:
    """Both of accepted connections and of connections in the backlog."""
    sent = b"".join(b"%060d\n" % number for number in range(200))
    with two_workers(engine, "--chunk-size", "4096") as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(40)]
        for client in clients:
            assert is_echoed(client)
        with paused_processes(*server.worker_pids):
            with paused_processes(server.process.pid):  # otherwise it would kill workers that do not respond
                clients += [stack.enter_context(server.connect()) for _ in range(100)]
                for client in clients:
                    client.sendall(sent)
                # Everything sent has reached the kernel of the peer.
                wait_until(lambda: not any(any(fcntl.ioctl(each, termios.TIOCOUTQ, bytes(4))) for each in clients))
                server.process.send_signal(signal.SIGTERM)
            server.wait_for_log(" SIGTERM received: shutting down")
        for client in clients:
            assert receive_all(client) == sent
        lines = server.wait()
    assert counters(lines)["messages"] == 200 * len(clients) + 40


def test_stop_refuses_connections_and_a_second_signal_aborts() -> None:
    with two_workers("threads") as server, server.connect() as idle, ExitStack() as clients:
        busy = [clients.enter_context(connect_to(each, server)) for each in server.worker_pids]
        for client in busy:
            client.sendall(b"one\nnever finished")
            assert receive_line(client) == b"one\n"  # the worker has read both
        server.process.send_signal(signal.SIGTERM)
        assert receive_all(idle) == b""  # the workers are shutting down

        def is_refused() -> bool:
            try:
                server.connect().close()
            except ConnectionRefusedError:
                return True
            return False

        wait_until(is_refused)
        started_at = monotonic()
        lines = server.stop()
        assert monotonic() - started_at < MAX_DELAY
        assert all(map(is_closed, busy))
    assert "Traceback" not in lines
    assert counters(lines)["lost"] == 2


@asynccontextmanager
async def supervised(**options: Unpack[ServerOptions]) -> AsyncIterator[tuple[Supervisor, list[int]]]:
    """Start a supervisor in the running event loop; yield it and its two workers. They have exited at the end."""
    defaults: ServerOptions = {"engine": "protocol", "port": 0}
    config = ServerConfig(**(defaults | options))
    others = child_processes(os.getpid())
    settings = {"loop": "auto", "log_level": "error", "log_format": "text", "labels": {}}
    supervisor = await Supervisor.start([ListenerConfig(config)], 2, settings)
    try:
        yield supervisor, [each for each in child_processes(os.getpid()) if each not in others]
    finally:
        supervisor.close()
        await supervisor.wait_closed()
    assert child_processes(os.getpid()) == others


def address_of(supervisor: Supervisor) -> tuple[str, int]:
    return cast(tuple[str, int], supervisor.addresses[0])


def events_of(worker: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    prefix = f"worker {worker} "
    return [line.removeprefix(prefix) for line in log_lines(caplog, WARNING) if line.startswith(prefix)]


def test_command_to_a_worker_that_has_finished_keeps_its_counters() -> None:
    """The last report is still in the channel when the supervisor, which is blocked until then, sends a command."""

    async def main() -> int:
        with ExitStack() as stack:
            async with supervised(mode="stream") as (supervisor, workers):
                address = address_of(supervisor)
                clients = [stack.enter_context(socket.create_connection(address, TIMEOUT)) for _ in range(4)]
                for client in clients:
                    client.sendall(b"one\nnever finished")
                    assert receive_line(client) == b"one\n"
                supervisor.abort()
                assert all(map(is_closed, clients))
                wait_until(lambda: not any(map(is_running, workers)))
                supervisor.abort()
                await supervisor.wait_closed()
        return sum(each.lost for each in await supervisor.fetch_stats())

    assert run(main) == 4


@pytest.mark.parametrize(("timeout", "is_aborted"), [(0.05, False), (60, True)])
def test_hung_worker_is_killed_at_a_stop(
    timeout: float, is_aborted: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("echo_async.service.supervisor.KILL_DELAY", 0.2)

    async def main() -> int:
        async with supervised(timeout_graceful_shutdown=timeout) as (supervisor, (hung, _)):
            os.kill(hung, signal.SIGSTOP)
            supervisor.close()
            if is_aborted:
                supervisor.abort()
            await supervisor.wait_closed()
        return hung

    hung = run(main)
    assert events_of(hung, caplog) == ["did not stop in time, killed"]


@pytest.mark.parametrize("is_stopping", [False, True])
def test_hung_worker_leaves_its_queue_to_its_replacement(
    is_stopping: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """None of 40 connections is in the backlog of the hung worker once in 2**40 times."""
    monkeypatch.setattr("echo_async.service.worker_process.HEARTBEAT_INTERVAL", 0.2)

    async def main() -> int:
        with ExitStack() as clients:
            async with supervised() as (supervisor, (hung, _)):
                os.kill(hung, signal.SIGSTOP)
                queued = [
                    clients.enter_context(socket.create_connection(address_of(supervisor), TIMEOUT)) for _ in range(40)
                ]
                for client in queued:
                    client.sendall(b"hello\n")
                if is_stopping:
                    supervisor.close()
                replies = await asyncio.to_thread(lambda: list(map(receive_all, queued)))
            assert replies == [b"hello\n"] * 40
            return hung

    hung = run(main)
    events = ["not responding", "did not respond in time, killed", "exited with code -9, restarting"]
    assert events_of(hung, caplog) == events


def test_busy_worker_is_killed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that does not report, and uses the CPU."""
    monkeypatch.setattr("echo_async.service.worker_process.HEARTBEAT_INTERVAL", 0.2)
    monkeypatch.setattr("echo_async.service.worker_process.MAX_MISSED_BUSY", 6)

    async def main(process: subprocess.Popen[bytes], channel: socket.socket) -> float:
        worker = Worker(process, *await asyncio.open_connection(sock=channel))
        started_at = monotonic()
        assert await worker.run_until_exit(lambda: None) == -signal.SIGKILL
        return monotonic() - started_at

    channel, worker_channel = socket.socketpair()
    with ChildProcess([sys.executable, "-c", "while True: pass"], stdin=worker_channel.fileno()) as process:
        worker_channel.close()
        assert run(lambda: main(process, channel)) > 5 * 0.2


def test_worker_that_misses_single_reports_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_async.service.worker_process.HEARTBEAT_INTERVAL", 0.1)

    async def report_to_each_second_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(MAX_MISSED + 2):
            await reader.readline()
            await reader.readline()
            writer.write(2 * b'{"stats": []}\n')
        process.stdin.close()
        writer.close()

    async def main() -> int:
        worker = Worker(process, *await asyncio.open_connection(sock=channel))
        reporting = report_to_each_second_request(*await asyncio.open_connection(sock=worker_channel))
        async with asyncio.timeout(TIMEOUT):
            code, _ = await asyncio.gather(worker.run_until_exit(lambda: None), reporting)
        return code

    channel, worker_channel = socket.socketpair()
    with ChildProcess(["cat"], stdin=subprocess.PIPE) as process:
        assert run(main) == 0


def test_signal_while_a_worker_starts_is_a_graceful_stop() -> None:
    with two_workers("protocol") as server:
        before = server.worker_pids
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: not {*server.worker_pids} <= {*before})
        os.killpg(server.process.pid, signal.SIGINT)
        lines = server.wait()
    assert "Traceback" not in lines
    assert lines.count("SIGINT received: shutting down") == lines.count("server stopped: ") == 1


def test_workers_exit_with_the_supervisor_and_free_the_port(reserved_port: int) -> None:
    with two_workers("threads", "--port", str(reserved_port)) as server, ExitStack() as clients:
        workers = server.worker_pids
        for worker in workers:
            client = clients.enter_context(connect_to(worker, server))
            client.sendall(b"incomplete")
        server.process.kill()
        killed_at = monotonic()
        wait_exited(*workers)
        with suppress(OSError):
            clients.close()
        with socket.create_server(server.address):
            assert monotonic() - killed_at < MAX_DELAY
        lines = server.wait(None)
    assert "Traceback" not in lines


@pytest.mark.parametrize(("loop", "code", "error"), [("auto", 0, ""), ("missing:new", 3, "error: cannot use --loop")])
def test_worker_exits_if_the_supervisor_reads_no_report(loop: str, code: int, error: str) -> None:
    channel, worker_channel = socket.socketpair()
    with channel, worker_channel, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        listeners: Any = [({"engine": "threads"}, [listener.fileno()])]
        settings = {"listeners": listeners, "loop": loop, "log_level": "info", "log_format": "text", "labels": {}}
        command = [sys.executable, "-m", "echo_async.service.worker", str(worker_channel.fileno())]
        inherited = (worker_channel.fileno(), listener.fileno())
        with ChildProcess(command, pass_fds=inherited, stderr=subprocess.PIPE, text=True) as worker:
            worker_channel.close()
            channel.sendall(json.dumps(settings).encode() + b"\n")
            readable, _, _ = select.select([channel], [], [], TIMEOUT)
            assert readable  # the worker has reported that it is ready, which is not read, or has failed
            channel.close()
            _, lines = worker.communicate(timeout=TIMEOUT)
    assert (worker.returncode, lines.count("error: ")) == (code, bool(error))
    assert lines.startswith(error)


def test_worker_failing_to_reload_keeps_its_certificates(tmp_path: Path) -> None:
    """The files changed after the supervisor validated them."""
    failing, served = tmp_path / "failing", tmp_path / "served.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(served)
    code = f"""
import os, ssl, sys
load = ssl.SSLContext.load_cert_chain
def failing_load(*arguments, **named):
    if os.path.exists({str(failing)!r}):
        raise OSError("file changed")
    return load(*arguments, **named)
if "echo_async.service.worker" in sys.orig_argv:
    ssl.SSLContext.load_cert_chain = failing_load
"""
    with server_process("--workers", "2", "--ssl-certfile", str(served), env=sitecustomize(tmp_path, code)) as server:
        failing.touch()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("reload failed, keeping the previous certificates: ", 2)
        server.stop()
