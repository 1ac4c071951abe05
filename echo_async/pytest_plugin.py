"""Fixtures for pytest: ``echo_server``, a running server for one test; ``make_echo_server``, as many as it takes.

pytest loads this file in every session of whoever has the package installed. So it imports nothing but pytest
and typing; the rest comes with the first server that a test asks for, from :mod:`echo_async.testing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Unpack

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .config import ServerOptions
    from .testing import HostedServer

__all__ = ["MakeEchoServer", "echo_server", "echo_server_options", "make_echo_server"]


class MakeEchoServer(Protocol):
    """The type of the fixture ``make_echo_server``."""

    def __call__(self, *, tls: bool = False, **options: Unpack[ServerOptions]) -> HostedServer: ...


@pytest.fixture
def echo_server_options() -> dict[str, Any]:
    """The options of ``echo_server``, as ``make_echo_server`` takes them. Made to be overridden: there are none."""
    return {}


@pytest.fixture
def echo_server(echo_server_options: dict[str, Any]) -> Iterator[HostedServer]:
    """A running echo server of this test's own; ``echo_server.address`` is where clients reach it."""
    from .testing import HostedServer

    with HostedServer(**echo_server_options) as server:
        yield server


@pytest.fixture(scope="session")
def make_echo_server() -> Iterator[MakeEchoServer]:
    """Start an echo server with the options of ``echo_async.serve``, or with ``tls=True``.

    It runs until it is closed, or until the session ends.
    """
    from contextlib import ExitStack

    from .testing import HostedServer

    with ExitStack() as servers:

        def make(*, tls: bool = False, **options: Unpack[ServerOptions]) -> HostedServer:
            return servers.enter_context(HostedServer(tls=tls, **options))

        yield make
