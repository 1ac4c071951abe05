"""The listening sockets of one listener, and the Unix socket path that it created."""

import contextlib
import os
import socket
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple, Self

from .. import net
from ..compat import HAS_BALANCED_PORTS, is_ready
from ..config import ServerConfig
from ..errors import StartError


class ListenerConfig(NamedTuple):
    """The configuration of one listener, and the inherited sockets that it serves instead of its own address."""

    config: ServerConfig
    descriptors: Sequence[int] = ()


class ListeningSockets:
    """Listening sockets that are closed together; a Unix socket path that was bound here is removed then.

    With ``is_owner``, no other process serves the sockets: they are shut down, before they are closed.
    ``datagram_sockets`` are those of ``sockets`` that receive datagrams. They have the addresses of the others.
    """

    def __init__(self, sockets: Sequence[socket.socket], path: str | None = None, *, is_owner: bool = False) -> None:
        self.datagram_sockets = [each for each in sockets if each.type == socket.SOCK_DGRAM]
        self._sockets = [each for each in sockets if each.type != socket.SOCK_DGRAM]
        self.addresses = [net.get_address(each) for each in self._sockets]
        self._is_owner = is_owner
        self._backlog = socket.SOMAXCONN
        self._has_own_ports = False  # of TCP, which were bound here
        self._backlog_fillers: list[socket.socket] = []
        self._path = path
        self._file_id = None if path is None else net.get_file_id(path)

    @classmethod
    def bind(cls, config: ServerConfig, infos: Sequence[net.AddressInfo] | None = None) -> Self:
        """Bind the addresses of ``config``, which are resolved here unless ``infos`` has them."""
        if config.fd is not None:
            return cls.adopt([config.fd], has_udp=config.udp)
        path = None if config.uds is None else os.fspath(config.uds)
        self = cls(net.bind(config, net.resolve(config) if infos is None else infos), path, is_owner=True)
        if not config.accepts:
            self._backlog_fillers = [net.fill_backlog(each) for each in self._sockets]
        self._backlog, self._has_own_ports = config.backlog, config.accepts and config.uds is None
        return self

    @classmethod
    def adopt(cls, descriptors: Sequence[int], *, has_udp: bool = False) -> Self:
        """Adopt inherited listening sockets. :exc:`~echo_async.StartError` if a descriptor is none.

        With ``has_udp``, UDP sockets are adopted as well, or bound to the same addresses if there are none.
        """
        with contextlib.ExitStack() as on_failure:
            sockets = [on_failure.enter_context(net.adopt(each, has_udp=has_udp)) for each in descriptors]
            types = {each.type for each in sockets}
            if socket.SOCK_STREAM not in types:
                raise StartError("cannot listen on a UDP socket alone; pass a listening TCP socket as well")
            if has_udp and socket.SOCK_DGRAM not in types:
                sockets += net.bind_udp(sockets)
            on_failure.pop_all()
            return cls(sockets)

    def divide(self, count: int) -> list["ListeningSockets"]:
        """Return the listeners of each of ``count`` processes; the first are these.

        Each has TCP sockets of its own where the kernel distributes the connections among them. The others have
        duplicates of UDP sockets, inherited sockets and Unix sockets, and of all sockets where the kernel does not:
        these have one queue for all processes. :exc:`~echo_async.StartError` for lack of descriptors.
        """
        self._is_owner = False
        groups: list[list[socket.socket]] = [[] for _ in range(count - 1)]
        shared = self._sockets
        if self._has_own_ports and HAS_BALANCED_PORTS:
            with contextlib.suppress(OSError):  # a kernel that does not allow it
                groups, shared = net.share_ports(self._sockets, count - 1, self._backlog), []
        with contextlib.ExitStack() as on_failure:
            for each in chain.from_iterable(groups):
                on_failure.enter_context(each)
            duplicates = net.duplicate([*shared, *self.datagram_sockets], count - 1)
            on_failure.pop_all()
        return [self, *(ListeningSockets([*own, *others]) for own, others in zip(groups, duplicates, strict=True))]

    @property
    def name(self) -> str:
        """The first address, formatted."""
        return net.format_address(self.addresses[0])

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The open ones."""
        return tuple(self._sockets)

    @property
    def descriptors(self) -> list[int]:
        """The numbers of the sockets that a worker inherits."""
        return [each.fileno() for each in (*self._sockets, *self.datagram_sockets)]

    def has_queue(self) -> bool:
        """Whether a connection waits to be accepted; False if the sockets are closed."""
        return is_ready(self._sockets)

    def refuse(self) -> None:
        """Refuse connections, and keep the addresses for :meth:`listen`. Those in the backlog are reset."""
        self._sockets[:] = map(net.replace_by_bound, self._sockets)
        self._file_id = None if self._path is None else net.get_file_id(self._path)

    def listen(self) -> None:
        """Accept connections again."""
        for each in self._sockets:
            net.listen(each, self._backlog)

    def shut_down(self) -> None:
        """Refuse connections, also where a child process has duplicates of the sockets, unless it serves them."""
        for each in self._sockets if self._is_owner else ():
            net.shut_down(each)

    def close_udp(self) -> None:
        for each in self.datagram_sockets:
            if self._is_owner:
                net.shut_down(each)
            each.close()

    def close(self) -> None:
        if self._path is not None and self._file_id is not None and net.get_file_id(self._path) == self._file_id:
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # so that clients are refused
        self._path = None
        self.shut_down()
        self.close_udp()
        for each in (*self._sockets, *self._backlog_fillers):
            each.close()
        self._sockets.clear()
