"""``echo-async check`` finds nothing in correct servers: each engine, loop and mode, TLS, Unix sockets, others."""

from __future__ import annotations

import shutil
import ssl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from support import TIMEOUT, ChildProcess, StartServer

from echo_async.check.checks import run_checks
from echo_async.check.context import Settings
from echo_async.check.result import Result
from echo_async.client.endpoint import Endpoint
from echo_async.config import Mode
from echo_async.testing import HostedServer

pytestmark = pytest.mark.usefixtures("no_leaks")

ROOT = Path(__file__).parent.parent.parent
SETTINGS = Settings(connections=20, idle=0.2)


def check(*address: Any, settings: Settings = SETTINGS, **options: Any) -> dict[str, Result]:
    """Run all checks; return their results by name."""
    endpoint = Endpoint(*address, **{"timeout": TIMEOUT, **options})
    return {each.check: each for each in run_checks(endpoint, settings)}


def failures(results: dict[str, Result]) -> list[Result]:
    return [each for each in results.values() if each.result == "failed"]


def skipped(results: dict[str, Result]) -> set[str]:
    return {name for name, each in results.items() if each.result == "skipped"}


NOT_APPLICABLE = {
    "message": {"identity"},
    "stream": {"close", "identity"},
    "raw": {"close", "identity"},
    "identify": {"close"},
}


@pytest.mark.parametrize("mode", get_args(Mode))
def test_check_of_our_server_finds_nothing(mode: Mode, start_server: StartServer) -> None:
    with start_server(mode=mode, udp=True) as server:
        results = check(*server.address, settings=Settings(connections=20, idle=0.2, udp=True))
    assert failures(results) == []
    assert results["mode"].seen == mode
    assert skipped(results) - {"udp"} == NOT_APPLICABLE[mode]
    assert (results["udp"].result == "skipped") is (mode == "identify")


def test_check_of_a_slow_path_waits_for_a_reply_that_arrives() -> None:
    """A reply of 20,000 bytes takes longer than the timeout."""
    with HostedServer(fault="rate=12000") as server:
        endpoint = Endpoint(*server.address, timeout=1.0)
        results = run_checks(endpoint, Settings(size=20_000))
        found = next(each for each in results if each.check == "bytes")
        results.close()
    assert found.result == "ok"


@pytest.mark.parametrize("mode", ["message", "stream", "identify"])
def test_check_over_tls_finds_nothing(mode: Mode, start_server: StartServer, client_context: ssl.SSLContext) -> None:
    with start_server(mode=mode, tls=True) as server:
        results = check(*server.address, ssl=client_context, server_hostname="localhost")
    assert failures(results) == []
    assert skipped(results) == {*NOT_APPLICABLE[mode], "half-close"}
    assert results["tls"].seen.startswith("TLSv1.3, TLS_")


@pytest.mark.parametrize("mode", ["message", "stream"])
def test_check_of_a_unix_socket_finds_nothing(mode: Mode, start_server: StartServer, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with start_server(mode=mode, uds=path):
        results = check(uds=path)
    assert failures(results) == []
    assert skipped(results) == NOT_APPLICABLE[mode]


@contextmanager
def running(command: Sequence[str | Path]) -> Iterator[tuple[str, int]]:
    """Run a server that prints its address; yield the address."""
    with ChildProcess(command, stdout=-1, stderr=-3, text=True) as process:
        line = process.stdout.readline()
        host, _, port = line.removeprefix("listening on ").rpartition(":")
        try:
            yield host, int(port)
        finally:
            process.kill()


PEERS: dict[str, Sequence[str | Path]] = {
    "node": ["node", ROOT / "benchmarks/peers/node.js"],
    "trio": [sys.executable, ROOT / "benchmarks/peers/trio_streams.py"],
    "threads": [sys.executable, ROOT / "benchmarks/peers/threads.py"],
    "example threads": [sys.executable, ROOT / "examples/threads.py", "0"],
    "example start_server": [sys.executable, ROOT / "examples/start_server.py", "0"],
    "example protocol": [sys.executable, ROOT / "examples/protocol.py", "0"],
}


@pytest.mark.parametrize("name", PEERS)
def test_check_of_another_server_finds_nothing(name: str) -> None:
    if shutil.which(str(PEERS[name][0])) is None:
        pytest.skip(f"{PEERS[name][0]} is not installed")
    with running(PEERS[name]) as address:
        results = check(*address)
    assert failures(results) == []


@pytest.mark.skipif(not shutil.which("socat"), reason="socat is not installed")
def test_check_of_cat_behind_socat_finds_nothing(reserved_port: int) -> None:
    command = ["socat", "-d", "-d", f"TCP-LISTEN:{reserved_port},bind=127.0.0.1,reuseaddr,fork", "EXEC:cat"]
    with ChildProcess(command, stderr=-1, text=True) as process:
        assert any("listening" in line for line in process.stderr)
        process.stderr.close()
        results = check("127.0.0.1", reserved_port)
        process.kill()
    assert failures(results) == []
    assert results["mode"].seen == "raw"
