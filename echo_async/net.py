"""Addresses and listening sockets: format, resolve, bind, adopt."""

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import Any

from .compat import set_exclusive_address
from .config import ServerConfig
from .errors import StartError, describe_error
from .logs import escape

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""

AddressInfo = tuple[socket.AddressFamily, Any, int, str, tuple[Any, ...]]
"""An item of the result of :func:`socket.getaddrinfo`."""


def format_address(address: object) -> str:
    """Format a socket address: ``127.0.0.1:5500``, ``[::1]:5500``, the path of a Unix socket, ``@abstract-name``."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(address, bytes):
        address = address.decode("utf-8", "surrogateescape")
    if not address:
        return "unix client" if address is not None else "disconnected client"
    path = str(address)
    return escape("@" + path[1:] if path.startswith("\0") else path)


def get_address(listener: socket.socket) -> Address:
    """Return the address to which clients of ``listener`` connect."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return name[0], name[1]
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def resolve_literal(config: ServerConfig) -> Sequence[AddressInfo] | None:
    """Return the address of a host that is an IP address, without asking a resolver; None if it is a name."""
    with contextlib.suppress(OSError, ValueError):
        return _getaddrinfo(config, socket.AI_NUMERICHOST)
    return None


def resolve(config: ServerConfig) -> Sequence[AddressInfo]:
    """Return all addresses of the configured host. Blocks."""
    try:
        return _getaddrinfo(config, 0)
    except (OSError, ValueError) as error:  # ValueError: not a valid host name
        raise StartError(
            f"cannot listen on host {config.host!r}: {describe_error(error)}; "
            "choose a host name or an address of this machine"
        ) from error


def _getaddrinfo(config: ServerConfig, flags: int) -> Sequence[AddressInfo]:
    if config.uds is not None or config.fd is not None:
        return []
    return socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | flags)


def bind(config: ServerConfig, infos: Sequence[AddressInfo]) -> list[socket.socket]:
    """Open the listening sockets of ``config``: one per address, one Unix socket, or the inherited socket.

    With port 0 all sockets get the port of the first. :exc:`~echo_async.StartError` if any cannot be opened; then
    all are closed.
    """
    if config.fd is not None:
        return [adopt(config.fd)]
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        if config.uds is not None:
            _remove_stale_socket(config.uds)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            _bind_socket(listener, config.uds)
            sockets.append(listener)
        for family, kind, protocol, _, address in dict.fromkeys(infos if config.uds is None else ()):
            if address[1] == 0 and sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            with _listen_errors(address):  # the machine may not support the address family
                listener = stack.enter_context(socket.socket(family, kind, protocol))
            _bind_socket(listener, address)
            sockets.append(listener)
        for listener in sockets:
            listener.setblocking(False)
            with _listen_errors(listener.getsockname()):  # another server may have listened since bind
                listener.listen(config.backlog)
        stack.pop_all()
        return sockets


def _bind_socket(listener: socket.socket, address: Any) -> None:
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        set_exclusive_address(listener)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    _disable_nagle(listener)
    with _listen_errors(address):
        listener.bind(address)


def _disable_nagle(listener: socket.socket) -> None:
    """Set TCP_NODELAY, which accepted sockets inherit."""
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


_TCP_ADVICE = {
    errno.EADDRINUSE: "; stop the other server or choose another port (0: any free port)",
    errno.EADDRNOTAVAIL: "; choose an address of this machine",
    errno.EACCES: "; choose a port from 1024 up, or run with the privilege to bind it",
}
_UNIX_ADVICE = {
    errno.EADDRINUSE: "; stop the other server, remove the file or choose another path",
    errno.EACCES: "; choose a path in a writable directory",
    errno.ENOENT: "; choose a path in an existing directory",
}


@contextlib.contextmanager
def _listen_errors(address: object) -> Iterator[None]:
    """Raise :exc:`~echo_async.StartError`, with advice, if it is not possible to listen on ``address``."""
    try:
        yield
    except (OSError, ValueError) as error:
        advice_by_errno = _TCP_ADVICE if isinstance(address, tuple) else _UNIX_ADVICE
        advice = advice_by_errno.get(getattr(error, "errno", None) or 0, "")
        raise StartError(f"cannot listen on {format_address(address)}: {describe_error(error)}{advice}") from error


def _remove_stale_socket(path: str) -> None:
    """Remove the socket file that a killed server left; keep one on which a server listens."""
    with contextlib.suppress(OSError, ValueError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full backlog shows a server as well
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)


def get_file_id(path: str) -> tuple[int, int] | None:
    """Return the device and inode of ``path``; None if there is no such file."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: an abstract name
        status = os.stat(path)
        return status.st_dev, status.st_ino
    return None


def remove_socket_file(path: str, file_id: tuple[int, int] | None) -> None:
    """Remove ``path`` if it still is the file with ``file_id``, so that clients are refused."""
    with contextlib.suppress(OSError):
        if file_id is not None and get_file_id(path) == file_id:
            os.unlink(path)


def adopt(descriptor: int) -> socket.socket:
    """Return the inherited listening socket. :exc:`~echo_async.StartError` if ``descriptor`` is none."""
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        reason = describe_error(error)
    else:
        if listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _disable_nagle(listener)
            listener.setblocking(False)
            return listener
        listener.detach()
        reason = "not a listening stream socket"
    raise StartError(f"cannot listen on descriptor {descriptor}: {reason}; pass a listening TCP or Unix stream socket")
