"""Reads the PROXY header that precedes a connection.

It is peeked at first, and then consumed. What follows it stays in the kernel, for an engine or TLS.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..wire.proxy import ProxyHeader, ProxyHeaderError

if TYPE_CHECKING:
    import asyncio

MAX_WAIT = 86_400.0  # seconds: socket timeouts are limited, options are not
PEEK_SIZE = 4096  # bytes


class ClosedBeforeInput(ConnectionError):
    """The peer has closed or reset the connection, and has sent nothing: a port scan, or a health check."""


async def read_header(
    loop: asyncio.AbstractEventLoop, connected: socket.socket, header: ProxyHeader, seconds: float
) -> ProxyHeader:
    """Read ``header``, which is returned, from a socket that does not block, within ``seconds``.

    :exc:`ProxyHeaderError` if it is invalid, :exc:`TimeoutError`, :exc:`ClosedBeforeInput`.
    """
    from asyncio import timeout  # a server on threads imports no asyncio

    with _peer_errors(header):
        async with timeout(seconds):
            while not header.finished:
                try:
                    _feed_header(connected, header)
                except BlockingIOError:  # not every event loop can wait for a byte without receiving it
                    _feed_header(connected, header, await loop.sock_recv(connected, 1))
    return header


def receive_header(connected: socket.socket, header: ProxyHeader, seconds: float) -> ProxyHeader:
    """The same for a socket that blocks."""
    deadline = time.monotonic() + seconds
    try:
        while not header.finished:
            if (left := deadline - time.monotonic()) <= 0:  # however often a byte arrives
                raise TimeoutError
            connected.settimeout(min(left, MAX_WAIT))
            with contextlib.suppress(TimeoutError), _peer_errors(header):
                _feed_header(connected, header)
    finally:
        connected.settimeout(None)
    return header


def _feed_header(connected: socket.socket, header: ProxyHeader, received: bytes = b"") -> None:
    """Feed ``received`` and what waits in the kernel to ``header``; receive the part that belongs to it."""
    with contextlib.suppress(*[OSError] if received else []):
        data = received
        data += connected.recv(PEEK_SIZE, socket.MSG_PEEK)
    if not data:
        raise ConnectionError("closed by the peer")
    connected.recv(header.feed(data) - len(received))


@contextlib.contextmanager
def _peer_errors(header: ProxyHeader) -> Iterator[None]:
    """Distinguish a connection that is lost within ``header`` from one that is lost before any input."""
    try:
        yield
    except ConnectionError as error:
        if header.received:
            raise ProxyHeaderError(f"truncated after {header.received} bytes") from error
        raise ClosedBeforeInput(*error.args) from error
