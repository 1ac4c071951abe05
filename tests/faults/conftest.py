"""Servers of every engine, and certificates."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

import pytest
import trustme
from support import (
    Kind,
    ServerThread,
    Start,
)

import echo_async
from echo_async.config import ServerOptions


@pytest.fixture
def start(kind: Kind, certificate: Path) -> Start:
    """Starts servers of one engine on one loop; that no task is left is looked at where they are hosted."""
    engine, loop = kind

    @contextmanager
    def start(*, tls: bool = False, **options: Unpack[ServerOptions]) -> Iterator[echo_async.EchoServer]:
        options.setdefault("mode", "stream")
        options.setdefault("port", 0)
        if tls:
            options["ssl_certfile"] = str(certificate)
        with ServerThread(loop, {"engine": engine, **options}) as server:
            yield server

    return start


@pytest.fixture(scope="module")
def certificate(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(path))
    return path


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context
