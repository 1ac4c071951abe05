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
            except BlockingIOError:
                await _wait_readable(loop, connected)


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


def _consume(connected: socket.socket, header: ProxyHeader) -> None:
    data = connected.recv(PEEK_SIZE, socket.MSG_PEEK)
    if data:
        connected.recv(header.feed(data))
    elif header.received:
        raise ProxyHeaderError(f"truncated after {header.received} bytes")
    else:
        raise ConnectionError("closed by the peer")


async def _wait_readable(loop: asyncio.AbstractEventLoop, connected: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(connected, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connected)
