"""Listening sockets: resolve, bind, adopt. Every error names the address, and no socket is left open."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support import TIMEOUT, OldKernel, needs_ipv6, receive_all, run

import echo_async
from echo_async import ServerConfig, StartError, net
from echo_async.net import Address, AddressInfo, adopt, bind, format_address, get_address, resolve
from echo_async.server.listeners import ListeningSockets


@pytest.fixture(autouse=True)
def _no_descriptor_is_left_open() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@contextmanager
def bound(**options: Any) -> Iterator[list[socket.socket]]:
    """Bind the listening sockets of these options, by default on any free port."""
    config = ServerConfig(**{"port": 0, **options})
    infos: Any = resolve(config)
    with ExitStack() as stack:
        sockets = bind(config, infos)
        for each in sockets:
            stack.enter_context(each)
        yield sockets
        if config.uds and os.path.exists(config.uds):
            os.unlink(config.uds)


def is_reachable(address: Address) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as client:
        try:
            client.connect(address)
        except OSError:
            return False
        return True


def bind_error(**options: Any) -> str:
    """Return the text of the StartError that these options raise."""
    with pytest.raises(StartError) as caught, bound(**options):
        pass
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_listening_socket_has_the_options_of_the_server() -> None:
    with bound() as [listener]:
        assert not listener.get_inheritable()
        with pytest.raises(BlockingIOError):
            listener.accept()
    with socket.create_server(("127.0.0.1", 0)) as original:
        address = original.getsockname()
        with closing(adopt(original.detach())) as listener, socket.create_connection(address) as client:
            listener.setblocking(True)
            with listener.accept()[0] as accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
            client.close()


@needs_ipv6
def test_bind_of_several_hosts_opens_each_once() -> None:
    for hosts in (("::", "0.0.0.0"), ["127.0.0.1", "::"], ("127.0.0.1", "127.0.0.2", "127.0.0.1")):
        with bound(host=hosts) as sockets:
            port = sockets[0].getsockname()[1]
            addresses = [get_address(each) for each in sockets]
            assert addresses == [(host, port) for host in dict.fromkeys(hosts)]
            for host in ["127.0.0.1", *(["::1"] if "::" in hosts else [])]:
                assert is_reachable((host, port))


def test_bind_of_all_addresses_without_ipv6_uses_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", OldKernel)
    for hosts, used in (("::", "0.0.0.0"), (("0.0.0.0", "::"), "0.0.0.0"), (("::", "127.0.0.1"), "127.0.0.1")):
        with bound(host=hosts) as [listener]:
            assert listener.getsockname()[0] == used
            assert is_reachable(("127.0.0.1", listener.getsockname()[1]))
    assert bind_error(host="::1").startswith("cannot listen on [::1]:0: address family not supported")


class TakenPorts(socket.socket):
    """A socket that finds the first ``taken`` ports in use on its second address."""

    taken = 3

    def bind(self, address: Any) -> None:
        if address[0] == "127.0.0.2" and type(self).taken:
            type(self).taken -= 1
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        super().bind(address)


def test_bind_to_port_0_tries_ports_free_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", TakenPorts)
    hosts = ("127.0.0.1", "127.0.0.2")
    with bound(host=hosts) as sockets:
        assert len({each.getsockname()[1] for each in sockets}) == 1
    monkeypatch.setattr(TakenPorts, "taken", 1000)
    assert "address already in use" in bind_error(host=hosts)


def test_format_address_shows_ipv4_mapped_as_ipv4() -> None:
    assert format_address(("::ffff:127.0.0.1", 80, 0, 0)) == "127.0.0.1:80"
    assert format_address(("::ffff:c000", 80, 0, 0)) == "[::ffff:c000]:80"
    assert format_address(("::ffff:0:0:1", 80)) == "[::ffff:0:0:1]:80"


def test_numeric_resolve_takes_ip_addresses_only() -> None:
    for host in ("127.0.0.1", "0.0.0.0", "::1", "::"):
        infos = resolve(ServerConfig(host=host, port=0), socket.AI_NUMERICHOST)
        assert [info[4][0] for info in infos] == [host]
    with pytest.raises(StartError):
        resolve(ServerConfig(host="localhost"), socket.AI_NUMERICHOST)
    assert {info[4][0] for info in resolve(ServerConfig(host="localhost"))} <= {"127.0.0.1", "::1"}


def test_bind_of_unknown_host_raises_start_error() -> None:
    for host in ("no-such-host.invalid", "127.0.0.256", "[::1]", "a name", ".", "a..b", "x" * 64, "\udcff"):
        text = bind_error(host=host)
        assert text.startswith(f"cannot listen on host {host!r}: ")
        assert "; choose a host name or an address of this machine" in text
    text = bind_error(host="192.0.2.1")  # reserved for documentation (RFC 5737)
    assert text.startswith("cannot listen on 192.0.2.1:0: cannot assign requested address; choose an address of this")


def test_bind_with_one_address_in_use_binds_none() -> None:
    with bound(host="127.0.0.2") as [other]:
        port = other.getsockname()[1]
        text = bind_error(host=("127.0.0.1", "127.0.0.2"), port=port)
        assert text.startswith(f"cannot listen on 127.0.0.2:{port}: address already in use")
        assert not is_reachable(("127.0.0.1", port))


def test_address_taken_before_listen_raises_start_error() -> None:
    # Two sockets can be bound to one port until one of them listens. Protocols 6 and 0 are both TCP.
    infos: list[AddressInfo] = [
        (socket.AF_INET, socket.SOCK_STREAM, protocol, "", ("127.0.0.1", 0)) for protocol in (6, 0)
    ]
    with pytest.raises(StartError, match=r"127\.0\.0\.1:\d+: address already in use"):
        bind(ServerConfig(port=0), infos)


@contextmanager
def listening(count: int = 1, **options: Any) -> Iterator[list[ListeningSockets]]:
    """Bind the listeners of ``count`` processes."""
    with ExitStack() as stack:
        first = ListeningSockets.bind(ServerConfig(**{"port": 0, **options}))
        stack.callback(first.close)
        groups = first.divide(count)
        for each in groups[1:]:
            stack.callback(each.close)
        yield groups


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::", marks=needs_ipv6)])
def test_divided_port_is_in_use_for_others(host: str) -> None:
    with listening(3, host=host) as groups:
        port = groups[0].sockets[0].getsockname()[1]
        assert [each.addresses for each in groups] == [[(host, port)]] * 3
        for other in dict.fromkeys((host, "127.0.0.1")):
            assert f":{port}: address already in use; " in bind_error(host=other, port=port)


def test_servers_that_divide_a_port_at_once_are_one() -> None:
    def start(port: int) -> bool:
        barrier.wait(TIMEOUT)
        with suppress(StartError):
            groups.extend(ListeningSockets.bind(ServerConfig(host="127.0.0.3", port=port)).divide(2))
            return True
        return False

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            groups: list[ListeningSockets] = []
            with bound(host="127.0.0.3") as [free]:
                port = free.getsockname()[1]
            assert sum(threads.map(start, [port] * 4)) == 1
            for each in groups:
                each.close()


def test_divided_port_without_descriptors_raises_start_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listening() as [listeners]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (listeners.sockets[0].fileno() + 3, hard))
        try:
            with pytest.raises(StartError, match="too many open files; raise the descriptor limit"):
                listeners.divide(8)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not listeners.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_port_that_cannot_be_divided_has_one_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echo_async.server.listeners.HAS_BALANCED_PORTS", False)
    with listening(2) as [first, second], ExitStack() as clients:
        for _ in range(40):
            clients.enter_context(socket.create_connection(first.sockets[0].getsockname(), TIMEOUT))
        first.close()
        for _ in range(40):
            second.sockets[0].accept()[0].close()


def test_bind_of_a_port_in_time_wait_succeeds() -> None:
    with bound() as [listener]:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
            listener.setblocking(True)
            accepted, _ = listener.accept()
            accepted.close()  # closed first, so that the server's port is in TIME_WAIT
            assert receive_all(client) == b""
    with bound(port=port) as [again]:
        assert is_reachable(again.getsockname())


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as an unprivileged user if the tests run as root."""
    "".encode("idna")  # resolving needs the codec, whose file the user may not read
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


FIRST_UNPRIVILEGED_PORT = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@pytest.mark.skipif(FIRST_UNPRIVILEGED_PORT < 2, reason="all ports are unprivileged on this machine")
def test_bind_of_a_privileged_port_raises_start_error() -> None:
    with unprivileged():
        text = bind_error(port=1)
    assert text.startswith("cannot listen on 127.0.0.1:1: permission denied; choose a port from 1024 up")


def test_bind_of_two_servers_on_a_stale_socket_starts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ``listen`` waits until the other server is past its bind as well."""
    path, listen, barrier = str(tmp_path / "echo.sock"), socket.socket.listen, threading.Barrier(2)

    def wait_and_listen(listener: socket.socket, backlog: int) -> None:
        with suppress(threading.BrokenBarrierError):  # the other server waits for this one
            barrier.wait(0.01)
        listen(listener, backlog)

    def bind_or_fail(_: int) -> socket.socket | StartError:
        try:
            return bind(ServerConfig(uds=path), [])[0]
        except StartError as error:
            return error

    monkeypatch.setattr(socket.socket, "listen", wait_and_listen)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(20):
            barrier.reset()
            results = threads.map(bind_or_fail, range(2))
            listener, error = sorted(results, key=lambda result: isinstance(result, StartError))
            assert str(error).startswith(f"cannot listen on {path}: address already in use")
            assert isinstance(listener, socket.socket)
            with listener:
                assert is_reachable(path)
            assert os.listdir(tmp_path) == ["echo.sock"]  # stale again


def test_bind_with_the_directory_locked_does_not_wait_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "LOCK_TIMEOUT", 0.05)
    path = str(tmp_path / "echo.sock")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with bound(uds=path):
            assert is_reachable(path)
    finally:
        os.close(descriptor)


def test_bind_keeps_the_unix_socket_of_a_running_server(tmp_path: Path) -> None:
    path = str(tmp_path / "echo.sock")
    with bound(uds=path, backlog=1), ExitStack() as clients:
        assert bind_error(uds=path).startswith(f"cannot listen on {path}: address already in use")
        for _ in range(10):
            client = clients.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            try:
                client.connect(path)
            except BlockingIOError:
                break
        else:
            pytest.fail("the backlog was never full")
        assert "address already in use" in bind_error(uds=path)
        assert os.path.exists(path)


def test_close_keeps_the_unix_socket_of_a_newer_server(tmp_path: Path) -> None:
    path = str(tmp_path / "echo")

    async def main() -> None:
        async with echo_async.serve(uds=path):
            os.unlink(path)
            second = await echo_async.serve(uds=path)
        assert await echo_async.echo("Hola", uds=path) == "Hola"
        second.close()
        await second.wait_closed()

    run(main)
    assert not os.path.exists(path)


def test_bind_of_a_path_that_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    file, path, missing, long = (str(tmp_path / name) for name in ("notes", "echo", "missing/echo", "x" * 200))
    Path(file).write_text("content")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram_socket:
        datagram_socket.bind(path)
        for uds, reason in (
            (file, "address already in use"),
            (str(tmp_path), ""),
            (path, ""),
            (missing, "no such file or directory"),
            (long, "af_unix path too long"),
        ):
            assert bind_error(uds=uds).startswith(f"cannot listen on {uds}: {reason}")
    assert Path(file).read_text() == "content"
    assert sorted(os.listdir(tmp_path)) == ["echo", "notes"]
    with unprivileged():
        text = bind_error(uds="/echo-async-test.sock")
    assert text.startswith("cannot listen on /echo-async-test.sock: permission denied")
    assert "port" not in text


def test_bind_of_an_abstract_unix_name_is_reachable() -> None:
    name = f"\0echo-async-test-{os.getpid()}"  # in the abstract namespace of Linux
    with bound(uds=name) as [listener], socket.socket(socket.AF_UNIX) as client:
        client.connect(name)
        listener.setblocking(True)
        accepted, _ = listener.accept()
        accepted.close()
