"""The listeners of a server, and what its servers on an event loop and on threads have in common."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from ..config import ServerConfig
from ..engines.context import ConversationFactory
from ..errors import StartError
from ..net import Address
from ..stats import Stats
from ..tls import Certificates
from .admission import Admission
from .listeners import ListeningSockets
from .registry import Registry

if TYPE_CHECKING:
    from .acceptor import AsyncioAcceptor
    from .thread_acceptor import ThreadAcceptor

A = TypeVar("A", bound="AsyncioAcceptor | ThreadAcceptor")


class Listener(Generic[A]):
    """What serves the connections to one set of addresses, and counts them."""

    def __init__(
        self,
        config: ServerConfig,
        sockets: ListeningSockets,
        make_acceptor: Callable[..., A],
        on_closed: Callable[[], object],
        make_conversation: ConversationFactory | None = None,
    ) -> None:
        self.config = config
        self.sockets = sockets
        try:
            self.certificates = None if config.ssl_certfile is None else Certificates(config)
        except StartError:
            sockets.close()
            raise
        self.registry = Registry(config, make_conversation)
        self.registry.listener = sockets.name
        self.acceptor = make_acceptor(Admission(self.registry), sockets, self.certificates, on_closed)


class BaseServer(Generic[A]):
    """A server that has one listener, or several that are started and closed together."""

    def __init__(self, listeners: Sequence[Listener[A]]) -> None:
        self._listeners = list(listeners)
        self._is_stopping = False

    @property
    def config(self) -> ServerConfig:
        """The configuration; of several listeners that of the first."""
        return self._listeners[0].config

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the first listening socket, also after it is closed.

        For a Unix socket it is the path instead, which only ``addresses`` has in its type.
        """
        return cast(tuple[str, int], self.addresses[0])

    @property
    def addresses(self) -> list[Address]:
        """Host and port, or Unix socket path, of every listening socket."""
        return [address for each in self._listeners for address in each.sockets.addresses]

    @property
    def port(self) -> int | None:
        """The port of the first address; None for a Unix socket."""
        first = self.addresses[0]
        return None if isinstance(first, str) else first[1]

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; empty once they are closed."""
        return tuple(each for listener in self._listeners for each in listener.sockets.sockets)

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters, summed over the listeners."""
        return sum((each.registry.stats for each in self._listeners), Stats())

    def is_serving(self) -> bool:
        """Whether connections are accepted, on every listener."""
        return not self._is_stopping and all(each.sockets.sockets for each in self._listeners)

    def reload_certificates(self) -> bool:
        """Read the certificate files again, for new connections. No connection is closed.

        Returns:
            Whether there are any.

        Raises:
            StartError: A file is invalid. The previous certificates stay in use.
        """
        certificates = [each.certificates for each in self._listeners if each.certificates is not None]
        for each in certificates:
            each.reload()
        return bool(certificates)

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once; safe to call twice, and from any thread.

        No connection is accepted from now on, what was received is answered, connections are closed. Those that
        are open after ``timeout_graceful_shutdown`` seconds are aborted.
        """
        self._is_stopping = True
        for each in self._listeners:
            each.acceptor.close()

    def abort(self) -> None:
        """Shut down without waiting for any client. In an event loop, call it there."""
        self._is_stopping = True
        for each in self._listeners:
            each.acceptor.abort()
