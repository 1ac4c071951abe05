"""Inherited listening sockets (--fd, LISTEN_FDS), service manager notifications, and restarts without failures."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from support import (
    TIMEOUT,
    Load,
    ServerProcess,
    ServerThread,
    command_process,
    connect_tls,
    is_echoed,
    receive_all,
    single_error_line,
)

from echo_async import sync
from echo_async.cli.server import main
from echo_async.net import format_address
from echo_async.service.systemd import listen_descriptors

SERVER = (sys.executable, "-m", "echo_async.server")

VARIANTS = [["--engine", "threads"], ["--workers", "2"]]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield listener


def server_on(listener: socket.socket, *options: str) -> AbstractContextManager[ServerProcess]:
    """Start a server with ``--fd``."""
    number = listener.fileno()
    return command_process([*SERVER, "--fd", str(number), *options], pass_fds=[number])


def test_inherited_unix_socket_file_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "echo"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(512)
        with server_on(listener) as server:
            assert server.startup_line == f"listening on {path}\n"
            assert sync.echo("one", uds=path) == "one"
            server.stop()
        assert path.exists()


def test_fd_that_is_not_listening_exits_with_code_3(
    listener: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        open(tmp_path / "file", "w") as file,
        socket.socket() as not_listening,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        socket.create_connection(listener.getsockname()) as connected,
    ):
        not_listening.bind(("127.0.0.1", 0))
        for number, reason in (
            (file.fileno(), "socket operation on non-socket"),
            *((each.fileno(), "not a listening stream socket") for each in (not_listening, datagrams, connected)),
            (resource.getrlimit(resource.RLIMIT_NOFILE)[1], "bad file descriptor"),
        ):
            for variant in ((), ("--workers", "2")):
                assert main(["--fd", str(number), *variant]) == 3
                assert f"descriptor {number}: {reason}; " in single_error_line(*capsys.readouterr())


# LISTEN_FDS, as systemd sets it: for one process, from descriptor 3 on

SOCKET_ACTIVATION = """
import os, sys
count, numbers, *command = sys.argv[1:]
for place, number in enumerate(map(int, numbers.split(",")), 3):
    os.dup2(number, place, inheritable=True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = count
os.execv(command[0], command)
"""


@contextmanager
def activated(*listeners: socket.socket, options: tuple[str, ...] = (), names: str = "") -> Iterator[ServerProcess]:
    """Start a server as systemd does, with ``listeners`` as descriptors from 3 on, and ``names`` in LISTEN_FDNAMES."""
    with ExitStack() as stack:
        inherited = [fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in listeners]  # clear of 3 and up
        for number in inherited:
            stack.callback(os.close, number)
        numbers = ",".join(map(str, inherited))
        command = [sys.executable, "-c", SOCKET_ACTIVATION, str(len(listeners)), numbers, *SERVER, *options]
        yield stack.enter_context(
            command_process(command, {"LISTEN_FDNAMES": names} if names else None, pass_fds=inherited)
        )


def test_all_sockets_from_systemd_are_served(listener: socket.socket) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as second,
        activated(listener, second, options=("--engine", "threads", "--port", "1")) as server,
    ):
        assert server.address == listener.getsockname()
        for each in (listener, second):
            assert sync.echo("one", *each.getsockname()) == "one"
        log = server.stop()
    assert "messages=2 " in log


def test_listen_fds_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[int, str, str, dict[int, str]]] = [
        (os.getpid(), "2", "", {3: "unknown", 4: "unknown"}),  # as for sd_listen_fds_with_names(3)
        (os.getpid(), "3", "web::web:other", {3: "web", 4: "unknown", 5: "web"}),
        (os.getpid(), "x", "web", {}),
        (os.getppid(), "1", "web", {}),
    ]
    for pid, count, names, expected in cases:
        set_environment(monkeypatch, count, names, pid)
        assert listen_descriptors() == expected
        assert not any(name.startswith("LISTEN_") for name in os.environ)  # child processes do not get them


def set_environment(monkeypatch: pytest.MonkeyPatch, count: str, names: str, pid: int) -> None:
    for name, value in {"LISTEN_PID": str(pid), "LISTEN_FDS": count, "LISTEN_FDNAMES": names}.items():
        monkeypatch.setenv(name, value)


# LISTEN_FDNAMES, from FileDescriptorName= of socket units


def test_listeners_serve_the_inherited_sockets_of_their_name(
    listener: socket.socket, certificate: Path, client_context: ssl.SSLContext
) -> None:
    specs = ("--listen", "fd:secure,tls", "--listen", "fd:plain", "--listen", "127.0.0.1:0,fault=duplicate")
    options = (*specs, "--workers", "2", "--ssl-certfile", str(certificate))
    with (
        socket.create_server(("127.0.0.1", 0)) as secure,
        socket.create_server(("127.0.0.1", 0)) as second,
        activated(listener, secure, second, options=options, names="plain:secure:plain") as server,
    ):
        names = [format_address(each.getsockname()) for each in (secure, listener)]
        assert server.startup_line == f"listening on {names[0]}\n"
        with connect_tls(server, client_context) as client:
            assert is_echoed(client)
        for each in (listener, second):
            assert sync.echo("one", *each.getsockname()) == "one"
        log = server.stop()
    for name, messages in zip(names, (1, 2), strict=True):
        assert re.search(rf"listener {name} stopped: .* messages={messages} ", log)
    assert "messages=3 " in log


def test_options_not_matching_inherited_sockets_exit_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, reason in (
        ("--listen fd:web", "'fd:web' (no inherited socket has this name; LISTEN_FDNAMES has plain, secure)"),
        ("--listen fd:plain", "--listen does not include all inherited sockets; add fd:secure"),
        ("--listen 0", "--listen does not include all inherited sockets; add fd:plain, fd:secure"),
        ("--listen fd:plain,fault=drop", "fault and fault_sequence conflict with fd; use host and port, or uds"),
        ("--fault drop", "--fault and --fault-sequence conflict with LISTEN_FDS; use --host and --port, or --uds"),
    ):
        set_environment(monkeypatch, "2", "plain:secure", os.getpid())
        assert main(options.split()) == 2
        assert reason in single_error_line(*capsys.readouterr())


@pytest.mark.parametrize(("variant", "abstract"), [(["--engine", "threads"], True), (["--workers", "2"], False)])
def test_service_manager_is_notified_of_start_and_stop(variant: list[str], abstract: bool, tmp_path: Path) -> None:
    name = f"@echo-async-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(TIMEOUT)
        with command_process([*SERVER, "--port", "0", *variant], {"NOTIFY_SOCKET": name}) as server:
            assert manager.recv(100) == b"READY=1"
            assert sync.echo("one", *server.address) == "one"  # READY=1: the server is reachable
            server.process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            log = server.wait()
        assert "cannot notify" not in log
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_missing_service_manager_is_only_a_warning(tmp_path: Path) -> None:
    with command_process([*SERVER, "--port", "0"], {"NOTIFY_SOCKET": str(tmp_path / "missing")}) as server:
        assert sync.echo("one", *server.address) == "one"
        log = server.stop()
    assert log.count("cannot notify the service manager at ") == 2
    assert "Traceback" not in log


@each_variant
def test_restart_on_an_inherited_socket_fails_no_client(variant: list[str], listener: socket.socket) -> None:
    with Load(listener.getsockname(), 4) as load:
        for is_last in (False, True):
            with server_on(listener, *variant, "--no-access-log") as server:
                load.wait_for(30)
                if is_last:
                    load.end()
                log = server.stop()
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
        server.wait()
