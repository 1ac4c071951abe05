"""A session whose connections are those of an event loop, and how these are opened."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from ssl import SSL_ERROR_EOF, SSLEOFError
from time import perf_counter
from typing import Self

from ..background import start_resolver
from ..net import AddressInfo, get_host
from .connection import ClientConnection
from .endpoint import (
    CONNECTION_ATTEMPT_DELAY,
    UNIX_RETRY_DELAY,
    Endpoint,
    closed_on_error,
    log_tls,
    new_socket,
    refuse_self_connection,
)
from .session import Session

TLS_SHUTDOWN_TIMEOUT = 2.0  # seconds to wait for the close_notify of the server


class AsyncioSession(Session[ClientConnection]):
    """A session in the running event loop; several tasks can use it."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint.name, asyncio.Lock())
        self._endpoint = endpoint
        self._connections: set[ClientConnection] = set()  # those whose sockets are not closed yet

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
        await self.wait_closed()

    async def wait_closed(self) -> None:
        if self._connections:
            await asyncio.wait([connection.closed for connection in self._connections])

    async def _open(self) -> ClientConnection:
        connection = await self._endpoint.connect(self._attempt, asyncio.sleep)
        self._connections.add(connection)
        connection.closed.add_done_callback(lambda _: self._connections.discard(connection))
        return connection

    async def _attempt(self, seconds: float) -> ClientConnection:
        async with asyncio.timeout(seconds):
            started = perf_counter()
            connected = await _connect(self._endpoint)
            self._endpoint.start(connected, started)
            return await _create_connection(self._endpoint, connected)


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
    infos = endpoint.numeric or await asyncio.wrap_future(start_resolver(endpoint.resolve))
    return await _connect_address(infos[0]) if len(infos) == 1 else await _race_addresses(infos)


async def _connect_address(info: AddressInfo) -> socket.socket:
    loop, address = asyncio.get_running_loop(), info[4]
    with closed_on_error(new_socket(info)) as connecting:
        if isinstance(address, tuple):
            if not isinstance(loop, asyncio.BaseEventLoop):  # uvloop drops the scope ID (loop.pyx, sock_connect)
                address = get_host(address), address[1]
            await loop.sock_connect(connecting, address)
            refuse_self_connection(connecting)
            return connecting
        while True:
            with suppress(BlockingIOError):  # the backlog of a Unix socket is full
                connecting.connect(address)
                return connecting
            await asyncio.sleep(UNIX_RETRY_DELAY)


async def _race_addresses(infos: Sequence[AddressInfo]) -> socket.socket:
    """Connect to the first address that accepts; the next is tried after a delay, or after a failure (RFC 8305)."""
    running: set[asyncio.Task[socket.socket]] = set()
    failure: BaseException | None = None
    waiting = list(infos)
    try:
        while running or waiting:
            if waiting:
                running.add(asyncio.create_task(_connect_address(waiting.pop(0))))
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
