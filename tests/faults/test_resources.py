"""Too few descriptors or threads."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import resource
import select
import selectors
import socket
import ssl
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic

import pytest
from support import (
    LOOPS,
    MAX_DELAY,
    connect,
    count_events,
    is_echoed,
    log_lines,
    receive_all,
    receive_exactly,
    server_process,
)

import echo_async
from echo_async import sync

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_thread_start_failure_refuses_only_that_client(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    certificate: Path,
    client_context: ssl.SSLContext,
    tls: bool,
) -> None:
    start_thread = threading.Thread.start
    refused = [RuntimeError("can't start new thread"), MemoryError(), RuntimeError("can't start new thread")]

    def start(self: threading.Thread) -> None:
        if self.name == "echo-async client" and refused:
            raise refused.pop()
        start_thread(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with sync.serve(port=0, ssl_certfile=str(certificate) if tls else None) as server:
        for _ in range(3):
            with connect(server) as client, suppress(ConnectionError):
                assert receive_all(client) == b""
        with connect(server) as plain:
            client = client_context.wrap_socket(plain, server_hostname="localhost") if tls else plain
            assert is_echoed(client)
            client.close()
        assert server.stats.refused == 3
        assert server.stats.accepted == 1
    lines = log_lines(caplog, logging.WARNING)
    assert lines[0] == "accept failed: can't start new thread; retrying in 0.1 s"
    assert sum(map(count_events, lines)) == 3


def test_start_without_descriptors_fails_without_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_to_open() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(selectors, "DefaultSelector", fail_to_open)
    with pytest.raises(echo_async.StartError, match="too many open files"):
        sync.serve(port=0)
    assert sorted(os.listdir("/proc/self/fd")) == before


OPTIONS = [["--loop", "asyncio"], ["--loop", "uvloop"], ["--engine", "threads"]]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_descriptors_exhausted_serves_some_and_recovers(options: list[str]) -> None:
    """With 64 descriptors and 200 clients, the server serves some, counts the others, and uses no CPU time."""

    def limit_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    arguments = (*options, "--mode", "stream", "--no-access-log")
    with server_process(*arguments, preexec_fn=limit_descriptors) as server, ExitStack() as clients:
        start = monotonic()
        served = []
        for _ in range(200):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError):
                client.sendall(b"hello\n")
                if client.recv(100) == b"hello\n":
                    served.append(client)
        assert 16 <= len(served) < 64

        def cpu() -> float:
            tasks = Path(f"/proc/{server.process.pid}/task").glob("*/schedstat")
            return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

        cpu_before, idle_start = cpu(), monotonic()
        assert select.select(served, [], [], 0.4)[0] == []
        assert cpu() - cpu_before < 0.05 * (monotonic() - idle_start)
        for client in served:
            assert is_echoed(client)
        for client in served:
            client.close()
        room_since = monotonic()
        served_later: list[socket.socket] = []
        while len(served_later) < len(served):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError, AssertionError):
                if is_echoed(client):
                    served_later.append(client)
        assert monotonic() - room_since < MAX_DELAY
        seconds = monotonic() - start
        log = server.stop()
    assert "Traceback" not in log
    accepted, refused = (int(re.findall(rf" {counter}=(\d+)", log)[0]) for counter in ("accepted", "refused"))
    assert accepted == len(served) + len(served_later)
    assert refused >= 200 - len(served)
    lines = [line for line in log.splitlines() if " WARNING " in line or " ERROR " in line]
    assert 1 <= len(lines) <= 2 + seconds  # one of them at the stop
    assert sum(count_events(line) for line in lines if "connection refused" in line) == refused


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="relies on its malloc")
@pytest.mark.parametrize("loop", LOOPS)
def test_large_messages_reuse_the_same_memory(loop: str) -> None:
    """Memory that is returned to the kernel for each message costs a page fault per 4 KiB of the next one."""
    message = b"x" * (1024 * 1024 - 1) + b"\n"

    def usage() -> tuple[int, int]:
        """Return the page faults, and the resident memory in bytes."""
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[7]), int(fields[21]) * resource.getpagesize()

    with server_process("--engine", "protocol", "--loop", loop, "--mode", "stream", "--no-access-log") as server:
        _, memory_before = usage()
        with server.connect() as client:
            for number in range(40):
                if number == 20:
                    faults_before, _ = usage()
                client.sendall(message)
                assert receive_exactly(client, len(message)) == message
            faults, memory = usage()
        assert (faults - faults_before) / 20 < 64
        assert memory - memory_before < 8 * 1024 * 1024
