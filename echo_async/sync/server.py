"""The server object without an event loop: the ``threads`` engine, with the same names as :mod:`echo_async.server`.

Its threads do not keep the program running: a server that is left open is aborted when the interpreter exits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self, Unpack

from ..awaitable import run
from ..config import ServerConfig, ServerOptions
from ..errors import ConfigError
from ..server.base_server import BaseServer
from ..server.listeners import ListeningSockets
from ..server.registry import Registry
from ..server.thread_acceptor import ThreadAcceptor

if TYPE_CHECKING:
    from ..server.scripts import Scripts


def serve(**options: Unpack[ServerOptions]) -> EchoServer:
    """Start an echo server on threads: ``with sync.serve(port=0) as server:``.

    Args:
        **options: The fields of :class:`~echo_async.ServerConfig`. Sizes are in bytes, times in seconds. ``engine``
            is ``threads``.

    Returns:
        The server, which accepts connections.

    Raises:
        ConfigError: An option is invalid.
        StartError: The address cannot be bound, a certificate is invalid, or there are too few threads or descriptors.
    """
    options.setdefault("engine", "threads")
    if options["engine"] != "threads":
        raise ConfigError(
            f"engine {options['engine']!r} requires an event loop; use echo_async.serve or engine 'threads'"
        )
    return EchoServer(ServerConfig(**options))


class EchoServer(BaseServer):
    """A running echo server on threads; :func:`serve` creates one. ``close`` is safe in a signal handler too."""

    def __init__(self, config: ServerConfig, registry: Registry | None = None, scripts: Scripts | None = None) -> None:
        self._closed = threading.Event()
        self._acceptor = ThreadAcceptor(config, ListeningSockets.bind(config), self._closed.set, registry, scripts)
        super().__init__([self._acceptor])
        run(self._acceptor.start())

    def wait_for(self, *, timeout: float = 5.0, **counters: int | Mapping[str, int]) -> None:
        """The same as :meth:`echo_async.EchoServer.wait_for`, but it blocks."""
        for seconds in self._wait_for(timeout, counters):
            time.sleep(seconds)

    def disconnect(self, *, reset: bool = False) -> None:
        """The same as :meth:`echo_async.EchoServer.disconnect`, but it blocks."""
        run(self._acceptor.disconnect(reset=reset))

    def wait_closed(self) -> None:
        """Wait until no socket, connection or thread of the server is left. Always returns after :meth:`close`."""
        if self._acceptor.is_running():
            self._closed.wait()  # not join alone: interrupted by Ctrl-C, it would take the thread for ended
        self._acceptor.join()

    def serve_forever(self) -> None:
        """Wait until the server is closed; close it if this is interrupted."""
        try:
            self.wait_closed()
        finally:
            self.close()
            self.wait_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        self.wait_closed()
