"""Helpers of several tests: event loops, blocking clients, servers in a thread or in a process."""

from __future__ import annotations

import asyncio
import errno
import functools
import gc
import inspect
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, closing, contextmanager, suppress
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from time import monotonic
from types import TracebackType
from typing import IO, Any, NamedTuple, Protocol, TypeVar, Unpack, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

import echo_async
from echo_async import sync
from echo_async.cli.main import main
from echo_async.client.endpoint import closed_on_error
from echo_async.config import EngineName, Mode, ServerOptions
from echo_async.loops import LoopName, loop_factory
from echo_async.testing import HostedServer, Peer
from echo_async.testing.scripts import Handler

T = TypeVar("T")

sends_at_once = pytest.mark.skipif(version("uvloop") < "0.23", reason="this uvloop sends at the end of a turn")

LOOPS: tuple[LoopName, ...] = ("asyncio", "uvloop")
MAX_DELAY = 5.0  # seconds that an immediate action may take on a loaded machine
TIMEOUT = 20.0  # seconds after which a test that waits fails


def run(main: Callable[[], Coroutine[Any, Any, T]], loop: str = "asyncio") -> T:
    """Run ``main()`` in a new event loop in debug mode."""
    with asyncio.Runner(loop_factory=loop_factory(loop), debug=True) as runner:
        return runner.run(main())


Test = Callable[..., Coroutine[Any, Any, None]]


def in_its_loop(test: Test) -> Callable[..., None]:
    """Make a test of a coroutine function, in the event loop of its ``backend``, its ``loop``, or that of asyncio.

    It must leave no task and no error of the loop.
    """

    @functools.wraps(test)
    def run_test(**fixtures: Any) -> None:
        errors: list[dict[str, Any]] = []
        arguments = {name: fixtures[name] for name in inspect.signature(test).parameters}

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
            async with asyncio.timeout(2 * TIMEOUT):
                await test(**arguments)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        run(main, fixtures["backend"].loop if "backend" in fixtures else fixtures.get("loop", "asyncio"))
        gc.collect()
        assert errors == []

    return run_test


def on_each_loop(test: Test) -> Callable[..., None]:
    """Make a test of a coroutine function, on each event loop, as :func:`in_its_loop` does."""
    run_test: Any = in_its_loop(test)
    signature = inspect.signature(test)
    loop = inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)
    run_test.__signature__ = signature.replace(parameters=[*signature.parameters.values(), loop])
    return cast(Callable[..., None], pytest.mark.parametrize("loop", LOOPS)(run_test))


class Backend(NamedTuple):
    """An engine, and the event loop that the server runs on."""

    engine: EngineName
    loop: LoopName


# Each engine once, or on each event loop. What an engine does on one loop and not on the other is rarely ours.
ALL_BACKENDS = "ALL_BACKENDS" in os.environ
BACKENDS = [
    Backend("streams", "asyncio"),
    *([Backend("streams", "uvloop"), Backend("protocol", "asyncio")] if ALL_BACKENDS else []),
    Backend("protocol", "uvloop"),
    Backend("threads", "asyncio"),
]
StartServer = Callable[..., AbstractContextManager[echo_async.EchoServer]]


class ServerThread:
    """A server in its own event loop, in its own thread. On exit it is closed and must leave no task."""

    def __init__(self, loop: LoopName, options: ServerOptions) -> None:
        self._runner = asyncio.Runner(loop_factory=loop_factory(loop))
        self._options = options
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.loop_errors: list[str] = []

    def _run(self) -> None:
        with self._runner as runner:
            runner.get_loop().set_exception_handler(lambda _, context: self.loop_errors.append(str(context)))
            try:
                runner.run(self._serve())
            finally:
                self._started.set()

    async def _serve(self) -> None:
        async with echo_async.serve(**self._options) as self.server:
            self._started.set()
            await self.server.wait_closed()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "the server left a task"

    def __enter__(self) -> echo_async.EchoServer:
        self._thread.start()
        self._started.wait(TIMEOUT)
        return self.server

    def __exit__(self, *exception: object) -> None:
        self.server.close()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        assert not self.loop_errors, self.loop_errors


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll ``condition`` until it holds."""
    pause = threading.Event()
    deadline = monotonic() + TIMEOUT
    while not condition():
        assert monotonic() < deadline, f"condition not met within {TIMEOUT} s"
        pause.wait(0.005)


def wait_for(server: echo_async.EchoServer | sync.EchoServer | HostedServer, **counters: int | dict[str, int]) -> None:
    """Wait until counters of ``server`` are exactly as expected. An event loop must not run in this thread."""
    if isinstance(server, echo_async.EchoServer):
        asyncio.run(server.wait_for(timeout=TIMEOUT, **counters))
    else:
        server.wait_for(timeout=TIMEOUT, **counters)
    for name, expected in counters.items():
        found = getattr(server.stats, name)
        assert (found if isinstance(expected, int) else {key: found.get(key) for key in expected}) == expected


def wait_exited(*processes: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it has exited
            descriptor = os.pidfd_open(process)
            exited, _, _ = select.select([descriptor], [], [], TIMEOUT)
            os.close(descriptor)
            assert exited, f"process {process} did not exit within {TIMEOUT} s"


def receive_line(client: socket.socket, size: int = 0) -> bytes:
    """Read until a newline ends at least ``size`` bytes."""
    line = b""
    while len(line) < size or not line.endswith(b"\n"):
        data = client.recv(65536)
        assert data, f"closed after {line!r}"
        line += data
    return line


def receive_all(client: socket.socket) -> bytes:
    """Read until the end of the stream."""
    received = bytearray()
    while data := client.recv(65536):
        received += data
    return bytes(received)


def without_slow_callbacks(stderr: str) -> str:
    """Remove what asyncio's debug mode (``PYTHONDEVMODE``) reports on a busy machine."""
    return re.sub(r"^Executing <.*> took \d+\.\d+ seconds\n", "", stderr, flags=re.MULTILINE)


def single_error_line(stdout: str, stderr: str) -> str:
    """Check that a command printed one error line on stderr and nothing on stdout; return that line."""
    stderr = without_slow_callbacks(stderr)
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    return stderr


class ChildProcess(subprocess.Popen[Any]):
    """A process in a session of its own, which ends with the block: it exits within ``TIMEOUT``, or the test fails.

    After a failure, a timeout of the test included, it is killed at once, and in any case its children with it.
    """

    stdin: IO[Any]
    stdout: IO[Any]
    stderr: IO[Any]

    def __init__(self, command: Sequence[str | bytes | Path], **options: Any) -> None:
        super().__init__(command, **{"start_new_session": True, **options})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
                    stream.close()
                self.wait(TIMEOUT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            super().__exit__(kind, error, traceback)


def run_process(command: Sequence[str | Path], input: str | None = None, **options: Any) -> CompletedProcess[str]:
    """Run a command until it exits, within ``TIMEOUT``; return its exit code and its output."""
    options |= {} if input is None else {"stdin": PIPE}
    with ChildProcess(command, stdout=PIPE, stderr=PIPE, text=True, **options) as process:
        out, err = process.communicate(input, TIMEOUT)
    return CompletedProcess(command, process.returncode, out, without_slow_callbacks(err))


class Done(NamedTuple):
    """The exit code and the output of a command. Bytes that are not UTF-8 are surrogates, as in arguments."""

    code: int
    out: str
    err: str


class Cli:
    """Runs ``echo-async`` in this process, with the words of a text, and with further arguments.

    stdin is a file, a pipe or what these bytes are in a file, or there is none.
    """

    def __init__(self, capture: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capture, self._monkeypatch = capture, monkeypatch

    def __call__(self, words: str, *arguments: str, stdin: bytes | IO[Any] | None = None) -> Done:
        with tempfile.TemporaryFile() as file:
            if isinstance(stdin, bytes):
                file.write(stdin)
                file.seek(0)
                stdin = file
            self._monkeypatch.setattr(sys, "stdin", stdin)
            code = main([*words.split(), *arguments])
        out, err = (each.decode(errors="surrogateescape") for each in self._capture.readouterr())
        return Done(code, out, without_slow_callbacks(err))

    def output(self, words: str, *arguments: str, code: int = 0) -> str:
        """Run a command that exits with ``code`` and prints no error; return what it prints."""
        done = self(words, *arguments)
        assert (done.code, done.err) == (code, "")
        return done.out

    def error(self, words: str, *arguments: str, code: int) -> str:
        """Run a command that exits with ``code`` and prints one line, an error; return that line."""
        done = self(words, *arguments)
        assert done.code == code, done
        return single_error_line(done.out, done.err)


class ServerProcess:
    """A running server command, reachable at ``address``."""

    def __init__(self, process: ChildProcess) -> None:
        self.process = process
        self.startup_line = process.stdout.readline()
        self._stderr: list[str] = []
        self._has_read = threading.Condition()
        # A daemon thread: a process that the server left behind keeps the pipe open and must not block the tests.
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def _read_stderr(self) -> None:
        with self.process.stderr as lines:
            for line in map(without_slow_callbacks, lines):
                with self._has_read:
                    self._stderr.append(line)
                    self._has_read.notify_all()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.startup_line.removeprefix("listening on ").strip().rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def log(self) -> str:
        """The output on stderr so far."""
        return "".join(self._stderr)

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until the log has ``text`` so many times."""
        with self._has_read:
            assert self._has_read.wait_for(lambda: self.log.count(text) >= times, TIMEOUT), self.log

    @property
    def worker_pids(self) -> list[int]:
        """The process ids of its workers."""
        return child_processes(self.process.pid)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, TIMEOUT)

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Send a signal, and wait for the exit with code 0. Return the output on stderr."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, code: int | None = 0) -> str:
        """Wait for the exit with ``code``, or with any if it is None. Return the output on stderr."""
        found = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        assert not self._reader.is_alive(), f"the server left a process, after:\n{self.log}"
        assert code in (found, None), f"exit code {found}, after:\n{self.log}"
        return self.log


def counters(log: str, event: str = "server stopped: ") -> dict[str, int]:
    """Return the counters that are not 0 in the line of the log with ``event``."""
    [line] = re.findall(f"{re.escape(event)}(.*)", log)
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line) if count != "0"}


class Load:
    """Threads that repeatedly connect, receive one reply and close. ``failed`` has the start time of each failure."""

    def __init__(self, address: tuple[str, int], threads: int = 2) -> None:
        self._address = address
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._has_reply = threading.Condition()
        self.done = 0
        self.failed: list[tuple[float, Exception]] = []

    def _run(self) -> None:
        while not self._end.is_set():
            started_at = monotonic()
            try:
                with socket.create_connection(self._address, TIMEOUT) as client:
                    assert is_echoed(client, b"under load, with more than one chunk\n")
                with self._has_reply:
                    self.done += 1
                    self._has_reply.notify_all()
            except (OSError, AssertionError) as error:
                self.failed.append((started_at, error))

    def wait_for(self, count: int) -> None:
        """Wait until ``count`` more connections have got their reply."""
        with self._has_reply:
            done = self.done + count
            assert self._has_reply.wait_for(lambda: self.done >= done, TIMEOUT)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def __exit__(self, *exception: object) -> None:
        self.end()


def child_processes(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for each in children for number in each.read_text().split()]


def connect_to(worker: int, server: ServerProcess, address: tuple[str, int] | None = None) -> socket.socket:
    """Connect until it is ``worker`` that accepts the connection. Nobody else may connect meanwhile."""
    with ExitStack() as rejected:
        while True:
            before = {each: open_sockets(each) for each in server.worker_pids}
            client = socket.create_connection(address or server.address, TIMEOUT)
            wait_until(lambda: accepted_since(before) != [])  # noqa: B023
            if accepted_since(before) == [worker]:
                return client
            rejected.enter_context(client)


def accepted_since(before: dict[int, set[str]]) -> list[int]:
    """Return the processes that have opened sockets since."""
    return [process for process, sockets in before.items() if open_sockets(process) - sockets]


def open_sockets(process: int) -> set[str]:
    sockets = set()
    for each in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):
            sockets.add(os.readlink(each))
    return sockets


@contextmanager
def server_process(*args: str, env: dict[str, str] | None = None, **popen: Any) -> Iterator[ServerProcess]:
    """Run ``python -m echo_async.server`` on a free port until the end of the block."""
    with command_process([sys.executable, "-m", "echo_async.server", "--port", "0", *args], env, **popen) as server:
        yield server


@contextmanager
def command_process(command: list[str], env: dict[str, str] | None = None, **popen: Any) -> Iterator[ServerProcess]:
    """Run ``command``, which starts a server, until the end of the block."""
    environment = {**os.environ, **(env or {})}
    with ChildProcess(command, stdout=PIPE, stderr=PIPE, text=True, env=environment, **popen) as process:
        server = ServerProcess(process)
        try:
            yield server
        finally:
            process.kill()
            server.wait(None)


class Listener(NamedTuple):
    """One of several listeners of a server."""

    name: str  # as in the log

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.name.rpartition(":")
        return host, int(port)


@contextmanager
def listening(*specs: str, options: Sequence[str] = (), **popen: Any) -> Iterator[tuple[ServerProcess, list[Listener]]]:
    """Start a server with a listener for each spec."""
    arguments = [word for spec in specs for word in ("--listen", spec)]
    command = [sys.executable, "-m", "echo_async.server", *arguments, *options]
    with command_process(command, **popen) as server:
        lines = [server.startup_line, *(server.process.stdout.readline() for _ in specs[1:])]
        yield server, [Listener(line.removeprefix("listening on ").rstrip("\n")) for line in lines]


@contextmanager
def paused_processes(*processes: int) -> Iterator[None]:
    """Stop ``processes`` with SIGSTOP for the duration of the block, so that another worker accepts connections."""
    try:
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        wait_until(lambda: all(map(is_stopped, processes)))
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def is_stopped(process: int) -> bool:
    return all("\nState:\tT" in each.read_text() for each in Path(f"/proc/{process}/task").glob("*/status"))


def run_in_namespace(setup: str, *command: str) -> CompletedProcess[str]:
    """Run a command in network and mount namespaces that shell commands set up; skip the test where that fails."""
    prefix = ["unshare", "-rnm", "sh", "-c", f'ip link set lo up && {setup} && exec "$@"', "sh"]
    if (
        not all(map(shutil.which, ("unshare", "ip")))
        or subprocess.run([*prefix, "true"], capture_output=True, timeout=TIMEOUT).returncode
    ):
        pytest.skip("this user may not set up a network namespace")
    return run_process([*prefix, *command])


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@contextmanager
def haproxy(configuration: str, directory: Path) -> Iterator[tuple[list[Any], IO[str]]]:
    """Run HAProxy with a free port for each port 5500 to bind; yield the addresses to connect to, and its log."""
    path, listeners = directory / "haproxy.cfg", []
    output = {"stdout": PIPE, "stderr": subprocess.STDOUT, "text": True}
    with ExitStack() as stack:

        def bind(_: re.Match[str]) -> str:
            listeners.append(stack.enter_context(socket.create_server(("127.0.0.1", 0))))
            return f"bind fd@{listeners[-1].fileno()}"

        path.write_text(re.sub(r"bind \S*:5500", bind, configuration))
        descriptors = [each.fileno() for each in listeners]
        with ChildProcess(["haproxy", "-db", "-f", str(path)], pass_fds=descriptors, **output) as process:
            try:
                yield [each.getsockname() for each in listeners], process.stdout
            finally:
                process.terminate()


class OldKernel(socket.socket):
    """A socket of a kernel without IPv6."""

    def __init__(self, family: int = -1, *args: Any, **more: Any) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *args, **more)


@contextmanager
def reserve_port() -> Iterator[int]:
    """A port for one server. No other process gets it, also after the server has stopped: it is closed then."""
    with socket.socket() as bound_socket:
        bound_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server can bind it as well
        bound_socket.bind(("127.0.0.1", 0))
        yield bound_socket.getsockname()[1]


class HasAddress(Protocol):
    """A running server."""

    @property
    def address(self) -> Any: ...


def connect(server: HasAddress, context: ssl.SSLContext | None = None) -> socket.socket:
    """Connect a blocking socket with a timeout and without Nagle's algorithm, over TLS if there is a ``context``.

    It gets its TLS before it is connected: one that was reset before that would stay open (``ssl.SSLSocket._create``).
    """
    address = server.address
    is_unix = isinstance(address, str)
    client = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    if context is not None:
        client = context.wrap_socket(client, server_hostname="localhost")
    with closed_on_error(client):
        client.settimeout(TIMEOUT)
        client.connect(address)
        if not is_unix:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client


def connect_tls(server: HasAddress, context: ssl.SSLContext) -> ssl.SSLSocket:
    return cast(ssl.SSLSocket, connect(server, context))


def reset(client: socket.socket) -> None:
    """Close the connection with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def count_events(line: str) -> int:
    """Return how many events a line of a rate limited log stands for."""
    repeated = re.search(r" \(repeated (\d+) times\)$", line)
    return int(repeated[1]) if repeated else 1


def is_closed(client: socket.socket) -> bool:
    """Return whether the connection ends or is reset, without further bytes."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")


def has_exited(process: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def scrape_metrics(log: str) -> dict[str, float]:
    """Return every sample of a server with this log, by its name and labels."""
    [port] = re.findall(r" metrics available at http://127\.0\.0\.1:(\d+)/metrics\n", log)
    with closing(HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return {each.name + "".join(f"[{value}]" for value in each.labels.values()): each.value for each in samples}


def is_echoed(client: socket.socket, message: bytes = b"still there\n") -> bool:
    """Send a message and compare the reply with it."""
    client.sendall(message)
    return receive_line(client) == message


def fill(client: socket.socket, data: bytes = bytes(range(32, 127)) * 10 + b"\n") -> int:
    """Send until the server stops reading because this client reads nothing. Return the number of bytes sent."""
    sent = 0
    while select.select([], [client], [], 0.04)[1]:
        sent += client.send(data[sent % len(data) :])
    return sent


async def wait_in_loop(condition: Callable[[], bool]) -> None:
    """Run the event loop until ``condition`` holds."""
    deadline = monotonic() + TIMEOUT
    while not condition():
        assert monotonic() < deadline, f"condition not met within {TIMEOUT} s"
        await asyncio.sleep(0)


def expected_replies(mode: Mode, sent: bytes, limit: int) -> bytes:
    """Return the replies to ``sent``, by the simplest reading of the wire protocol."""
    if mode == "raw":
        return sent
    replies = b""
    for message in sent.split(b"\n")[:-1]:
        if len(message) + 1 > limit:
            break
        replies += message + b"\n"
        if mode == "message":
            break
    return replies


def log_lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    """Return the captured messages of ``level`` and above."""
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


@asynccontextmanager
async def serve_in_loop(backend: Backend, **options: Unpack[ServerOptions]) -> AsyncIterator[echo_async.EchoServer]:
    """Start a server in the running loop. The block closes it; no socket, connection or task may be left."""
    defaults: ServerOptions = {"engine": backend.engine, "port": 0, "mode": "stream"}
    server = await echo_async.serve(**(defaults | options))
    yield server
    assert not server.is_serving()
    assert server.sockets == ()
    assert server.stats.active == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


PROXY_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
TCP4_ADDRESSES = socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.9") + struct.pack("!HH", 4711, 443)


def proxy_header(*fields: bytes, command: int = 0x21, family: int = 0x11, addresses: bytes = TCP4_ADDRESSES) -> bytes:
    """Return a PROXY header of version 2."""
    rest = addresses + b"".join(fields)
    return PROXY_SIGNATURE + struct.pack("!BBH", command, family, len(rest)) + rest


def tlv(kind: int, value: bytes) -> bytes:
    """Return a field of a PROXY header of version 2."""
    return struct.pack("!BH", kind, len(value)) + value


def receive_exactly(client: socket.socket, size: int) -> bytes:
    """Read ``size`` bytes; fewer only at the end of the stream."""
    received = bytearray()
    while len(received) < size and (data := client.recv(min(65536, size - len(received)))):
        received += data
    return bytes(received)


# The modules of the package that use a constant.
CONSTANTS = {
    "ACCEPT_RETRY_DELAY": ("server.accept_loop", "server.thread_acceptor"),
    "DRAIN_THRESHOLD": ("engines.streams",),
    "HANDSHAKE_TIMEOUT": ("server.admission", "server.accept_loop", "server.thread_acceptor"),
    "LINGER_TIMEOUT_AT_STOP": ("server.registry",),
    "MAX_WAIT_AT_END": ("engines.runner",),
}


def set_constant(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    """Change a constant of the server in every module that uses it."""
    for module in CONSTANTS[name]:
        monkeypatch.setattr(f"echo_async.{module}.{name}", value)


def lines(peer: Peer) -> Iterator[bytes]:
    """Receive lines until the client ends the connection, which ends the handler."""
    while True:
        yield peer.receive_line()


def over_socket(serve: Callable[[socket.socket], object]) -> Handler:
    """Return a handler of a function that has the socket of the connection, and may use it as it likes."""

    def serve_socket(peer: Peer) -> None:
        with peer.socket as connected, suppress(OSError, ValueError):
            serve(connected)

    return serve_socket


Answer = Callable[[int, bytes], Iterable[bytes]]
"""Returns the datagrams to send when one is received, which is the first, second, ... of all."""


class ScriptedDatagrams:
    """A UDP server that sends what ``answer`` returns to where the last datagram came from."""

    def __init__(self, answer: Answer, host: str = "127.0.0.1", port: int = 0) -> None:
        self._answer = answer
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, port))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.received: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._socket:
            while True:
                data, client = self._socket.recvfrom(70_000)
                if client[:2] == self.address:
                    return
                self.received.append(data)
                for reply in self._answer(len(self.received), data):
                    self._socket.sendto(reply, client)

    def stop_soon(self) -> None:
        """Close the socket after the datagrams received so far; from then on the port refuses datagrams."""
        with suppress(OSError):  # it is closed
            self._socket.sendto(b"", self.address)

    def stop(self) -> None:
        self.stop_soon()
        self._thread.join(TIMEOUT)

    def __enter__(self) -> ScriptedDatagrams:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


def echo_datagram(number: int, data: bytes) -> Iterable[bytes]:
    return [data]


StartDatagrams = Callable[..., ScriptedDatagrams]


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """Make the resolver return ``addresses`` for the name several.example."""
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> Any:
        if host != "several.example" or kwargs.get("flags"):
            return real(host, *args, **kwargs)
        families = (socket.AF_INET6 if ":" in each[0] else socket.AF_INET for each in addresses)
        known = zip(families, addresses, strict=True)
        return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for family, address in known]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
