"""Takes a PROXY header off a socket, and no byte more: an engine, or TLS, finds what follows it in the kernel.

The header is peeked at first, and then consumed.
"""

import asyncio
import contextlib
import socket
import time

from ..proxy import ProxyHeader, ProxyHeaderError

MAX_WAIT = 86_400.0  # seconds: socket timeouts are limited, options are not
PEEK_SIZE = 4096  # bytes


async def read_header(
    loop: asyncio.AbstractEventLoop, connected: socket.socket, header: ProxyHeader, seconds: float
) -> None:
    """Read ``header`` from a socket that does not block, within ``seconds``.

    :exc:`ProxyHeaderError` if it is invalid, :exc:`TimeoutError`, :exc:`OSError` if the connection is lost.
    """
    async with asyncio.timeout(seconds):
        while not header.finished:
            try:
                _consume(connected, header)
            except BlockingIOError:  # not every event loop can wait for a byte without receiving it
                _consume(connected, header, await loop.sock_recv(connected, 1))


def receive_header(connected: socket.socket, header: ProxyHeader, seconds: float) -> None:
    """The same for a socket that blocks."""
    deadline = time.monotonic() + seconds
    try:
        while not header.finished:
            if (left := deadline - time.monotonic()) <= 0:  # however often a byte arrives
                raise TimeoutError
            connected.settimeout(min(left, MAX_WAIT))
            with contextlib.suppress(TimeoutError):
                _consume(connected, header)
    finally:
        connected.settimeout(None)


def _consume(connected: socket.socket, header: ProxyHeader, received: bytes = b"") -> None:
    """Feed ``received`` and what waits in the kernel to ``header``; receive the part that belongs to it."""
    with contextlib.suppress(*[BlockingIOError] if received else []):
        data = received
        data += connected.recv(PEEK_SIZE, socket.MSG_PEEK)
    if data:
        connected.recv(header.feed(data) - len(received))
    elif header.received:
        raise ProxyHeaderError(f"truncated after {header.received} bytes")
    else:
        raise ConnectionError("closed by the peer")
