"""A path can be any :class:`os.PathLike`, in every function that takes one."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
import trustme
from support import TIMEOUT, Backend, run

import echo_async
from echo_async import sync
from echo_async.pytest_plugin import MakeEchoServer
from echo_async.testing import HostedServer


def test_serve_on_a_path_object_is_reached_through_it(backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"

    async def main() -> None:
        async with asyncio.timeout(TIMEOUT), echo_async.serve(uds=path, engine=backend.engine) as server:
            assert server.addresses == [str(path)]
            assert await echo_async.echo("Hola!", uds=path) == "Hola!"
        assert not path.exists()

    run(main, backend.loop)


def test_blocking_servers_on_path_objects_are_reached(tmp_path: Path, make_echo_server: MakeEchoServer) -> None:
    path = tmp_path / "echo.sock"
    for start in (sync.serve, HostedServer, make_echo_server):
        with start(uds=path):
            assert sync.echo("Hola!", uds=path) == "Hola!"
        assert not path.exists()


def test_tls_files_that_are_path_objects_are_loaded(
    certificate: Path, authority: trustme.CA, client_context: ssl.SSLContext, ca_file: Path
) -> None:
    authority.issue_cert("client").configure_cert(client_context)
    with HostedServer(ssl_certfile=certificate, ssl_keyfile=certificate, ssl_ca_certs=ca_file) as server:
        assert sync.echo("Hola!", "localhost", server.address[1], ssl=client_context) == "Hola!"


@pytest.mark.parametrize("config", [echo_async.ServerConfig, echo_async.config.ClientConfig])
def test_configuration_has_the_text_of_a_path(config: type[echo_async.ServerConfig]) -> None:
    assert config(uds=Path("dir/\udcf1.sock")).uds == "dir/\udcf1.sock"
    with pytest.raises(echo_async.ConfigError, match="invalid uds: 1 "):
        config(uds=1)  # type: ignore[arg-type]
