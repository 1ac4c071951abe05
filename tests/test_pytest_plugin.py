"""The fixtures in pytest sessions, and the class ``HostedServer``."""

from __future__ import annotations

import gc
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import pytest
from support import MAX_DELAY, TIMEOUT, connect, receive_all, receive_line, run_process

import echo_async
from echo_async import sync
from echo_async.testing import HostedServer

ALREADY_IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"  # by this session; before pytest 9.2 that is a warning

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A pytest session with this plugin and no other, even if the package is not installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", f"-p echo_async.pytest_plugin -W error -W {ALREADY_IMPORTED}")
    return pytester


# Fixtures


def test_echo_server_fixture_is_new_for_each_test(
    session: pytest.Pytester, reserved_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PORT", str(reserved_port))
    session.makepyfile("""
        import os, socket, threading
        import pytest

        seen = []

        @pytest.fixture
        def echo_server_options():
            return {} if seen else {"port": int(os.environ["TEST_PORT"])}

        threads = set(threading.enumerate())

        def test_first(echo_server):
            seen.append((echo_server, socket.create_connection(echo_server.address)))
            seen[0][1].sendall(b"one\\nincomplete")
            assert seen[0][1].recv(10) == b"one\\n"

        def test_second(echo_server):
            first, client = seen[0]
            with client, pytest.raises(ConnectionRefusedError):
                assert client.recv(10) == b""
                socket.create_connection(first.address)
            assert (first.received, echo_server.received) == ([b"one\\n"], [])
            assert first.address != echo_server.address

        def test_no_thread_is_left():
            assert set(threading.enumerate()) <= threads
    """)
    session.runpytest_inprocess().assert_outcomes(passed=3)


def test_make_echo_server_runs_until_closed_or_session_end(
    session: pytest.Pytester, reserved_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PORT", str(reserved_port))
    session.makeconftest("""
        import threading

        threads = set(threading.enumerate())

        def pytest_unconfigure():
            print("threads left:", len(set(threading.enumerate()) - threads))
    """)
    session.makepyfile("""
        import os
        import pytest
        from echo_async import ConnectError, sync

        @pytest.fixture(scope="module")
        def shared(make_echo_server):
            return make_echo_server(mode="message")

        def test_two_servers(shared, make_echo_server):
            other = make_echo_server(port=int(os.environ["TEST_PORT"]))
            assert other.port != shared.port
            assert sync.echo("one", *shared.address) == sync.echo("one", *other.address)
            other.close()
            with pytest.raises(ConnectError):
                sync.connect(*other.address)

        def test_shared_server_still_runs(shared):
            assert sync.echo("two", *shared.address) == "two"
            assert shared.received == [b"one\\n", b"two\\n"]
    """)
    result = session.runpytest_inprocess("-s")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["*threads left: 0"])


def test_fixtures_serve_tests_on_asyncio_and_trio(session: pytest.Pytester) -> None:
    for name in ("anyio", "trio"):
        pytest.importorskip(name)
    session.makepyfile("""
        import anyio, pytest

        @pytest.mark.anyio
        async def test_echo(echo_server):
            async with await anyio.connect_tcp(*echo_server.address) as stream:
                await stream.send(b"one\\n")
                assert await stream.receive() == b"one\\n"
    """)
    session.runpytest_inprocess("-p", "anyio.pytest_plugin").assert_outcomes(passed=2)


FAILING = """
    import socket
    import pytest

    def failing(peer):
        assert peer.receive_line() == b"expected\\n", "from the handler"

    def exchange(server):
        with socket.create_connection(server.address) as client:
            client.sendall(b"other\\n")

    def waiting(peer):
        assert peer.receive_line() == b"never sent\\n"

    @pytest.fixture(scope="module")
    def shared(make_echo_server):
        return make_echo_server(handler=failing)

    def test_of_a_shared_server(shared):
        exchange(shared)

    def test_after_it(shared):
        pass

    def test_that_makes_two(make_echo_server):
        exchange(make_echo_server(handler=failing))
        exchange(make_echo_server(reply=lambda message: pytest.fail("from the second")))

    def test_after_them():
        pass

    def test_of_a_waiting_handler(make_echo_server):
        with socket.create_connection(make_echo_server(handler=waiting).address) as client:
            client.sendall(b"within a line")

    def test_of_a_reply(make_echo_server):
        exchange(make_echo_server(reply=lambda message: pytest.fail("from the reply")))

    @pytest.fixture
    def echo_server_options():
        return {"handler": failing}

    def test_of_its_own_server(echo_server):
        exchange(echo_server)
        echo_server.wait_for(messages=1)
"""


@pytest.mark.parametrize("plugins", [[], ["-p", "xdist", "-n", "1"]], ids=["alone", "xdist"])
def test_failure_in_a_function_fails_its_test(session: pytest.Pytester, plugins: list[str]) -> None:
    """With xdist in a process of its own, which reports as this one does."""
    session.makepyfile(FAILING)
    result = session.runpytest_inprocess(*plugins, "-rA")
    result.assert_outcomes(passed=4, failed=3, errors=1)
    failed = ["of_a_shared_server", "that_makes_two", "of_a_reply"]
    result.stdout.fnmatch_lines_random([f"FAILED *::test_{name}*" for name in failed])
    result.stdout.fnmatch_lines_random(["ERROR *::test_of_its_own_server*"])
    passed = ["after_it", "after_them", "of_a_waiting_handler"]
    result.stdout.fnmatch_lines_random([f"PASSED *::test_{name}" for name in passed])
    result.stdout.fnmatch_lines_random(["* 2 servers failed (2 sub-exceptions)", "* | Failed: from the second"])
    errors = re.compile(r"(E|    \|) +AssertionError: from the handler")
    assert len([*filter(errors.fullmatch, result.outlines)]) == 3
    result.stdout.fnmatch_lines_random(['>*assert peer.receive_line() == b"expected\\n", "from the handler"'])


def test_servers_in_a_row_leave_nothing() -> None:
    """No thread and no descriptor, as ``no_leaks`` checks, and no object."""
    for number in range(100):
        with HostedServer(greeting=b"220\n") as server, connect(server) as client:
            assert receive_line(client) == b"220\n"
        if number in (10, 99):
            gc.collect()
            objects = sum(str(type(each).__module__).startswith("echo_async") for each in gc.get_objects())
            if number == 10:
                before = objects
    assert objects <= before


def test_plugin_import_loads_no_other_module() -> None:
    code = "import sys, pytest; old = {*sys.modules}; import echo_async.pytest_plugin; print(*{*sys.modules} - old)"
    done = run_process([sys.executable, "-W", "error", "-c", code])
    assert done.stderr == ""
    assert set(done.stdout.split()) == {"echo_async", "echo_async.pytest_plugin"}


# HostedServer


def test_received_contains_a_message_before_its_reply() -> None:
    with HostedServer() as server, connect(server) as client:
        for number in range(200):
            message = b"%d\r\n" % number
            client.sendall(message)
            assert receive_line(client) == message
            assert server.received[-1] == message
        assert len(server.received) == server.stats.messages == 200


def test_address_after_close_is_still_available(tmp_path: Path) -> None:
    with HostedServer() as server:
        assert server.address == ("127.0.0.1", server.port)
        assert server.client_context is None
    assert server.address == ("127.0.0.1", server.port)
    path = str(tmp_path / "echo.sock")
    with HostedServer(uds=path) as server:
        assert (str(server.address), server.port) == (path, None)
        assert sync.echo("one", uds=path) == "one"


def test_close_with_connected_clients_does_not_wait(reserved_port: int) -> None:
    with HostedServer(port=reserved_port, timeout_graceful_shutdown=TIMEOUT) as server, ExitStack() as stack:
        clients = []
        for sent in (b"", b"incomplete", b"one\nincomplete"):
            clients.append(stack.enter_context(connect(server)))
            clients[-1].sendall(sent)
        assert receive_line(clients[-1]) == b"one\n"
        server.wait_for(active=3, bytes_in=24)
        started = monotonic()
        server.close()
        assert monotonic() - started < MAX_DELAY  # much less than the graceful shutdown timeout
        assert [receive_all(client) for client in clients] == [b""] * 3
        server.close()
        with pytest.raises(ConnectionRefusedError):
            connect(server)


def test_tls_without_trustme_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    with pytest.raises(echo_async.StartError, match="pip install trustme"):
        HostedServer(tls=True)
