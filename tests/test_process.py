"""The process that the library lives in: all its settings stay what they are, also for a moment."""

from __future__ import annotations

import asyncio
import gc
import locale
import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import TIMEOUT, Backend, in_its_loop, wait_until

import echo_async
from echo_async import sync
from echo_async.config import ServerOptions
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer

STACK_SIZE = 512 * 1024  # bytes, of the threads of this program
ROUNDS = 20  # observations, at least


def settings() -> dict[str, object]:
    """Return the settings of the process that any part of a program can change for all others."""
    loggers = [logging.getLogger(name) for name in (None, "asyncio", "echo_async", "echo_async.access")]
    limits = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    return {
        "asyncio": vars(asyncio.events).get("_event_loop_policy"),
        "directory": os.getcwd(),
        "environment": dict(os.environ),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_debug(), list(gc.callbacks)),
        "limits": [resource.getrlimit(each) for each in limits],
        "locale": locale.setlocale(locale.LC_ALL),
        "logging": (logging.raiseExceptions, logging.lastResort, logging.getLogRecordFactory(), logging.root.disabled),
        "loggers": [(each.level, each.propagate, list(each.handlers), list(each.filters)) for each in loggers],
        "priority": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)),
        "random": random.getstate(),
        "signals": [signal.getsignal(each) for each in signal.valid_signals()],
        "socket": socket.getdefaulttimeout(),
        "stack size": threading.stack_size(STACK_SIZE),  # which it was; without an argument it would be reset
        "streams": [os.get_blocking(each) for each in range(3)],
        "sys": (sys.getswitchinterval(), sys.getrecursionlimit(), list(sys.path), list(sys.meta_path)),
        "sys hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook, sys.breakpointhook),
        "threading": (threading.excepthook, threading.gettrace(), threading.getprofile()),
        "umask": [line for line in Path("/proc/self/status").read_text().splitlines() if "Umask" in line],
        "warnings": (list(warnings.filters), warnings.showwarning),
    }


class Observer:
    """Compares the settings with those of the beginning, again and again, in a thread."""

    def __init__(self) -> None:
        self.rounds = 0
        self.changes: dict[str, object] = {}
        self._before = settings()

    def observe(self, is_stopping: threading.Event) -> None:
        while not is_stopping.is_set():
            self.compare()

    def compare(self) -> None:
        self.changes |= {name: value for name, value in settings().items() if value != self._before[name]}
        self.rounds += 1


@contextmanager
def observed() -> Iterator[Observer]:
    """Check that no setting of the process differs within the block, nor after it."""
    observer, stop = Observer(), threading.Event()
    thread = threading.Thread(target=observer.observe, args=[stop], daemon=True)
    thread.start()
    try:
        yield observer
        rounds = observer.rounds + 1
        wait_until(lambda: observer.rounds > rounds)
    finally:
        stop.set()
        thread.join(TIMEOUT)
    observer.compare()
    assert observer.changes == {}


@pytest.fixture(autouse=True)
def stack_size() -> Iterator[None]:
    before = threading.stack_size(STACK_SIZE)
    yield
    threading.stack_size(before)


OPTIONS: list[ServerOptions] = [{}, {"udp": True, "proxy_protocol": "auto"}, {"fault": "delay=0"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@in_its_loop
async def test_serve_and_connect_change_no_setting(backend: Backend, options: ServerOptions) -> None:
    defaults: ServerOptions = {"engine": backend.engine, "port": 0, "mode": "stream"}
    version = {"send_proxy": "v2"} if "proxy_protocol" in options else {}
    with observed() as observer:
        async with echo_async.serve(**(defaults | options)) as server:
            while observer.rounds < ROUNDS:
                async with echo_async.connect("localhost", server.port, **version) as client:  # type: ignore[arg-type]
                    assert await client.echo("Hola!") == "Hola!"
                    assert [reply async for reply in client.stream(["one", "two"])] == ["one", "two"]


def test_blocking_servers_and_clients_change_no_setting(
    echo_server: HostedServer, make_echo_server: MakeEchoServer, request: pytest.FixtureRequest
) -> None:
    with observed() as observer:
        request.getfixturevalue("black_hole_address")
        servers: list[Any] = [sync.serve(port=0, mode="stream"), make_echo_server(tls=True, udp=True), echo_server]
        for server in servers:
            rounds = observer.rounds + ROUNDS
            while observer.rounds < rounds:
                with sync.connect(*server.address, ssl=getattr(server, "client_context", None)) as client:
                    assert list(client.stream(["one", "two"])) == ["one", "two"]
            server.close()
