"""The server on threads, seen from an event loop: the same object to ``await``, and nothing that blocks."""

from __future__ import annotations

import contextlib
import socket

from ..sync.server import EchoServer as SyncEchoServer
from .server import EchoServer

__all__ = ["ThreadedEchoServer"]


class ThreadedEchoServer(EchoServer):
    """What ``echo_async.serve(engine="threads")`` gives: an :class:`EchoServer` whose clients have threads."""

    async def _listen(self) -> None:
        self._threads = SyncEchoServer(self.config, self._sockets, self._path)
        self._registry, self._certificates = self._threads._registry, self._threads._certificates
        self._path = None
        self._threads.on_closed = self._on_closed
        self._threads.start_accepting()

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        return self._threads.sockets

    def close(self) -> None:
        self._stopping = True
        self._threads.close()

    def abort(self) -> None:
        self._stopping = True
        self._threads.abort()

    async def wait_closed(self) -> None:
        try:
            await super().wait_closed()
        finally:
            if self._closed.is_set():
                self._threads.wait_closed()  # its last thread is about to end
                self._sockets.clear()

    def _on_closed(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._closed.set)
