"""Inherited listening sockets (--fd, LISTEN_FDS), service manager notifications, and restarts without failures."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from support import (
    TIMEOUT,
    Load,
    ServerProcess,
    ServerThread,
    command_process,
    receive_all,
    single_error_line,
)

from echo_async.cli.server import main
from echo_async.net import format_address

SERVER = (sys.executable, "-m", "echo_async.server")

VARIANTS = [
    ["--loop", "asyncio"],
    ["--engine", "protocol", "--loop", "uvloop"],
    ["--engine", "threads"],
    ["--workers", "2"],
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)


class HasFileno(Protocol):
    def fileno(self) -> int: ...


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield listener


@contextmanager
def server_on(listener: socket.socket, *options: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Start a server with ``--fd``."""
    number = listener.fileno()
    with command_process([*SERVER, "--fd", str(number), *options], env, pass_fds=[number]) as server:
        yield server


def exchange(address: tuple[str, int], message: bytes) -> bytes:
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(message)
        return receive_all(client)


# --fd


@each_variant
def test_inherited_socket_is_served_and_stays_open(variant: list[str], listener: socket.socket) -> None:
    with server_on(listener, *variant) as server:
        assert server.address == listener.getsockname()
        assert exchange(server.address, b"one\n") == b"one\n"
        assert server.stop()[0] == 0
    with socket.create_connection(server.address, TIMEOUT), listener.accept()[0]:
        pass  # a new server could accept this client


def test_inherited_unix_socket_file_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(512)
        with server_on(listener) as server, socket.socket(socket.AF_UNIX) as client:
            assert server.startup_line == f"listening on {path}\n"
            client.settimeout(TIMEOUT)
            client.connect(str(path))
            client.sendall(b"one\n")
            assert receive_all(client) == b"one\n"
            assert server.stop()[0] == 0
        assert path.exists()


@pytest.mark.parametrize("variant", [[], ["--workers", "2"]], ids=" ".join)
def test_fd_that_is_not_listening_exits_with_code_3(
    variant: list[str], listener: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_line(file: HasFileno) -> str:
        assert main(["--fd", str(file.fileno()), *variant]) == 3
        return single_error_line(*capsys.readouterr())

    with (
        open(tmp_path / "file", "w") as file,
        socket.socket() as not_listening,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        socket.create_connection(listener.getsockname()) as connected,
    ):
        not_listening.bind(("127.0.0.1", 0))
        assert f"descriptor {file.fileno()}: socket operation on non-socket; " in error_line(file)
        for other in (not_listening, datagrams, connected):
            assert f"descriptor {other.fileno()}: not a listening stream socket; " in error_line(other)
    number = listener.fileno()  # closed in a process to which it is not passed
    completed = subprocess.run(
        [*SERVER, "--fd", str(number), *variant], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert completed.returncode == 3
    assert f"descriptor {number}: bad file descriptor; " in single_error_line(completed.stdout, completed.stderr)


# LISTEN_FDS, as systemd sets it: for one process, from descriptor 3 on

SOCKET_ACTIVATION = """
import os, sys
pid, count, numbers, *command = sys.argv[1:]
for place, number in enumerate(map(int, numbers.split(",")), 3):
    os.dup2(number, place, inheritable=True)
os.environ["LISTEN_PID"] = pid or str(os.getpid())
os.environ["LISTEN_FDS"] = count
os.execv(command[0], command)
"""


@contextmanager
def activated(
    *listeners: socket.socket, pid: str = "", options: tuple[str, ...] = (), names: str = ""
) -> Iterator[ServerProcess]:
    """Start a server as systemd does, with ``listeners`` as descriptors from 3 on, and ``names`` in LISTEN_FDNAMES."""
    duplicates = [os.dup(listener.fileno()) for listener in listeners]
    inherited = [os.dup2(number, 100 + place) for place, number in enumerate(duplicates)]  # clear of 3 and up
    for number in duplicates:
        os.close(number)
    try:
        numbers = ",".join(map(str, inherited))
        command = [sys.executable, "-c", SOCKET_ACTIVATION, pid, str(len(listeners)), numbers, *SERVER, *options]
        with command_process(command, {"LISTEN_FDNAMES": names} if names else None, pass_fds=inherited) as server:
            yield server
    finally:
        for number in inherited:
            os.close(number)


@each_variant
def test_all_sockets_from_systemd_are_served(variant: list[str], listener: socket.socket) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as second,
        activated(listener, second, options=(*variant, "--port", "1")) as server,
    ):
        assert server.address == listener.getsockname()
        for each in (listener, second):
            assert exchange(each.getsockname(), b"one\n") == b"one\n"
        code, log = server.stop()
    assert code == 0
    assert "messages=2 " in log


def test_faults_on_sockets_from_systemd_are_refused(listener: socket.socket) -> None:
    with activated(listener, options=("--fault", "drop")) as server:
        code, log = server.wait()
    assert (code, log) == (
        2,
        "error: --fault and --fault-sequence conflict with LISTEN_FDS; use --host and --port, or --uds\n",
    )


def test_listen_fds_of_another_process_is_ignored(listener: socket.socket) -> None:
    with activated(listener, pid="1", options=("--port", "0")) as server:
        assert server.address != listener.getsockname()
        assert exchange(server.address, b"one\n") == b"one\n"
        assert server.stop()[0] == 0


# LISTEN_FDNAMES, from FileDescriptorName= of socket units


@each_variant
def test_listeners_serve_the_inherited_sockets_of_their_name(
    variant: list[str], listener: socket.socket, certificate: Path, client_context: ssl.SSLContext
) -> None:
    specs = ("--listen", "fd:secure,tls", "--listen", "fd:plain", "--listen", "127.0.0.1:0,fault=duplicate")
    options = (*specs, *variant, "--ssl-certfile", str(certificate))
    with (
        socket.create_server(("127.0.0.1", 0)) as secure,
        socket.create_server(("127.0.0.1", 0)) as second,
        activated(listener, secure, second, options=options, names="plain:secure:plain") as server,
    ):
        names = [format_address(each.getsockname()) for each in (secure, listener)]
        assert server.startup_line == f"listening on {names[0]}\n"
        with client_context.wrap_socket(server.connect(), server_hostname="localhost") as client:
            client.sendall(b"one\n")
            assert client.recv(100) == b"one\n"
        for each in (listener, second):
            assert exchange(each.getsockname(), b"one\n") == b"one\n"
        code, log = server.stop()
    assert code == 0
    for name, messages in zip(names, (1, 2), strict=True):
        assert re.search(rf"listener {name} stopped: .* messages={messages} ", log)
    assert "messages=3 " in log


def test_inherited_socket_without_a_name_is_unknown(listener: socket.socket) -> None:
    """As for sd_listen_fds_with_names(3)."""
    with activated(listener, options=("--listen", "fd:unknown,mode=raw")) as server:
        assert server.address == listener.getsockname()
        assert server.stop()[0] == 0


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        (
            "fd:web 0",
            "'fd:web' (no inherited socket has this name; LISTEN_FDNAMES has plain, secure)",
        ),
        ("fd:plain", "--listen does not include all inherited sockets; add fd:secure"),
        ("0", "--listen does not include all inherited sockets; add fd:plain, fd:secure"),
        ("fd:plain fd:secure,fault=drop", "fault and fault_sequence conflict with fd; use host and port, or uds"),
    ],
)
def test_listen_not_matching_inherited_sockets_exits_2(specs: str, reason: str, listener: socket.socket) -> None:
    options = tuple(word for spec in specs.split() for word in ("--listen", spec))
    with (
        socket.create_server(("127.0.0.1", 0)) as second,
        activated(listener, second, options=options, names="plain:secure") as server,
    ):
        code, log = server.wait()
    assert code == 2
    assert reason in single_error_line(server.startup_line, log)


# NOTIFY_SOCKET


NOTIFY_CASES = [(["--loop", "asyncio"], False), (["--engine", "threads"], True), (["--workers", "2"], False)]


@pytest.mark.parametrize(("variant", "abstract"), NOTIFY_CASES, ids=["asyncio", "threads", "workers"])
def test_service_manager_is_notified_of_start_and_stop(variant: list[str], abstract: bool, tmp_path: Path) -> None:
    name = f"@echo-async-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(TIMEOUT)
        with command_process([*SERVER, "--port", "0", *variant], {"NOTIFY_SOCKET": name}) as server:
            assert manager.recv(100) == b"READY=1"
            assert exchange(server.address, b"one\n") == b"one\n"  # READY=1: the server is reachable
            server.process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            code, log = server.wait()
        assert code == 0
        assert "cannot notify" not in log
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_missing_service_manager_is_only_a_warning(tmp_path: Path) -> None:
    with command_process([*SERVER, "--port", "0"], {"NOTIFY_SOCKET": str(tmp_path / "missing")}) as server:
        assert exchange(server.address, b"one\n") == b"one\n"
        code, log = server.stop()
    assert code == 0
    assert log.count("cannot notify the service manager at ") == 2
    assert "Traceback" not in log


# Restarts


@each_variant
def test_restart_on_an_inherited_socket_fails_no_client(variant: list[str], listener: socket.socket) -> None:
    with Load(listener.getsockname(), 4) as load:
        for is_last in (False, True):
            with server_on(listener, *variant, "--no-access-log") as server:
                load.wait_for(100)
                if is_last:
                    load.end()
                code, log = server.stop()
                assert code == 0
                assert "Traceback" not in log
    assert load.failed == []


@each_variant
def test_message_in_transit_at_the_stop_is_answered(variant: list[str], listener: socket.socket) -> None:
    """A new connection has a grace period for its first message; otherwise the next server accepts it."""
    with server_on(listener, *variant) as server:
        clients = [socket.create_connection(listener.getsockname(), TIMEOUT) for _ in range(20)]
        server.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.sendall(b"in transit\n")
        with ServerThread("asyncio", {"fd": os.dup(listener.fileno())}):
            for client in clients:
                with client:
                    assert receive_all(client) == b"in transit\n"
        assert server.wait()[0] == 0
