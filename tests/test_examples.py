"""The servers in ``examples/``: plain as they are, they answer as the exercise demands."""

from __future__ import annotations

import re
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

from support import TIMEOUT, ServerProcess, command_process

from echo_async import sync
from echo_async.check.checks import run_checks
from echo_async.check.context import Settings
from echo_async.client.endpoint import Endpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
CONCURRENT = ["threads", "selector", "start_server", "protocol"]
SERVERS = ["one_client", *CONCURRENT, "udp"]


@contextmanager
def run_example(name: str) -> Iterator[ServerProcess]:
    """Run an example until the end of the block, and interrupt it: it exits without an error."""
    env = {"PYTHONDEVMODE": ""}  # which reports sockets that the end of the process closes
    with command_process([sys.executable, str(EXAMPLES / f"{name}.py"), "0"], env) as server:
        yield server
        assert server.stop(signal.SIGINT) == ""


def test_examples_are_short_and_follow_from_each_other() -> None:
    """As examples/README.md promises, which lists them in this order."""
    steps = re.findall(r"^\d\. \[(\w+)\.py\]", (EXAMPLES / "README.md").read_text(), re.M)
    assert steps == SERVERS
    texts = {name: (EXAMPLES / f"{name}.py").read_text() for name in SERVERS}
    for text in texts.values():
        assert len([line for line in text.splitlines() if line]) <= 50
    for before, name in pairwise(SERVERS):
        assert f"``{before}.py`` cannot " in texts[name]


def test_examples_are_what_the_page_tells_of_check() -> None:
    """Only the first server serves one client at a time, and that is all that is wrong. Each ends with a client."""
    names = ["one_client", *CONCURRENT]
    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        clients = stack.enter_context(ExitStack())
        servers = [stack.enter_context(run_example(name)) for name in names]
        failed = dict(zip(names, pool.map(failed_checks, names, [each.address for each in servers]), strict=True))
        for server in servers:
            assert sync.echo(500_000 * b"y", *server.address) == 500_000 * b"y"
            clients.enter_context(server.connect()).sendall(b"begun")
    assert failed == {"one_client": ["concurrent"], **{name: [] for name in CONCURRENT}}


def failed_checks(name: str, address: tuple[str, int]) -> list[str]:
    endpoint = Endpoint(*address, timeout=2.0 if name == "one_client" else TIMEOUT)
    return [each.check for each in run_checks(endpoint, Settings(connections=20, idle=0.2)) if each.result == "failed"]


def test_example_udp_returns_every_datagram() -> None:
    with run_example("udp") as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT)
        client.connect(server.address)
        for size in (0, 1, 1472, 65_507):
            client.send(bytes(size))
            assert client.recv(65_536) == bytes(size)
