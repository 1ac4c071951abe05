"""Open a connection: resolve the name, race the addresses, perform the TLS handshake, retry.

Every wait has a deadline, except that of the resolver, which has its own.
"""

import errno
import os
import socket
from selectors import EVENT_WRITE
from ssl import SSLContext, SSLSocket
from time import monotonic, perf_counter, sleep
from typing import cast

from ..client.endpoint import (
    CONNECTION_ATTEMPT_DELAY,
    UNIX_RETRY_DELAY,
    Endpoint,
    RetrySchedule,
    closed_on_error,
    log_tls,
    new_socket,
    refuse_self_connection,
)
from ..compat import CONNECT_IN_PROGRESS, PollSelector
from ..errors import ConnectError
from ..net import AddressInfo
from .connection import MAX_WAIT, BlockingConnection


def open_connection(endpoint: Endpoint) -> BlockingConnection:
    """Connect, with retries."""
    schedule = RetrySchedule(endpoint)
    while True:
        try:
            return _attempt_connection(endpoint, schedule.timeout)
        except ConnectError as error:
            delay = schedule.next_delay(error)
        sleep(delay)


def _attempt_connection(endpoint: Endpoint, seconds: float) -> BlockingConnection:
    with endpoint.attempt(seconds):
        started, deadline = perf_counter(), monotonic() + seconds
        connected = _connect(endpoint, deadline)
        endpoint.start(connected, started)
        if endpoint.ssl is not None:
            connected = _start_tls(endpoint, endpoint.ssl, connected, deadline)
        return BlockingConnection(endpoint, connected)


def _connect(endpoint: Endpoint, deadline: float) -> socket.socket:
    if endpoint.config.uds is not None:
        return _connect_unix(os.fspath(endpoint.config.uds), deadline)
    return _race_addresses(list(endpoint.numeric or endpoint.resolve()), deadline)


def _connect_unix(path: str, deadline: float) -> socket.socket:
    with closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connecting:
        connecting.setblocking(False)
        while (code := connecting.connect_ex(path)) == errno.EAGAIN:  # the backlog is full
            sleep(min(UNIX_RETRY_DELAY, _seconds_left(deadline)))
        if code:
            raise OSError(code, os.strerror(code))
        return connecting


def _race_addresses(waiting: list[AddressInfo], deadline: float) -> socket.socket:
    """Connect to the first address that accepts; the next is tried after a delay, or after a failure (RFC 8305)."""
    failure: OSError | None = None
    running: set[socket.socket] = set()
    selector = PollSelector()
    try:
        while running or waiting:
            if waiting:
                try:
                    connecting = _start_connecting(waiting.pop(0))
                except OSError as error:
                    failure = failure or error
                    continue
                running.add(connecting)
                selector.register(connecting, EVENT_WRITE)
            left = _seconds_left(deadline)
            for key, _ in selector.select(min(left, CONNECTION_ATTEMPT_DELAY) if waiting else left):
                connecting = cast(socket.socket, key.fileobj)
                selector.unregister(connecting)
                running.remove(connecting)
                try:
                    _finish_connecting(connecting)
                    return connecting
                except OSError as error:
                    connecting.close()
                    failure = failure or error
    finally:
        for connecting in running:
            connecting.close()
    assert failure is not None
    raise failure


def _start_connecting(info: AddressInfo) -> socket.socket:
    with closed_on_error(new_socket(info)) as connecting:
        code = connecting.connect_ex(info[4])
        if code not in CONNECT_IN_PROGRESS:
            raise OSError(code, os.strerror(code))
        return connecting


def _finish_connecting(connecting: socket.socket) -> None:
    if code := connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))
    refuse_self_connection(connecting)


def _start_tls(endpoint: Endpoint, context: SSLContext, connected: socket.socket, deadline: float) -> SSLSocket:
    started, name = perf_counter(), endpoint.server_hostname
    with closed_on_error(connected):
        secured = context.wrap_socket(connected, server_hostname=name, do_handshake_on_connect=False)
    with closed_on_error(secured):
        secured.settimeout(_seconds_left(deadline))  # of the whole handshake (docs of SSLSocket)
        secured.do_handshake()
        secured.setblocking(False)
    log_tls(secured, started)
    return secured


def _seconds_left(deadline: float) -> float:
    """Return the seconds until the deadline, at most MAX_WAIT; raise TimeoutError if it has passed."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, MAX_WAIT)
