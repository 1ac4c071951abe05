"""Open a connection: resolve the name, race the addresses, perform the TLS handshake, retry."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from ssl import SSL_ERROR_EOF, SSLEOFError
from time import perf_counter

from ..errors import ConnectError
from ..net import AddressInfo, get_host
from ..resolver import run_resolver
from .connection import ClientConnection
from .endpoint import (
    CONNECTION_ATTEMPT_DELAY,
    UNIX_RETRY_DELAY,
    Endpoint,
    RetrySchedule,
    closed_on_error,
    log_tls,
    new_socket,
    refuse_self_connection,
)

TLS_SHUTDOWN_TIMEOUT = 2.0  # seconds to wait for the close_notify of the server


async def open_connection(endpoint: Endpoint) -> ClientConnection:
    """Connect, with retries."""
    schedule = RetrySchedule(endpoint)
    while True:
        try:
            return await _attempt_connection(endpoint, schedule.timeout)
        except ConnectError as error:
            delay = schedule.next_delay(error)
        await asyncio.sleep(delay)


async def _attempt_connection(endpoint: Endpoint, seconds: float) -> ClientConnection:
    with endpoint.attempt(seconds):
        async with asyncio.timeout(seconds):
            started = perf_counter()
            connected = await _connect(endpoint)
            endpoint.start(connected, started)
            return await _create_connection(endpoint, connected)


async def _create_connection(endpoint: Endpoint, connected: socket.socket) -> ClientConnection:
    """Create the transport, which owns the socket from then on, also when this is canceled."""
    loop, started = asyncio.get_running_loop(), perf_counter()
    create = loop.create_connection if endpoint.config.uds is None else loop.create_unix_connection
    try:
        transport, connection = await create(
            lambda: ClientConnection(endpoint),
            sock=connected,
            ssl=endpoint.ssl,
            server_hostname=endpoint.server_hostname,
            ssl_shutdown_timeout=TLS_SHUTDOWN_TIMEOUT if endpoint.ssl else None,
        )
    except ConnectionError as error:
        if error.errno is None:  # closed during the handshake: the error that the ssl module has for this
            raise SSLEOFError(SSL_ERROR_EOF, "closed by the server") from error
        raise
    if endpoint.ssl is not None:
        log_tls(transport.get_extra_info("ssl_object"), started)
    return connection


async def _connect(endpoint: Endpoint) -> socket.socket:
    if endpoint.config.uds is not None:
        return await _connect_unix(os.fspath(endpoint.config.uds))
    infos = endpoint.numeric or await run_resolver(endpoint.resolve)
    return await _connect_tcp(infos[0]) if len(infos) == 1 else await _race_addresses(infos)


async def _connect_tcp(info: AddressInfo) -> socket.socket:
    loop, address = asyncio.get_running_loop(), info[4]
    if not isinstance(loop, asyncio.BaseEventLoop):  # uvloop drops the scope ID (loop.pyx, sock_connect)
        address = get_host(address), address[1]
    with closed_on_error(new_socket(info)) as connecting:
        await loop.sock_connect(connecting, address)
        refuse_self_connection(connecting)
        return connecting


async def _race_addresses(infos: Sequence[AddressInfo]) -> socket.socket:
    """Connect to the first address that accepts; the next is tried after a delay, or after a failure (RFC 8305)."""
    running: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException | None = None
    waiting = list(infos)
    try:
        while running or waiting:
            if waiting:
                running.add(asyncio.create_task(_connect_tcp(waiting.pop(0))))
            delay = CONNECTION_ATTEMPT_DELAY if waiting else None
            done, running = await asyncio.wait(running, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    done.remove(task)
                    running |= done
                    return task.result()
                failure = failure or task.exception()
    finally:
        for task in running:
            task.cancel()
        for result in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()
    assert failure is not None
    raise failure


async def _connect_unix(path: str) -> socket.socket:
    with closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connecting:
        connecting.setblocking(False)
        while True:
            with contextlib.suppress(BlockingIOError):  # the backlog is full
                connecting.connect(path)
                return connecting
            await asyncio.sleep(UNIX_RETRY_DELAY)
