"""Open a connection: resolve the name, race the addresses, perform the TLS handshake, retry.

Every wait has a deadline, except that of the resolver, which has its own.
"""

import errno
import os
import socket
from contextlib import ExitStack
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector
from ssl import SSLContext, SSLSocket, SSLWantReadError, SSLWantWriteError
from time import monotonic, perf_counter, sleep
from typing import cast

from ..client.endpoint import (
    CONNECTION_ATTEMPT_DELAY,
    UNIX_RETRY_DELAY,
    Endpoint,
    RetrySchedule,
    log,
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
            if delay is None:
                raise
        sleep(delay)


def _attempt_connection(endpoint: Endpoint, seconds: float) -> BlockingConnection:
    started, deadline = perf_counter(), monotonic() + seconds
    log.debug("connecting to %s", endpoint.name)
    try:
        connected = _connect(endpoint, deadline)
        endpoint.send_proxy_header(connected)
        log.debug("connected to %s in %.3f ms", endpoint.name, 1e3 * (perf_counter() - started))
        if endpoint.ssl is not None:
            connected = _start_tls(endpoint, endpoint.ssl, connected, deadline)
        return BlockingConnection(endpoint, connected)
    except (OSError, UnicodeError) as error:
        raise endpoint.connect_error(error, seconds) from error


def _connect(endpoint: Endpoint, deadline: float) -> socket.socket:
    if endpoint.config.uds is not None:
        return _connect_unix(os.fspath(endpoint.config.uds), deadline)
    return _race_addresses(list(endpoint.numeric or endpoint.resolve()), deadline)


def _connect_unix(path: str, deadline: float) -> socket.socket:
    with ExitStack() as on_error:
        connecting = on_error.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connecting.setblocking(False)
        while (code := connecting.connect_ex(path)) == errno.EAGAIN:  # the backlog is full
            if monotonic() >= deadline:
                raise TimeoutError
            sleep(UNIX_RETRY_DELAY)
        if code:
            raise OSError(code, os.strerror(code))
        on_error.pop_all()
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
            for connecting in _wait(selector, deadline, CONNECTION_ATTEMPT_DELAY if waiting else MAX_WAIT):
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
    with ExitStack() as on_error:
        connecting = on_error.enter_context(new_socket(info))
        code = connecting.connect_ex(info[4])
        if code not in CONNECT_IN_PROGRESS:
            raise OSError(code, os.strerror(code))
        on_error.pop_all()
        return connecting


def _finish_connecting(connecting: socket.socket) -> None:
    if code := connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(code, os.strerror(code))
    refuse_self_connection(connecting)


def _start_tls(endpoint: Endpoint, context: SSLContext, connected: socket.socket, deadline: float) -> SSLSocket:
    started, selector = perf_counter(), PollSelector()
    with ExitStack() as on_error:
        on_error.enter_context(connected)
        name = endpoint.server_hostname
        secured = context.wrap_socket(connected, server_hostname=name, do_handshake_on_connect=False)
        on_error.enter_context(secured)
        while (event := _continue_handshake(secured)) is not None:
            selector.register(secured, event)
            _wait(selector, deadline, MAX_WAIT)
            selector.unregister(secured)
        on_error.pop_all()
    log_tls(secured, started)
    return secured


def _continue_handshake(secured: SSLSocket) -> int | None:
    """Return the event that the handshake waits for; None if it is complete."""
    try:
        secured.do_handshake()
    except SSLWantReadError:
        return EVENT_READ
    except SSLWantWriteError:
        return EVENT_WRITE
    return None


def _wait(selector: BaseSelector, deadline: float, seconds: float) -> list[socket.socket]:
    """Return the sockets that are ready, waiting at most ``seconds``; raise TimeoutError at the deadline."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return [cast(socket.socket, key.fileobj) for key, _ in selector.select(min(left, seconds))]
