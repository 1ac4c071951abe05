"""What both server objects, the one on an event loop and the one on threads, say about themselves."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from ..config import ServerConfig
from ..engines.registry import Registry
from ..errors import StartError
from ..net import Address, address_of, inode, unlink
from ..stats import Stats
from ..tls import Certificates

__all__ = ["BaseServer"]


class BaseServer:
    """The listening sockets of a server, its connections, and its counters."""

    def __init__(self, config: ServerConfig, sockets: Sequence[socket.socket], path: str | None = None) -> None:
        self.config = config
        self._path = path  # of the Unix socket that this server made, and removes
        self._inode = None if path is None else inode(path)
        self._sockets = list(sockets)
        self._addresses = [address_of(each) for each in sockets]
        self._registry = Registry(config)
        self._stopping = False
        try:
            self._certificates = None if config.ssl_certfile is None else Certificates(config)
        except StartError:
            self._close_sockets()
            raise

    @property
    def address(self) -> Address:
        """Where clients reach it: ``(host, port)``, or the path of a Unix socket. Stays when it is closed."""
        return self._addresses[0]

    @property
    def addresses(self) -> list[Address]:
        """Every address, where a name stands for several."""
        return list(self._addresses)

    @property
    def port(self) -> int | None:
        """The port that it listens on; None for a Unix socket."""
        return None if isinstance(self.address, str) else self.address[1]

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; none once it stops."""
        return tuple(self._sockets)

    @property
    def stats(self) -> Stats:
        """What it has seen so far."""
        return self._registry.stats

    async def fetch_stats(self) -> Stats:
        """What it has seen up to now, from all that serve for it."""
        return self.stats

    async def is_healthy(self) -> bool:
        """Whether it accepts clients and somebody is there to serve them."""
        return self.is_serving()

    def is_serving(self) -> bool:
        """Whether it accepts clients."""
        return bool(self._sockets) and not self._stopping

    def reload_certificates(self) -> None:
        """Take up what the certificate files hold now, for the clients to come. Nobody is dropped.

        :exc:`~echo_async.StartError` if they are of no use; then the old ones stay.
        """
        if self._certificates is not None:
            self._certificates.reload()

    def close(self) -> None:
        """Stop: accept no more, answer what was received, end the connections. Returns at once."""
        raise NotImplementedError

    def abort(self) -> None:
        """Stop without waiting for any client."""
        raise NotImplementedError

    def _close_sockets(self) -> None:
        if self._path is not None:
            unlink(self._path, self._inode)
            self._path = None
        for each in self._sockets:
            each.close()
        self._sockets.clear()
