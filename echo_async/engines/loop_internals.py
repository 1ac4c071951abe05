"""What relies on the internals of event loops: CPython 3.11 to 3.15, Lib/asyncio; uvloop 0.22 and 0.23."""

import asyncio
import contextlib
import socket
import sys
from typing import cast

from ..compat import set_reset_on_close

ACCEPT_BATCH = 5
"""The backlog that an event loop's server is created with.

asyncio accepts as many connections before it looks at any of them (selector_events.py, ``_accept_connection``:
``for _ in range(backlog)``; one more from 3.14 on). A few turns' worth has to fit into the reserved descriptors, or
connections that are refused use up the rest.
"""

TRANSPORT_ERRORS = (OSError, RuntimeError)
"""A lost connection. uvloop raises RuntimeError for a closed transport (handles/handle.pyx, ``_ensure_alive``)."""

# Turns of the loop, with a margin, until:
ACCEPT_TURNS = 10
"""an accepted connection has its transport, and what it sent was read.

asyncio: maybe a task (selector_events.py, ``_accept_connection2``), then ``call_soon`` for ``connection_made`` and for
``_add_reader`` (``_SelectorSocketTransport.__init__``), then a select. uvloop: streamserver.pyx, ``_on_listen``.
"""
ABORT_TURNS = 10
"""an aborted transport has called ``connection_lost``, and the task of the connection has ended.

asyncio: ``call_soon`` (selector_events.py, ``_force_close``). uvloop: after ``uv_close`` has called back
(handles/handle.pyx, ``__uv_close_handle_cb``).
"""
READ_AHEAD_TURNS = 3
"""bytes that wait in the kernel are in a ChunkReader that was emptied.

It resumes reading, and the next select finds them. So does a StreamReader (asyncio: streams.py, ``StreamReader.read``).
"""


KEPT_MEMORY = 6 * 1024 * 1024
"""Bytes of freed memory at the end of the heap that glibc keeps.

uvloop allocates the bytes of a read, up to 256,000 (loop.pxd, ``UV_STREAM_RECV_BUF_SIZE``), asyncio 256 KiB
(selector_events.py, ``max_size``). glibc keeps some 500 KB: it would return the memory of a large message to the
kernel and request it again for the next one, 256 pages for 1 MiB, which take longer to map than to read and send it.
"""


def keep_freed_memory() -> None:
    """Let glibc keep ``KEPT_MEMORY`` bytes. Other allocators are not affected.

    Its thresholds are dynamic: freeing a mapped block raises that of trimming the heap to twice the size of the block
    (mallopt(3), M_MMAP_THRESHOLD).
    """
    bytes(KEPT_MEMORY // 2)


async def run_turns(count: int) -> None:
    """Let the event loop run ``count`` times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def start_serving(server: asyncio.Server, listener: socket.socket, backlog: int) -> asyncio.Server:
    """Let ``server`` accept the connections of ``listener``; close it if this is canceled.

    A server calls ``listen`` with the backlog it was created with (base_events.py, ``Server._start_serving``), which
    is ``ACCEPT_BATCH`` here: listen again with the configured one.
    """
    try:
        await server.start_serving()
    except BaseException:
        server.close()
        raise
    listener.listen(backlog)
    return server


def make_transport(
    loop: asyncio.SelectorEventLoop, connected: socket.socket, protocol: asyncio.Protocol, peername: object
) -> None:
    """Let ``protocol`` serve an accepted connection.

    A server of asyncio does this in a task, which only waits until ``connection_made`` was called
    (selector_events.py, ``_accept_connection2``).
    """
    connected.setblocking(False)
    loop._make_socket_transport(connected, protocol, extra={"peername": peername})  # type: ignore[attr-defined]


async def stop_accepting(loop: asyncio.AbstractEventLoop, listeners: tuple[socket.socket, ...]) -> None:
    """Accept no more, and wait until what was accepted is established: the servers can be closed then.

    asyncio resets a connection that is accepted and has no transport yet when its server is closed (base_events.py,
    ``Server._attach`` asserts that it is open). uvloop refuses ``remove_reader`` for a descriptor with a transport,
    and has no such gap.
    """
    for listener in listeners:
        with contextlib.suppress(RuntimeError):
            loop.remove_reader(listener)
    await run_turns(ACCEPT_TURNS)


def is_fed_by(reader: asyncio.StreamReader, transport: asyncio.WriteTransport) -> bool:
    """Whether ``reader`` gets what ``transport`` receives, and nobody changes it on the way.

    asyncio: streams.py, ``StreamReaderProtocol._stream_reader``.
    """
    protocol = transport.get_protocol()
    return (
        type(reader) is asyncio.StreamReader
        and type(protocol) is asyncio.StreamReaderProtocol
        and getattr(protocol, "_stream_reader", None) is reader
    )


def read_buffered(reader: asyncio.StreamReader) -> bytes:
    """Return what ``reader`` has buffered, without waiting: ``read`` is suspended only if that is nothing."""
    reading = reader.read(sys.maxsize)
    try:
        reading.send(None)
    except StopIteration as finished:
        return cast(bytes, finished.value)
    finally:
        reading.close()
    return b""


def write_buffer_size(transport: asyncio.WriteTransport) -> int:
    """Return the bytes that the operating system has not taken yet; 0 if ``transport`` is closed.

    A TLS transport of asyncio that was closed twice has no protocol, and then no buffer (sslproto.py,
    ``_SSLProtocolTransport.close``): asking for its size raises AttributeError.
    """
    try:
        return transport.get_write_buffer_size()
    except AttributeError:
        return 0


def abort_transport(transport: asyncio.WriteTransport, *, reset: bool = False) -> None:
    """Abort ``transport``, with a reset if ``reset`` is true. Else its socket is shut down: see :func:`.net.shut_down`.

    A transport of asyncio that was closed with unsent data has no event loop once that is sent (selector_events.py,
    ``_write_ready`` calls ``_call_connection_lost``): aborting it raises AttributeError.
    """
    with contextlib.suppress(OSError, AttributeError):  # it is lost: asyncio has a closed socket then, uvloop none
        connected = transport.get_extra_info("socket")
        if reset:
            set_reset_on_close(connected)
        elif not transport.is_closing():  # by a duplicate: uvloop's socket does not allow it (pseudosock.pyx)
            with socket.fromfd(connected.fileno(), socket.AF_INET, socket.SOCK_STREAM) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(AttributeError):
        transport.abort()
