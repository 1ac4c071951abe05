"""Listening sockets: names resolved, bound, and told apart; opened once, whoever serves them afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Sequence
from typing import Any, TypeAlias

from .config import ServerConfig
from .errors import StartError, describe_error
from .logs import escape

__all__ = [
    "Address",
    "AddressInfo",
    "address_of",
    "adopt",
    "bind",
    "format_address",
    "inode",
    "numeric",
    "resolve",
    "unlink",
]

Address: TypeAlias = Any
"""``(host, port)``, or the path of a Unix socket. Any, as for sockets: who chose knows which it is."""

AddressInfo = tuple[socket.AddressFamily, Any, int, str, tuple[Any, ...]]
"""What ``getaddrinfo`` gives for one address."""


def numeric(config: ServerConfig) -> Sequence[AddressInfo] | None:
    """The address of ``config`` if its host is one already: nothing to ask a resolver for. Else None."""
    if _has_no_name(config):
        return []
    try:
        return _getaddrinfo(config, socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        return None


def resolve(config: ServerConfig) -> Sequence[AddressInfo]:
    """Every address that the host of ``config`` has here. Blocks while the resolver is asked."""
    if _has_no_name(config):
        return []
    try:
        return _getaddrinfo(config, 0)
    except (OSError, ValueError) as error:  # ValueError: not even the form of a name
        raise no_such_host(config, error) from error


def _has_no_name(config: ServerConfig) -> bool:
    return config.uds is not None or config.fd is not None


def _getaddrinfo(config: ServerConfig, flags: int) -> Sequence[AddressInfo]:
    return socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | flags)


def no_such_host(config: ServerConfig, error: Exception) -> StartError:
    return StartError(
        f"cannot listen on host {config.host!r}: {describe_error(error)}; give a name or an address of this machine"
    )


def bind(config: ServerConfig, infos: Sequence[AddressInfo]) -> list[socket.socket]:
    """Open the listening sockets of ``config``: one for each address, or one Unix socket.

    With port 0 all of them get the port that the first was given. :exc:`StartError` if any cannot be
    bound; then none is left open.
    """
    if config.fd is not None:
        return [adopt(config.fd)]
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        if config.uds is not None:
            sockets.append(opened.enter_context(_bind_unix(config.uds)))
        for family, kind, protocol, _, address in dict.fromkeys(infos if config.uds is None else ()):
            if address[1] == 0 and sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            listener = opened.enter_context(_socket(family, kind, protocol, address))
            _bind(listener, address)
            sockets.append(listener)
        for listener in sockets:
            _listen(listener, config.backlog)
        opened.pop_all()
        return sockets


def adopt(descriptor: int) -> socket.socket:
    """The listening socket that was handed over as ``descriptor``. :exc:`~echo_async.StartError` if it is none."""
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise StartError(
            f"descriptor {descriptor} is not a socket: {describe_error(error)}; give one that listens"
        ) from error
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise StartError(f"descriptor {descriptor} is not a listening stream socket: give one that is")
    _prepare(listener)
    listener.setblocking(False)
    return listener


def _prepare(listener: socket.socket) -> None:
    """What the sockets that are accepted get from it."""
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _socket(family: int, kind: int, protocol: int, address: object) -> socket.socket:
    try:
        return socket.socket(family, kind, protocol)
    except OSError as error:  # an address family that this machine does not have
        raise _cannot_listen(address, error) from error


def _bind(listener: socket.socket, address: Any) -> None:
    if listener.family != socket.AF_UNIX:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    _prepare(listener)
    try:
        listener.bind(address)
    except (OSError, ValueError) as error:
        raise _cannot_listen(address, error) from error


def _listen(listener: socket.socket, backlog: int) -> None:
    listener.setblocking(False)
    try:
        listener.listen(backlog)
    except OSError as error:  # another server took the address between bind and listen
        raise _cannot_listen(listener.getsockname(), error) from error


def _bind_unix(path: str) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind(listener, path)
    except StartError:
        listener.close()
        raise
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket that a server which was killed left behind; one that is answered stays."""
    with contextlib.suppress(OSError, ValueError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full queue is an answer too
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


_ADVICE = {
    errno.EADDRINUSE: "; another server has it: stop that one, or take another (port 0 finds a free one)",
    errno.EADDRNOTAVAIL: "; give an address of this machine",
    errno.EACCES: "; take a port from 1024 up, or run with the right to bind it",
}
_ADVICE_UNIX = {
    errno.EADDRINUSE: "; another server has it, or a file is there: take another path",
    errno.EACCES: "; take a path in a folder that you may write to",
    errno.ENOENT: "; take a path in a folder that exists",
}


def _cannot_listen(address: object, error: Exception) -> StartError:
    advice = (_ADVICE if isinstance(address, tuple) else _ADVICE_UNIX).get(getattr(error, "errno", None) or 0, "")
    return StartError(f"cannot listen on {format_address(address)}: {describe_error(error)}{advice}")


def format_address(address: object) -> str:
    """``127.0.0.1:5500``, ``[::1]:5500``, the path of a Unix socket, or what its client is called."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(address, bytes):
        address = address.decode("utf-8", "surrogateescape")
    if not address:
        return "unix client" if address is not None else "a client that is gone"
    path = str(address)
    return escape("@" + path[1:] if path.startswith("\0") else path)  # Linux' abstract names begin with NUL


def address_of(listener: socket.socket) -> Address:
    """Where clients reach ``listener``: what :func:`echo_async.connect` takes."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return name[0], name[1]
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def inode(path: str) -> tuple[int, int] | None:
    """Which file ``path`` is; None if it is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that is no path
        return None
    return found.st_dev, found.st_ino


def unlink(path: str, made: tuple[int, int] | None) -> None:
    """Remove the path of a Unix socket, if that is what was ``made``; a client then sees that nobody is there."""
    with contextlib.suppress(OSError):
        if made is not None and inode(path) == made:
            os.unlink(path)
