"""What a platform may lack: Windows above all, and asyncio's event loop there (``ProactorEventLoop``).

The other modules use what every platform has, and what this module provides. What cannot work without a missing
part is refused by :func:`require_feature`.
"""

from __future__ import annotations

import errno
import select
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    import asyncio

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

HAS_UNIX_SOCKETS = hasattr(socket, "AF_UNIX")

UNIX_SOCKETS = "Unix sockets"
DESCRIPTORS = "POSIX file descriptors"  # a process inherits them by number, and select accepts each
_is_present = {UNIX_SOCKETS: HAS_UNIX_SOCKETS, DESCRIPTORS: resource is not None}

CONNECT_IN_PROGRESS = {0, errno.EINPROGRESS, getattr(errno, "WSAEWOULDBLOCK", 0)}
"""Results of ``connect_ex`` on a nonblocking socket that is connecting, or connected."""

TRAFFIC_CLASS_OPTIONS = (("IPPROTO_IP", "IP_RECVTOS", "IP_TOS"), ("IPPROTO_IPV6", "IPV6_RECVTCLASS", "IPV6_TCLASS"))

IP_PKTINFO = 8  # of Linux: include/uapi/linux/in.h
IPV6_PKTINFO = socket.IPPROTO_IPV6, getattr(socket, "IPV6_PKTINFO", -1)
IPV6_MULTICAST = 0xFF  # the first byte (RFC 4291 section 2.7)

SIOCOUTQNSD = 0x894B  # of Linux: include/uapi/linux/sockios.h

HAS_SHARED_PORTS = hasattr(socket, "SO_EXCLUSIVEADDRUSE")
"""Whether SO_REUSEADDR lets several servers listen on one port."""

HAS_BALANCED_PORTS = sys.platform == "linux"
"""Whether the kernel distributes connections among sockets with SO_REUSEPORT that listen on one address.

Linux does since 3.9 (socket(7)). FreeBSD has SO_REUSEPORT_LB for it (since 12, setsockopt(2)).
"""

MSG_DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 1 << 30)
"""A flag of ``recv`` and ``send`` for what :func:`accepted_socket` returns."""

PollSelector: type[selectors.BaseSelector] = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""A selector without a descriptor of its own."""

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
HANGUP_SIGNALS = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


def require_feature(feature: str, use: str) -> None:
    """Raise :exc:`~echo_async.ConfigError` if the platform lacks ``feature``, without which ``use`` cannot work."""
    if not _is_present[feature]:
        raise ConfigError(f"cannot {use}: this platform has no {feature}")


def descriptor_limit() -> int | None:
    """Return the maximum number of descriptors of this process, None if there is none."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may have without a privilege."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def try_lock(descriptor: int) -> bool:
    """Lock an open file or directory until it is closed; False if another process has locked it."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def set_exclusive_address(listener: socket.socket) -> None:
    """Let ``listener`` bind an address that a server used before, and no address on which a server listens.

    On Windows the default already has the first half, and SO_REUSEADDR would undo the second.
    """
    option = socket.SO_EXCLUSIVEADDRUSE if HAS_SHARED_PORTS else socket.SO_REUSEADDR  # type: ignore[attr-defined]
    listener.setsockopt(socket.SOL_SOCKET, option, 1)


def set_reset_on_close(connected: Any) -> None:
    """Let closing ``connected`` reset the connection (socket(7), SO_LINGER of 0 s). Unix sockets are just closed."""
    linger = struct.pack("ii" if resource is not None else "hh", 1, 0)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def mark_replies(receiver: socket.socket, traffic_class: int) -> None:
    """Send all datagrams of ``receiver`` with ``traffic_class``, and let :func:`receive_message` return that of others.

    A dual-stack socket takes the options of IPv4 as well, for its IPv4 peers. What the platform lacks is left out.
    """
    for level, request, name in TRAFFIC_CLASS_OPTIONS:
        with suppress(OSError, AttributeError):
            receiver.setsockopt(getattr(socket, level), getattr(socket, request), 1)
            receiver.setsockopt(getattr(socket, level), getattr(socket, name), traffic_class)


def enable_destination_info(receiver: socket.socket) -> None:
    """Let :func:`receive_message` return the address that a datagram was sent to, on Linux."""
    if sys.platform == "linux":
        with suppress(OSError):
            if receiver.family == socket.AF_INET6:
                receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                receiver.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def find_reply_source(ancillary: list[Any]) -> list[Any]:
    """Return the ancillary data of a reply from the address that a datagram was sent to; empty if that is not reported.

    The structures are in ip(7) and RFC 3542 section 6.1. The system selects the interface of the reply.
    """
    for level, kind, info in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):  # interface, local address, destination
            return [(level, kind, bytes(4) + info[4:8] + bytes(4))]
        if (level, kind) == IPV6_PKTINFO and info[0] != IPV6_MULTICAST:
            return [(level, kind, info[:16] + bytes(4))]
    return []


def format_reply_source(reply_source: list[Any]) -> str | None:
    """Return the address in the result of :func:`find_reply_source`."""
    for level, _, info in reply_source:
        if level == socket.IPPROTO_IP:
            return socket.inet_ntop(socket.AF_INET, info[4:8])
        return socket.inet_ntop(socket.AF_INET6, info[:16])
    return None


def _receive_without_ancillary(receiver: socket.socket, size: int, _: int, /) -> tuple[bytes, list[Any], int, Any]:
    data, source = receiver.recvfrom(size)
    return data, [], 0, source


HAS_ANCILLARY_DATA = hasattr(socket, "CMSG_SPACE")
ANCILLARY_SIZE = 256 if HAS_ANCILLARY_DATA else 0
"""Bytes: more than an address, a traffic class and the timestamp that an inherited socket can report."""

receive_message: Callable[[socket.socket, int, int], tuple[bytes, list[Any], int, Any]] = (
    socket.socket.recvmsg if HAS_ANCILLARY_DATA else _receive_without_ancillary
)
"""``recvmsg`` of a socket; without ancillary data where there is none."""


def unsent_in_kernel(connected: Any) -> int:
    """Return the bytes in the kernel that it is still to put on the wire; 0 where it does not tell."""
    if sys.platform == "linux" and not _poll(connected, 0):  # it sends nothing more after a reset
        with suppress(OSError):  # not a TCP socket
            return int.from_bytes(fcntl.ioctl(connected.fileno(), SIOCOUTQNSD, bytes(4)), sys.byteorder)
    return 0


def read_cpu_time(process: int) -> int | None:
    """Return the nanoseconds for which the main thread of ``process`` has run; None where the kernel does not tell.

    Linux: Documentation/scheduler/sched-stats.rst, the first field of /proc/PID/schedstat.
    """
    try:
        with open(f"/proc/{process}/schedstat", encoding="ascii") as statistics:
            return int(statistics.read().split()[0])
    except (OSError, IndexError):
        return None


def _poll(connected: Any, events: int) -> bool:
    """Return whether ``connected`` has one of ``events``, or was reset."""
    poll = select.poll()
    poll.register(connected, events)
    return bool(poll.poll(0))


def is_closed_by_peer(connected: Any) -> bool:
    """Return whether the peer has closed its sending side; False where the kernel does not tell without a read."""
    return hasattr(select, "POLLRDHUP") and _poll(connected, select.POLLRDHUP)


def is_ready(sockets: Iterable[Any], events: int = selectors.EVENT_READ) -> bool:
    """Return whether one of ``sockets`` has input, a connection to accept, or an error; or room for output."""
    with PollSelector() as selector:
        for each in sockets:
            selector.register(each, events)
        return bool(selector.select(0))


def accepted_socket(accepted: socket.socket) -> socket.socket:
    """Return a blocking socket that supports ``MSG_DONTWAIT``, in place of ``accepted``."""
    if not hasattr(socket, "MSG_DONTWAIT"):
        accepted = _EmulatedSocket(accepted.family, accepted.type, accepted.proto, accepted.detach())
    # Only Linux accepts blocking sockets whatever the listener is (accept(2)); socket.setdefaulttimeout changes them.
    if sys.platform != "linux" or accepted.gettimeout() is not None:
        accepted.setblocking(True)
    return accepted


class _EmulatedSocket(socket.socket):
    """Only one thread at a time reads from it, or writes to it: what select reports is still true after it."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if flags & MSG_DONTWAIT and not select.select([self], (), (), 0)[0]:
            raise BlockingIOError
        return super().recv(size, flags & ~MSG_DONTWAIT)

    def send(self, data: Any, flags: int = 0, /) -> int:
        if flags & MSG_DONTWAIT and not select.select((), [self], (), 0)[1]:
            raise BlockingIOError
        return super().send(data, flags & ~MSG_DONTWAIT)


def add_signal_handler(
    loop: asyncio.AbstractEventLoop, number: int, callback: Callable[..., object], *arguments: Any
) -> None:
    """Call ``callback(*arguments)`` in the running ``loop`` when the process receives a signal."""
    try:
        loop.add_signal_handler(number, callback, *arguments)
    except NotImplementedError:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(callback, *arguments))


def remove_signal_handler(loop: asyncio.AbstractEventLoop, number: int) -> None:
    """Restore the default handler of a signal."""
    with suppress(NotImplementedError, AttributeError):  # rloop 0.5: "no attribute '_is_main_thread'"
        loop.remove_signal_handler(number)
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
