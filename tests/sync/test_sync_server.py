"""The blocking server: starting, stopping and resource limits."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, cast

import pytest
from support import TIMEOUT, connect, counters, is_echoed, receive_all, receive_line, server_process, wait_until

import echo_async
from echo_async import sync

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextmanager
def thread(function: Any) -> Iterator[None]:
    """Run ``function`` in a thread and join it at the end of the block."""
    running = threading.Thread(target=function, daemon=True)
    running.start()
    try:
        yield
    finally:
        running.join(TIMEOUT)
        assert not running.is_alive()


def test_sync_servers_started_by_several_threads_echo() -> None:
    def start_and_stop(times: int) -> None:
        for _ in range(times):
            with sync.serve(port=0, no_access_log=True) as server, connect(server) as client:
                assert is_echoed(client)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(start_and_stop, [20] * 5))


def test_serve_forever_ends_when_a_signal_handler_closes_it() -> None:
    server = sync.serve(port=0)
    before = signal.signal(signal.SIGUSR1, lambda *_: server.close())
    try:
        with thread(lambda: os.kill(os.getpid(), signal.SIGUSR1)):
            server.serve_forever()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not server.is_serving()


def interrupt_main_thread() -> None:
    """Send SIGINT when the main thread waits in ``wait_closed``."""
    main = threading.main_thread().ident
    assert main is not None
    wait_until(lambda: "wait_closed" in [each.name for each in traceback.extract_stack(sys._current_frames()[main])])
    os.kill(os.getpid(), signal.SIGINT)


def test_serve_forever_interrupted_closes_and_waits() -> None:
    server = sync.serve(port=0, mode="stream", timeout_graceful_shutdown=0.2)
    with socket.create_connection(server.address, TIMEOUT) as client:
        client.sendall(b"Hola\nincomplete")  # delays the shutdown until its timeout
        assert receive_line(client) == b"Hola\n"
        with thread(interrupt_main_thread), pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert not server.is_serving()
        assert server.stats.active == 0


def test_close_from_a_connection_thread_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is about to log the first message."""
    caplog.set_level(logging.INFO, "echo_async.access")
    server = sync.serve(port=0, mode="stream")

    def close_server(record: logging.LogRecord) -> bool:
        server.close()
        return True

    monkeypatch.setattr(logging.getLogger("echo_async.access"), "filters", [close_server])
    with connect(server) as client:
        client.sendall(b"Hola\n")
        assert receive_all(client) == b"Hola\n"
    server.wait_closed()


def test_thread_that_has_ended_is_not_kept_for_the_next_client() -> None:
    """On Python 3.13 and newer it would keep its stack, and each client would get a new one."""
    threads: list[weakref.ref[threading.Thread]] = []

    class WaitForThreads(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:  # not emit, which holds a lock that others need
            if "connection established" in record.getMessage():  # logged by the thread that accepts
                wait_until(lambda: all(each() is None for each in threads))
            return True

    log = logging.getLogger("echo_async.server")
    log.setLevel(logging.DEBUG)
    log.addHandler(WaitForThreads())
    with sync.serve(port=0) as server:
        for _ in range(2):
            with socket.create_connection(server.address, TIMEOUT) as client:
                assert is_echoed(client, b"Hola\n")
                threads += [weakref.ref(each) for each in threading.enumerate() if each.name == "echo-async client"]
    assert len(threads) == 2


def test_close_by_many_threads_with_active_clients_ends() -> None:
    for _ in range(5):
        with sync.serve(port=0, no_access_log=True) as server, ExitStack() as threads:

            def use_until_closed(server: sync.EchoServer = server) -> None:
                with suppress(OSError, AssertionError):
                    while True:
                        with connect(server) as client:
                            is_echoed(client)

            for _ in range(3):
                threads.enter_context(thread(use_until_closed))
            server.wait_for(messages=6, timeout=TIMEOUT)
            for _ in range(3):
                threads.enter_context(thread(server.close))
            server.wait_closed()
        assert server.stats.active == 0


def test_sync_serve_invalid_option_is_rejected() -> None:
    with pytest.raises(echo_async.ConfigError, match="engine 'streams' requires an event loop; use "):
        sync.serve(engine="streams")
    with pytest.raises(echo_async.ConfigError, match="invalid mode: 'loud' "):
        sync.serve(mode=cast(Any, "loud"))


def test_sync_server_with_64_descriptors_serves_in_turn() -> None:
    """No client is refused, as with the default limit: all others are served after the first."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (64, 64))
    args = ("--threaded", "--mode", "stream", "--no-access-log", "--limit-connections", "1000")
    with server_process(*args, preexec_fn=limit) as server, ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(100)]
        server.wait_for_log("accept failed")
        for client in clients:
            assert is_echoed(client)
            client.close()
        log = server.stop()
    assert counters(log)["messages"] == 100
    assert "Traceback" not in log
    assert len(log.splitlines()) < 30
