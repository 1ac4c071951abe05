"""Fixtures of all tests, and the checks after each test."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Unpack

import pytest
import trustme
from hypothesis import settings
from support import (
    ALL_BACKENDS,
    BACKENDS,
    LOOPS,
    Backend,
    Cli,
    ScriptedDatagrams,
    ServerThread,
    StartDatagrams,
    StartServer,
    echo_datagram,
    reserve_port,
    run,
    wait_until,
)

import echo_async
from echo_async.config import ServerOptions
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer, HostedServerOptions

# No deadline: examples take longer on a loaded machine.
settings.register_profile("tests", deadline=None, max_examples=100 if ALL_BACKENDS else 40)
settings.load_profile("tests")


def pytest_configure() -> None:
    """Make the tests independent of the load of the machine, and of the shell that starts them."""
    # A shell or nohup ignores signals, which commands inherit.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    # In debug mode, asyncio reports a step that takes 0.1 s. On a busy machine any step can.
    logging.getLogger("asyncio").addFilter(lambda record: not str(record.msg).startswith("Executing "))


LONG_TESTS = {
    "test_each_defect_is_found_by_its_own_check_only",
    "test_docs_sessions_print_the_documented_output[docs/lessons.md]",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait for ten seconds. At the end, all other processes would wait for them."""
    items.sort(key=lambda item: item.name not in LONG_TESTS)


def pytest_collection_finish() -> None:
    """Exclude the objects of the session from later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm_up_loops() -> None:
    """Run each event loop once: the first one in a process opens descriptors that stay open."""
    for loop in LOOPS:
        run(lambda: asyncio.sleep(0), loop)


def count_resources() -> tuple[int, int]:
    """Return the number of descriptors and of threads, without the cached threads of trio."""
    threads = [each for each in threading.enumerate() if not each.name.startswith("Trio ")]
    return len(os.listdir("/proc/self/fd")), len(threads)


@pytest.fixture
def no_leaks(warm_up_loops: None) -> Iterator[None]:
    """Check that a test leaves no additional descriptor or thread."""
    before = count_resources()
    yield
    # A canceled name resolution continues in its thread for a moment.
    wait_until(lambda: all(now <= then for now, then in zip(count_resources(), before, strict=True)))


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Cycles of references stay, so that a test can count them."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def restore_loggers() -> Iterator[None]:
    """Undo the logging configuration of a command or an example that runs in this process."""
    names = ["echo_async", "echo_async.access", "echo_async.client", "echo_async.server"]
    loggers = [(each, each.level, each.handlers[:], each.propagate) for each in map(logging.getLogger, names)]
    raising = logging.raiseExceptions
    yield
    for logger, level, handlers, propagate in loggers:
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = handlers, propagate
    logging.raiseExceptions = raising


@pytest.fixture(autouse=True)
def no_internal_errors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check that servers had no internal error, which ends a connection as a client may expect it."""
    errors: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if "internal error" in str(record.msg):
            errors.append(record.getMessage())
        return True

    logger = logging.getLogger("echo_async.server")
    logger.addFilter(note)
    yield
    logger.removeFilter(note)
    if request.node.get_closest_marker("internal_errors") is None:
        assert errors == []


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate for ``localhost`` and 127.0.0.1, and its key."""
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


@pytest.fixture(scope="session")
def ca_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    """The TLS context of a client that trusts ``certificate``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def context(request: pytest.FixtureRequest, client_context: ssl.SSLContext) -> ssl.SSLContext | None:
    """Run the test without TLS, and with it: the TLS context of its clients."""
    return client_context if request.param else None


@pytest.fixture
def server_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture(params=BACKENDS, ids="-".join)
def backend(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    return backend


@pytest.fixture
def start_server(backend: Backend, certificate: Path) -> StartServer:
    """Start servers of each engine, with TLS if ``tls`` is true."""

    @contextmanager
    def start(*, tls: bool = False, **options: Unpack[ServerOptions]) -> Iterator[echo_async.EchoServer]:
        options = {"engine": backend.engine, "port": 0, **options}
        if tls:
            options["ssl_certfile"] = str(certificate)
        with ServerThread(backend.loop, options) as server:
            yield server

    return start


@pytest.fixture
def faulty_server() -> Iterator[MakeEchoServer]:
    """Start servers for one test; by default each is an echo in ``stream`` mode."""
    with ExitStack() as stack:

        def start(**options: Unpack[HostedServerOptions]) -> HostedServer:
            return stack.enter_context(HostedServer(**options))

        yield start


@pytest.fixture
def cli(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capfdbinary, monkeypatch)


@pytest.fixture
def start_datagrams() -> Iterator[StartDatagrams]:
    """Start UDP servers for one test; by default each is an echo."""
    with ExitStack() as stack:
        yield lambda answer=echo_datagram, *host: stack.enter_context(ScriptedDatagrams(answer, *host))


@pytest.fixture
def until_the_end() -> Iterator[ExitStack]:
    """What a handler enters stays entered until the end of the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def reserved_port() -> Iterator[int]:
    with reserve_port() as port:
        yield port


@pytest.fixture
def closed_port(refused_address: tuple[str, int]) -> int:
    return refused_address[1]


@pytest.fixture
def closed_udp_port() -> Iterator[int]:
    """A port that refuses datagrams, and that no other process gets: its socket is connected to itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        bound.connect(bound.getsockname())
        yield bound.getsockname()[1]
