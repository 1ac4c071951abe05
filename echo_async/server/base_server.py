"""What the servers on an event loop and on threads have in common: a server is a list of listeners."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from ..config import ServerConfig
from ..errors import StartError
from ..net import Address
from ..stats import Stats, find_missing
from ..tls import Certificates
from .admission import Admission
from .listeners import ListeningSockets
from .registry import Registry
from .udp import Receiver

if TYPE_CHECKING:
    from .scripts import Scripts

CHECK_INTERVAL = 0.001  # seconds between two looks at the counters, while they are waited for


class Acceptor:
    """What serves the connections to the addresses of one listener, and counts them.

    ``on_closed`` is called once no socket, connection or task of it is left.
    """

    def __init__(
        self,
        config: ServerConfig,
        sockets: ListeningSockets,
        on_closed: Callable[[], object],
        registry: Registry | None = None,
        scripts: Scripts | None = None,
    ) -> None:
        self.config = config
        self.sockets = sockets
        try:
            self.certificates = None if config.ssl_certfile is None else Certificates(config)
        except StartError:
            sockets.close()
            raise
        self.registry = registry or Registry(config)
        self.registry.listener = sockets.name
        self._admission = Admission(self.registry, scripts)
        self._on_closed = on_closed
        self._receiver: Receiver | None = None  # of datagrams
        self._is_stopping = self._is_aborting = False

    async def start(self) -> None:
        """Accept connections from now on. Once, before any other method."""
        raise NotImplementedError

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once; safe to call twice, and from any thread."""
        raise NotImplementedError

    def abort(self) -> None:
        """Shut down without waiting for any client. In an event loop, call it there."""
        raise NotImplementedError

    async def disconnect(self, *, reset: bool) -> None:
        """End every connection that was accepted, or waits to be, and keep listening."""
        raise NotImplementedError

    def join(self) -> None:
        """Wait for what is left after ``on_closed``: the thread that called it."""

    def _stop_udp(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.stop()
        self.sockets.close_udp()


class BaseServer:
    """A server that has one listener, or several that are started and closed together."""

    def __init__(self, acceptors: Sequence[Acceptor]) -> None:
        self._acceptors = list(acceptors)
        self._is_stopping = False

    @property
    def config(self) -> ServerConfig:
        """The configuration; of several listeners that of the first."""
        return self._acceptors[0].config

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the first listening socket, also after it is closed.

        For a Unix socket it is the path instead, which only ``addresses`` has in its type.
        """
        return cast(tuple[str, int], self.addresses[0])

    @property
    def addresses(self) -> list[Address]:
        """Host and port, or Unix socket path, of every listening socket."""
        return [address for each in self._acceptors for address in each.sockets.addresses]

    @property
    def port(self) -> int | None:
        """The port of the first address; None for a Unix socket."""
        first = self.addresses[0]
        return None if isinstance(first, str) else first[1]

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty once they are closed."""
        return tuple(each for acceptor in self._acceptors for each in acceptor.sockets.sockets)

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters, summed over the listeners."""
        return sum((each.registry.stats for each in self._acceptors), Stats())

    def _wait_for(self, timeout: float, expected: Mapping[str, int | Mapping[str, int]]) -> Iterator[float]:
        """Yield the seconds until the next look at the counters, until they are as ``expected``."""
        deadline = time.monotonic() + timeout
        while missing := find_missing(stats := self.stats, expected):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"timed out after {timeout:g} s: {'; '.join(missing)} (counters: {stats})")
            yield CHECK_INTERVAL

    def is_serving(self) -> bool:
        """Whether connections are accepted, on every listener."""
        return not self._is_stopping and all(each.sockets.sockets for each in self._acceptors)

    @property
    def certificates(self) -> Sequence[Certificates]:
        """The certificates of the listeners that have one."""
        return [each.certificates for each in self._acceptors if each.certificates is not None]

    def reload_certificates(self) -> bool:
        """Read the certificate files again, for new connections. No connection is closed.

        Returns:
            Whether there are any.

        Raises:
            StartError: A file is invalid. The previous certificates stay in use.
        """
        for each in self.certificates:
            each.reload()
        return bool(self.certificates)

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once; safe to call twice, and from any thread.

        No connection is accepted from now on, what was received is answered, connections are closed. Those that
        are open after ``timeout_graceful_shutdown`` seconds are aborted.
        """
        self._is_stopping = True
        for each in self._acceptors:
            each.close()

    def abort(self) -> None:
        """Shut down without waiting for any client. In an event loop, call it there."""
        self._is_stopping = True
        for each in self._acceptors:
            each.abort()
