"""Open a connection by blocking calls: resolve, connect, TLS. Every step has a deadline, the resolver included."""

import errno
import os
import socket
from collections.abc import Sequence
from selectors import EVENT_WRITE
from ssl import SSLSocket
from time import monotonic, perf_counter, sleep
from typing import cast

from ..background import start_resolver
from ..compat import CONNECT_IN_PROGRESS, PollSelector
from ..net import AddressInfo
from .endpoint import (
    CONNECTION_ATTEMPT_DELAY,
    UNIX_RETRY_DELAY,
    Endpoint,
    closed_on_error,
    log_tls,
    new_socket,
    refuse_self_connection,
)

MAX_WAIT = 2_000_000.0  # seconds; poll takes milliseconds as a 32-bit integer
SMALL_SEGMENT_SIZE = 1400  # bytes


def find_addresses(endpoint: Endpoint, deadline: float) -> Sequence[AddressInfo]:
    """Return the addresses of the server. The timeout of the system's resolver can be longer than the deadline."""
    return endpoint.numeric or start_resolver(endpoint.resolve).result(seconds_left(deadline))


def connect_first(
    endpoint: Endpoint, infos: Sequence[AddressInfo], deadline: float, *, is_small: bool = False
) -> tuple[AddressInfo, socket.socket]:
    """Connect to the first address that accepts, and send the PROXY header, if one is configured; return both.

    The next address is tried after a delay, or after a failure (RFC 8305). The socket does not block. ``is_small`` is
    for a connection that is full soon: Linux sizes the send buffer of the server by the segments.
    """
    waiting, failure, started = list(infos), None, perf_counter()
    with PollSelector() as selector:
        try:
            while waiting or selector.get_map():
                left = seconds_left(deadline)
                try:
                    if waiting:
                        info = waiting.pop(0)
                        selector.register(_start_connecting(info, deadline, is_small=is_small), EVENT_WRITE, info)
                    for key, _ in selector.select(min(left, CONNECTION_ATTEMPT_DELAY) if waiting else left):
                        selector.unregister(key.fileobj)
                        connected = cast(socket.socket, key.fileobj)
                        _finish_connecting(connected)
                        endpoint.start(connected, started)
                        return key.data, connected
                except OSError as error:
                    failure = failure or error
        finally:
            for key in selector.get_map().values():
                cast(socket.socket, key.fileobj).close()
    assert failure is not None
    raise failure


def _start_connecting(info: AddressInfo, deadline: float, *, is_small: bool) -> socket.socket:
    with closed_on_error(new_socket(info)) as connecting:
        if is_small and hasattr(socket, "TCP_MAXSEG") and isinstance(info[4], tuple):
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT_SIZE)
        while (code := connecting.connect_ex(info[4])) == errno.EAGAIN:  # the backlog of a Unix socket is full
            sleep(min(UNIX_RETRY_DELAY, seconds_left(deadline)))
        if code not in CONNECT_IN_PROGRESS:
            raise OSError(code, os.strerror(code))
        return connecting


def _finish_connecting(connecting: socket.socket) -> None:
    with closed_on_error(connecting):
        if code := connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        refuse_self_connection(connecting)


def start_tls(endpoint: Endpoint, connected: socket.socket, deadline: float) -> SSLSocket:
    """Return ``connected`` after the TLS handshake. The result does not block."""
    assert endpoint.ssl is not None
    started, name = perf_counter(), endpoint.server_hostname
    with closed_on_error(connected):
        secured = endpoint.ssl.wrap_socket(connected, server_hostname=name, do_handshake_on_connect=False)
    with closed_on_error(secured):
        secured.settimeout(seconds_left(deadline))  # of the whole handshake (docs of SSLSocket)
        secured.do_handshake()
    log_tls(secured, started)
    secured.setblocking(False)
    return secured


def seconds_left(deadline: float) -> float:
    """Return the seconds until the deadline, at most MAX_WAIT; raise TimeoutError if it has passed."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, MAX_WAIT)
