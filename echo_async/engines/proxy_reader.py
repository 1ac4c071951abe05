"""How a PROXY header is taken off a socket: exactly, so that an engine, or TLS, finds what comes after it.

The bytes are looked at where they are, in the kernel, and only those that are the header's are taken. So no
engine knows of it, and nothing is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

from ..proxy import ProxyHeader, ProxyHeaderError

__all__ = ["read_header", "receive_header"]

MAX_WAIT = 86_400.0  # seconds: sockets cannot wait as long as options can say
PEEK_SIZE = 4096  # bytes that are looked at in one go


async def read_header(
    loop: asyncio.AbstractEventLoop, client: socket.socket, header: ProxyHeader, seconds: float
) -> None:
    """Take ``header`` off ``client``, which does not block.

    :exc:`ProxyHeaderError` if it is none, :exc:`TimeoutError` if it takes longer, :exc:`OSError` if it is lost.
    """
    async with asyncio.timeout(seconds):
        while not header.finished:
            try:
                _consume(client, header)
            except BlockingIOError:
                await _wait_readable(loop, client)


def receive_header(client: socket.socket, header: ProxyHeader, seconds: float) -> None:
    """The same for a socket that blocks."""
    deadline = time.monotonic() + seconds
    try:
        while not header.finished:
            if (left := deadline - time.monotonic()) <= 0:  # however often a byte comes
                raise TimeoutError
            client.settimeout(min(left, MAX_WAIT))
            with contextlib.suppress(TimeoutError):
                _consume(client, header)
    finally:
        client.settimeout(None)


def _consume(client: socket.socket, header: ProxyHeader) -> None:
    """Take what is there of the header."""
    data = client.recv(PEEK_SIZE, socket.MSG_PEEK)
    if data:
        client.recv(header.feed(data))
    elif header.received:
        raise ProxyHeaderError(f"its PROXY header ended after {header.received} bytes")
    else:
        raise ConnectionError("the client left without a word")


async def _wait_readable(loop: asyncio.AbstractEventLoop, client: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(client, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(client)
