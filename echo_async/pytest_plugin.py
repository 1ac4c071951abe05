"""pytest fixtures: ``echo_server``, ``make_echo_server`` and ``black_hole_address``.

pytest imports this module in every session of an environment that has the package installed. Therefore it imports only
pytest and typing. :mod:`echo_async.testing` is imported when a test first uses a fixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Unpack

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .config import ServerOptions
    from .testing import HostedServer

__all__ = ["MakeEchoServer", "black_hole_address", "echo_server", "echo_server_options", "make_echo_server"]


class MakeEchoServer(Protocol):
    """The type of the fixture :func:`make_echo_server`."""

    def __call__(self, *, tls: bool = False, **options: Unpack[ServerOptions]) -> HostedServer:
        """Start a server.

        Args:
            tls: Whether to serve TLS with a new certificate. ``client_context`` of the server trusts it.
            **options: The options of :func:`echo_async.serve`.

        Returns:
            A running server, which is closed at the end of the session unless a test closes it.

        Raises:
            ConfigError: An option is invalid.
            StartError: The server cannot listen, or ``tls`` is true and trustme is not installed.
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
def make_echo_server() -> Iterator[MakeEchoServer]:
    """Start echo servers with the options of ``echo_async.serve``, or with ``tls=True``, for the whole session."""
    from contextlib import ExitStack

    from .testing import HostedServer

    with ExitStack() as servers:

        def make(*, tls: bool = False, **options: Unpack[ServerOptions]) -> HostedServer:
            return servers.enter_context(HostedServer(tls=tls, **options))

        yield make


@pytest.fixture(scope="session")
def black_hole_address() -> Iterator[tuple[str, int]]:
    """Host and port of a local address on which connecting never completes. On Linux: elsewhere it may be refused."""
    from .testing import HostedServer

    with HostedServer(fault="no-accept") as server:
        yield server.address
