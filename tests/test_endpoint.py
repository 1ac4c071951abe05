"""Where a client connects: the order of the addresses."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from echo_async.client.endpoint import Endpoint


def test_resolve_interleaves_address_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable family delays a connection by one attempt, however many addresses it has (RFC 8305)."""
    addresses = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1", "192.0.2.2", "192.0.2.1"]

    def resolve(host: str, port: int, **_: Any) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        families = (socket.AF_INET6 if ":" in each else socket.AF_INET for each in addresses)
        return [
            (family, socket.SOCK_STREAM, 6, "", (each, port)) for family, each in zip(families, addresses, strict=True)
        ]

    endpoint = Endpoint("echo.example", 7)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = [info[4][0] for info in endpoint.resolve()]
    assert found == ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2", "2001:db8::3"]
