"""Servers that behave as no good server does, and event loops to meet them on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from support import LOOPS, PATIENCE, run

from echo_async.loops import LoopName

T = TypeVar("T")

Address = tuple[str, int]


class Script:
    """A server in threads, one for each connection, that does to each what ``serve`` does.

    ``received`` has the whole messages of each connection, in the order of connecting.
    """

    def __init__(self, serve: Callable[[Peer], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address: Address = self._listener.getsockname()
        self.received: list[list[bytes]] = []
        self._peers: list[Peer] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer = Peer(self._listener.accept()[0], len(self._peers))
                self.received.append(peer.received)
                self._peers.append(peer)
                self._threads.append(threading.Thread(target=self._run, args=[peer]))
                self._threads[-1].start()

    def _run(self, peer: Peer) -> None:
        with contextlib.suppress(OSError), contextlib.closing(peer):
            self._serve(peer)

    def stop_listening(self) -> None:
        """Whoever connects from now on is refused."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        for each in (self._listener, *(peer.socket for peer in self._peers)):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()


class Peer:
    """One connection of a :class:`Script`. ``number``: how many were there before it."""

    def __init__(self, connected: socket.socket, number: int) -> None:
        self.socket = connected
        self.number = number
        self.received: list[bytes] = []
        self._rest = b""

    def message(self) -> bytes:
        """The next message, read as the seed does; the thread ends with the client."""
        parts = [self._rest]
        while b"\n" not in parts[-1]:
            parts.append(self.socket.recv(20))
            if not parts[-1]:
                raise ConnectionResetError
        line, _, self._rest = b"".join(parts).partition(b"\n")
        self.received.append(line + b"\n")
        return line + b"\n"

    def messages(self) -> Iterator[bytes]:
        while True:
            yield self.message()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        self.socket.close()


@pytest.fixture(autouse=True, scope="session")
def loops_are_warm() -> None:
    """The first uvloop of a process opens descriptors that it keeps."""
    for loop in LOOPS:
        run(lambda: asyncio.sleep(0), loop)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test ends with more descriptors or threads than there were at its beginning."""
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("resolve "):  # it has answered, or nobody waits for it any more
            thread.join(PATIENCE)
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)
    assert threading.active_count() <= threads


@pytest.fixture
def script() -> Iterator[Callable[[Callable[[Peer], None]], Script]]:
    """Start a server that does what it is told; it is stopped with the test."""
    with contextlib.ExitStack() as stack:

        def start(serve: Callable[[Peer], None]) -> Script:
            server = Script(serve)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """A socket that has an address and does not listen yet: nobody is there, and nobody else can be."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


@pytest.fixture
def closed_port(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


@pytest.fixture
def black_hole() -> Iterator[Address]:
    """An address that never answers: its queue of connections is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.fixture(params=LOOPS)
def on_loop(request: pytest.FixtureRequest) -> Callable[[Callable[[], Coroutine[Any, Any, T]]], T]:
    """Run a coroutine function on each event loop; it must leave no task behind."""
    loop: LoopName = request.param

    def run_and_look(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        problems: list[dict[str, Any]] = []

        async def watched() -> T:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
            result = await main()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result

        result: T = run(watched, loop)
        assert not problems
        return result

    return run_and_look
