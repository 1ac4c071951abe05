"""Fixtures of the client tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clients import CLIENTS, Connect, Echo, client_functions


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    """The blocking client, and the asyncio client."""
    kind: str = request.param
    return kind


@pytest.fixture
def functions(client: str) -> Iterator[tuple[Connect, Echo]]:
    with client_functions(client) as functions:
        yield functions


@pytest.fixture
def connect(functions: tuple[Connect, Echo]) -> Connect:
    """Connect with each client: ``with connect(...) as client``, whose methods block."""
    return functions[0]


@pytest.fixture
def echo(functions: tuple[Connect, Echo]) -> Echo:
    """Send one message with each client, on a connection of its own."""
    return functions[1]
