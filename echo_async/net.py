"""Addresses and listening sockets: format, resolve, bind, adopt."""

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from .compat import HAS_SHARED_PORTS, enable_destination_info, mark_replies, set_exclusive_address, try_lock
from .config import ServerConfig
from .errors import StartError, describe_error
from .logs import log
from .wire.datagrams import REPLY_TRAFFIC_CLASS
from .wire.text import escape

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""

AddressInfo = tuple[socket.AddressFamily, Any, int, str, Any]
"""An item of the result of :func:`socket.getaddrinfo`, or the same for a Unix socket."""


IPV4_MAPPED = "::ffff:"
UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # wildcard addresses, and the loopback address that reaches each
PORT_ATTEMPTS = 10  # free ports that are tried until one is free on every address
RECEIVE_BUFFER_SIZE = 4 * 1024 * 1024  # bytes requested for the datagrams of a burst
LOCK_TIMEOUT, LOCK_INTERVAL = 1.0, 0.005  # seconds to wait for the lock of a directory, and between two attempts
NO_ADDRESS = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}  # of socket(2) and bind(2) for what this machine does not have


def format_address(address: object) -> str:
    """Format a socket address: ``127.0.0.1:5500``, ``[::1]:5500``, the path of a Unix socket, ``@abstract-name``."""
    if isinstance(address, tuple):
        host, port = get_host(address), address[1]
        if host.startswith(IPV4_MAPPED) and "." in host:  # an IPv4 peer of a dual-stack socket
            host = host.removeprefix(IPV4_MAPPED)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if isinstance(address, bytes):
        address = address.decode("utf-8", "surrogateescape")
    if not address:
        return "unix client" if address is not None else "disconnected client"
    path = str(address)
    return escape("@" + path[1:] if path.startswith("\0") else path)


def get_host(name: tuple[Any, ...]) -> str:
    """Return the host of an IP socket address, with the zone that connecting to it requires: ``fe80::1%eth0``.

    In the address itself the zone is a number, the scope ID (RFC 4007 section 11).
    """
    host: str = name[0]
    if len(name) < 4 or not name[3]:
        return host
    return socket.getnameinfo((host, 0, 0, name[3]), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def get_address(listener: socket.socket) -> Address:
    """Return the address to which clients of ``listener`` connect."""
    name = listener.getsockname()
    if isinstance(name, tuple):
        return get_host(name), name[1]
    return name if isinstance(name, str) else name.decode("utf-8", "surrogateescape")


def resolve(config: ServerConfig, flags: int = 0) -> Sequence[AddressInfo]:
    """Return all addresses of the configured hosts. Blocks, unless ``flags`` has AI_NUMERICHOST."""
    if config.uds is not None or config.fd is not None:
        return []
    infos: list[AddressInfo] = []
    for host in [config.host] if isinstance(config.host, str) else config.host:
        try:
            found = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | flags)
        except (OSError, ValueError) as error:  # ValueError: not a valid host name
            raise StartError(
                f"cannot listen on host {host!r}: {describe_error(error)}; "
                "choose a host name or an address of this machine"
            ) from error
        infos += _existing_addresses(found)
    return infos


def _existing_addresses(infos: Sequence[AddressInfo]) -> Sequence[AddressInfo]:
    """Leave out the addresses of a name that this machine does not have; none if it has none of them.

    In a container, ``localhost`` can have an IPv6 address in /etc/hosts and none on the interface.
    """
    if len(infos) == 1:  # also an address that is given as such
        return infos
    missing = [info for info in infos if not _exists(info[0], info[4])]
    if len(missing) == len(infos):
        return infos
    for info in missing:
        log.info("%s not served: this machine does not have the address", format_address(info[4]))
    return [info for info in infos if info not in missing]


def bind(config: ServerConfig, infos: Sequence[AddressInfo]) -> list[socket.socket]:
    """Open the listening sockets of ``config``: one per address, or one Unix socket.

    With port 0 all sockets get the same port. :exc:`~echo_async.StartError` if any cannot be opened; then all are
    closed.
    """
    backlog = config.backlog if config.accepts else 0
    if config.uds is not None:
        return [_bind_unix(os.fspath(config.uds), backlog)]
    infos = _replace_unspecified(list(dict.fromkeys(infos)))
    attempts = PORT_ATTEMPTS if config.port == 0 else 1
    while True:
        attempts -= 1
        try:
            return _bind_tcp(infos, backlog, has_udp=config.udp)
        except StartError as error:
            if not attempts or getattr(error.__cause__, "errno", None) != errno.EADDRINUSE:
                raise


def _replace_unspecified(infos: Sequence[AddressInfo]) -> Sequence[AddressInfo]:
    """Replace ``::`` by 0.0.0.0 where the kernel has no IPv6; leave it out if there is an IPv4 address as well."""
    ports = [info[4][1] for info in infos if info[4][0] == "::"]
    if not ports or _exists(socket.AF_INET6, ("::",)):
        return infos
    others = [info for info in infos if info[4][0] != "::"]
    if _has_family(others, socket.AF_INET):
        return others
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("0.0.0.0", ports[0])), *others]


def _exists(family: socket.AddressFamily, address: tuple[Any, ...]) -> bool:
    """Return whether a socket can be bound to ``address``, on any port."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError as error:
        return error.errno not in NO_ADDRESS
    return True


def _has_family(infos: Sequence[AddressInfo], family: socket.AddressFamily) -> bool:
    return any(info[0] == family for info in infos)


def _bind_tcp(infos: Sequence[AddressInfo], backlog: int, *, has_udp: bool) -> list[socket.socket]:
    """Listen on every address. ``::`` accepts IPv4 as well, unless there is an IPv4 address among them.

    With ``has_udp`` there are UDP sockets with the same addresses as well.
    """
    has_ipv4 = _has_family(infos, socket.AF_INET)
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in infos:
            if address[1] == 0 and sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            with _listen_errors(address):  # the machine may not support the address family
                listener = stack.enter_context(socket.socket(family, kind, protocol))
                set_exclusive_address(listener)
                if family == socket.AF_INET6:
                    is_ipv6_only = has_ipv4 or address[0] != "::"
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, is_ipv6_only)
                _disable_nagle(listener)
                listener.bind(address)
            sockets.append(listener)
        for listener in sockets:
            listen(listener, backlog)  # another server may have listened since bind
        if has_udp:
            sockets += bind_udp(sockets)
        stack.pop_all()
        return sockets


def bind_udp(listeners: Sequence[socket.socket]) -> list[socket.socket]:
    """Return UDP sockets with the addresses of TCP ``listeners``. Replies that they send are marked."""
    with contextlib.ExitStack() as stack:
        receivers = []
        for listener in listeners:
            address = listener.getsockname()
            if listener.family not in (socket.AF_INET, socket.AF_INET6):
                raise StartError(f"cannot receive datagrams on {format_address(address)}: not an IP address; omit udp")
            with _listen_errors(address, "/udp"):
                receiver = stack.enter_context(socket.socket(listener.family, socket.SOCK_DGRAM))
                set_exclusive_address(receiver)
                if listener.family == socket.AF_INET6:
                    is_ipv6_only = listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                    receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, is_ipv6_only)
                receiver.bind(address)
                if not HAS_SHARED_PORTS:  # another one can bind the address of a socket that was shut down only
                    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            receivers.append(_prepare_udp(receiver))
        stack.pop_all()
        return receivers


def _prepare_udp(receiver: socket.socket) -> socket.socket:
    mark_replies(receiver, REPLY_TRAFFIC_CLASS)
    if receiver.getsockname()[0] in UNSPECIFIED:
        enable_destination_info(receiver)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_SIZE)  # the system limits it
    receiver.setblocking(False)
    return receiver


def share_ports(listeners: Sequence[socket.socket], count: int, backlog: int) -> list[list[socket.socket]]:
    """Open ``count`` more groups of sockets that listen on the addresses of ``listeners``.

    The kernel distributes the connections of an address among its sockets. ``listeners`` were bound without
    SO_REUSEPORT and listen, so that no other server has these ports. They take part from when the others listen
    (Linux: net/ipv4/inet_hashtables.c, ``inet_reuseport_add_sock``). OSError, without any effect, if a socket cannot
    be opened.
    """
    with contextlib.ExitStack() as on_failure:
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            on_failure.callback(listener.setsockopt, socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        groups = [[_bind_beside(each, on_failure) for each in listeners] for _ in range(count)]
        for opened in chain.from_iterable(groups):
            opened.listen(backlog)
        on_failure.pop_all()
        return groups


def duplicate(sockets: Sequence[socket.socket], count: int) -> list[list[socket.socket]]:
    """Return ``count`` groups of duplicates. :exc:`~echo_async.StartError` for lack of descriptors."""
    with contextlib.ExitStack() as on_failure:
        try:
            groups = [[on_failure.enter_context(each.dup()) for each in sockets] for _ in range(count)]
        except OSError as error:
            raise StartError(
                f"cannot open worker sockets: {describe_error(error)}; raise the descriptor limit"
            ) from error
        on_failure.pop_all()
        return groups


def _bind_beside(listener: socket.socket, on_failure: contextlib.ExitStack) -> socket.socket:
    opened = on_failure.enter_context(socket.socket(listener.family, listener.type, listener.proto))
    options = [(socket.SOL_SOCKET, socket.SO_REUSEADDR), (socket.SOL_SOCKET, socket.SO_REUSEPORT)]
    if listener.family == socket.AF_INET6:
        options.append((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    for option in options:
        opened.setsockopt(*option, listener.getsockopt(*option))
    _disable_nagle(opened)
    opened.bind(listener.getsockname())
    opened.setblocking(False)
    return opened


def replace_by_bound(listener: socket.socket) -> socket.socket:
    """Close ``listener``; return a socket with its address, which refuses connections until it listens."""
    with contextlib.ExitStack() as on_failure:
        if listener.family == socket.AF_UNIX:
            path = listener.getsockname()
            bound = on_failure.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.close()
            with contextlib.suppress(OSError, ValueError):  # ValueError: an abstract name
                os.unlink(path)
            bound.bind(path)
            bound.setblocking(False)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound = _bind_beside(listener, on_failure)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
            shut_down(listener)
            listener.close()
        on_failure.pop_all()
        return bound


def shut_down(opened: socket.socket) -> None:
    """Shut down a socket that is about to be closed: a child process that was forked may have a duplicate of it.

    A connection would not end, and a listener would establish others, as long as the child runs. A UDP socket cannot be
    shut down. It is connected to itself, so that it receives nothing, and another one can bind its address.
    """
    with contextlib.suppress(OSError):  # it has ended, or is closed
        if opened.type == socket.SOCK_DGRAM:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.connect(opened.getsockname())
        else:
            opened.shutdown(socket.SHUT_RDWR)


def fill_backlog(listener: socket.socket) -> socket.socket:
    """Connect to ``listener``, which has a backlog of 0 and never accepts; return the connection.

    It takes the only place in the backlog. Linux drops the SYN of any other connection then, which therefore never
    completes (listen(2); net.ipv4.tcp_abort_on_overflow is not for this queue).
    """
    address = listener.getsockname()
    if isinstance(address, tuple):
        address = (UNSPECIFIED.get(address[0], address[0]), *address[1:])
    client = socket.socket(listener.family, listener.type)
    client.setblocking(False)
    client.connect_ex(address)
    return client


def listen(listener: socket.socket, backlog: int) -> None:
    listener.setblocking(False)
    with _listen_errors(listener.getsockname()):
        listener.listen(backlog)


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
def _listen_errors(address: object, suffix: str = "") -> Iterator[None]:
    """Raise :exc:`~echo_async.StartError`, with advice, if it is not possible to listen on ``address``."""
    try:
        yield
    except (OSError, ValueError) as error:
        advice_by_errno = _TCP_ADVICE if isinstance(address, tuple) else _UNIX_ADVICE
        advice = advice_by_errno.get(getattr(error, "errno", None) or 0, "")
        reason = describe_error(error)
        raise StartError(f"cannot listen on {format_address(address)}{suffix}: {reason}{advice}") from error


def _bind_unix(path: str, backlog: int) -> socket.socket:
    """Listen on ``path``. Two servers that start at the same time do it one after the other."""
    with _directory_lock(path), contextlib.ExitStack() as stack:
        _remove_stale_socket(path)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        with _listen_errors(path):
            listener.bind(path)
        listen(listener, backlog)
        stack.pop_all()
        return listener


@contextlib.contextmanager
def _directory_lock(path: str) -> Iterator[None]:
    """Lock the directory of ``path``: until a socket listens, it looks like one that a killed server left.

    The lock leaves no file behind. Where it cannot be taken within ``LOCK_TIMEOUT``, the block runs without it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ValueError):  # an unreadable directory, an abstract name
            descriptor = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            stack.callback(os.close, descriptor)
            deadline = time.monotonic() + LOCK_TIMEOUT
            while not try_lock(descriptor) and time.monotonic() < deadline:
                time.sleep(LOCK_INTERVAL)
        yield


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


def adopt(descriptor: int, *, has_udp: bool = False) -> socket.socket:
    """Return the inherited listening socket, or with ``has_udp`` a UDP socket.

    :exc:`~echo_async.StartError` if ``descriptor`` is none.
    """
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        reason = describe_error(error)
    else:
        if listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            _disable_nagle(listener)
            listener.setblocking(False)
            return listener
        if has_udp and listener.type == socket.SOCK_DGRAM and listener.family in (socket.AF_INET, socket.AF_INET6):
            return _prepare_udp(listener)
        listener.detach()
        reason = "not a listening stream socket"
    raise StartError(f"cannot listen on descriptor {descriptor}: {reason}; pass a listening TCP or Unix stream socket")
