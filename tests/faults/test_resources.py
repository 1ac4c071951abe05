"""Too few descriptors or threads."""

from __future__ import annotations

import errno
import logging
import os
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
    MAX_DELAY,
    connect,
    is_echoed,
    log_lines,
    receive_all,
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
    begin = threading.Thread.start
    refused = [RuntimeError("can't start new thread"), MemoryError(), RuntimeError("can't start new thread")]

    def start(self: threading.Thread) -> None:
        if self.name == "echo-async client" and refused:
            raise refused.pop()
        begin(self)

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
    assert log_lines(caplog, logging.WARNING) == ["cannot accept clients just now: can't start new thread"]


def test_start_without_resources_fails_without_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def no_selector() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = sorted(os.listdir("/proc/self/fd"))
    for owner, name, fake, why in (
        (threading.Thread, "start", no_thread, "can't start new thread"),
        (selectors, "DefaultSelector", no_selector, "too many open files"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fake)
            with pytest.raises(echo_async.StartError, match=why):
                sync.serve(port=0)
        assert sorted(os.listdir("/proc/self/fd")) == before


KINDS = [["--loop", "asyncio"], ["--loop", "uvloop"], ["--engine", "threads"]]


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_descriptors_exhausted_serves_some_and_recovers(kind: list[str]) -> None:
    """Those that fit are served, the others refused and counted; nothing spins; there is room when they leave."""

    def few_descriptors() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    options = (*kind, "--mode", "stream", "--no-access-log")
    with server_process(*options, preexec_fn=few_descriptors) as server, ExitStack() as clients:
        began = monotonic()
        served = []
        for _ in range(200):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError):
                client.sendall(b"in?\n")
                if client.recv(100) == b"in?\n":
                    served.append(client)
        assert 16 <= len(served) < 64

        def cpu() -> float:
            tasks = Path(f"/proc/{server.process.pid}/task").glob("*/schedstat")
            return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

        used, waited = cpu(), monotonic()
        select.select([], [], [], 0.4)  # they wait, and it costs the server nothing
        assert cpu() - used < 0.05 * (monotonic() - waited)
        for client in served:
            assert is_echoed(client)
        for client in served:
            client.close()
        left = monotonic()
        again: list[socket.socket] = []
        while len(again) < len(served):
            client = clients.enter_context(server.connect())
            with suppress(ConnectionError, AssertionError):
                if is_echoed(client):
                    again.append(client)
        assert monotonic() - left < MAX_DELAY
        seconds = monotonic() - began
        code, log = server.stop()
    assert code == 0
    assert "Traceback" not in log
    accepted, refused = (int(re.findall(rf" {what}=(\d+)", log)[0]) for what in ("accepted", "refused"))
    assert accepted == len(served) + len(again)
    assert refused >= 200 - len(served)
    assert 1 <= len([line for line in log.splitlines() if " WARNING " in line or " ERROR " in line]) <= 1 + seconds
