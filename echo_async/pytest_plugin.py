"""pytest fixtures: ``echo_server``, ``make_echo_server``, ``black_hole_address`` and ``refused_address``.

pytest imports this module in every session of an environment that has the package installed. Therefore it imports only
pytest and typing. :mod:`echo_async.testing` is imported when a test first uses a fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Unpack

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from .testing import HostedServer, HostedServerOptions

__all__ = [
    "MakeEchoServer",
    "black_hole_address",
    "echo_server",
    "echo_server_options",
    "make_echo_server",
    "refused_address",
]

_servers = pytest.StashKey["list[HostedServer]"]()  # those that outlive a test


class MakeEchoServer(Protocol):
    """The type of the fixture :func:`make_echo_server`."""

    def __call__(self, **options: Unpack[HostedServerOptions]) -> HostedServer:
        """Start a server.

        Args:
            **options: The arguments of :class:`echo_async.testing.HostedServer`.

        Returns:
            A running server, which is closed at the end of the session unless a test closes it.

        Raises:
            ConfigError: An option is invalid.
            StartError: The server cannot listen, or ``tls`` is given and trustme is not installed.
        """


@pytest.fixture
def echo_server_options() -> dict[str, Any]:
    """The options of ``echo_server``: the arguments of ``make_echo_server``. Override it to change them."""
    return {}


@pytest.fixture
def echo_server(echo_server_options: dict[str, Any]) -> Iterator[HostedServer]:
    """A running echo server for this test; ``echo_server.address`` is its address."""
    from .testing import HostedServer

    with HostedServer(**echo_server_options) as server:
        yield server


@pytest.fixture(scope="session")
def make_echo_server(pytestconfig: pytest.Config) -> Iterator[MakeEchoServer]:
    """Start servers with the arguments of :class:`echo_async.testing.HostedServer`, for the whole session."""
    from contextlib import ExitStack

    from .testing import HostedServer

    started = pytestconfig.stash.setdefault(_servers, [])
    with ExitStack() as servers:

        def make(**options: Unpack[HostedServerOptions]) -> HostedServer:
            server = servers.enter_context(HostedServer(**options))
            started.append(server)
            return server

        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fail a test whose handler or reply function has failed in a server that outlives the test."""
    try:
        return (yield)
    finally:
        errors: list[BaseException] = []
        for server in item.config.stash.get(_servers, []):  # each: an error that is left would fail the next test
            try:
                server.raise_errors()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0] if len(errors) == 1 else BaseExceptionGroup(f"{len(errors)} servers failed", errors)


@pytest.fixture(scope="session")
def black_hole_address() -> Iterator[tuple[str, int]]:
    """Host and port of a local address on which connecting never completes. On Linux: elsewhere it may be refused."""
    from .testing import HostedServer

    with HostedServer(fault="no-accept") as server:
        yield server.address


@pytest.fixture(scope="session")
def refused_address() -> Iterator[tuple[str, int]]:
    """Host and port of a local address on which connecting is refused: it is bound, and nothing listens on it."""
    from socket import socket

    with socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()
