"""Accepts connections that have to send a PROXY header or complete a TLS handshake first.

An event loop's own server reports no handshake that fails or does not end. So this one accepts, and counts a
connection as pending until it is established. A TLS connection cannot be half-closed: at its end the transport
sends what is left, then its close_notify.
"""

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from ..net import format_address
from ..proxy import ProxyHeaderError
from ..tls import Certificates
from .admission import ACCEPT_ABORTED, ACCEPT_RETRY_DELAY, HANDSHAKE_TIMEOUT, SHUTTING_DOWN, Admission
from .context import LINGER_TIMEOUT
from .proxy_reader import read_header

Establish = Callable[[], bool]
"""Called once a connection has its transport. Returns whether to serve it."""

ProtocolFactory = Callable[[Establish, object], asyncio.Protocol]
"""Makes the protocol of a connection, which calls the first argument. The second is the peer's address."""


class HandshakeAcceptor:
    """Accepts connections on ``listener`` until it is closed."""

    def __init__(
        self,
        admission: Admission,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        certificates: Certificates | None,
        make_protocol: ProtocolFactory,
    ) -> None:
        self._admission = admission
        self._loop = loop
        self._make_protocol = make_protocol
        self._certificates = certificates
        self._tasks = {loop.create_task(self._accept(listener))}

    def close(self) -> None:
        """Accept no more, and abort what is pending."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = await self._loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in ACCEPT_ABORTED:
                    self._admission.log_accept_error(error)
                await asyncio.sleep(0 if error.errno in ACCEPT_ABORTED else ACCEPT_RETRY_DELAY)
                continue
            if not self._admission.admit(address):
                connection.close()
                continue
            self._admission.begin_handshake()
            task = self._loop.create_task(self._establish(connection, address))
            self._tasks.add(task)
            task.add_done_callback(partial(self._on_done, connection))

    def _on_done(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # before it ran at all
            self._admission.end_handshake()
            connection.close()

    async def _establish(self, connection: socket.socket, peername: object) -> None:
        if self._admission.expects_header:
            header = self._admission.new_header()
            try:
                await read_header(self._loop, connection, header, self._admission.config.timeout_message)
            except asyncio.CancelledError:
                return self._fail_header(connection, peername, SHUTTING_DOWN)
            except (ProxyHeaderError, OSError) as error:
                return self._fail_header(connection, peername, error)
            peername = header.source or peername
        await self._connect_transport(connection, peername)

    def _fail_header(self, connection: socket.socket, peername: object, error: Exception) -> None:
        self._admission.fail_header(format_address(peername), error)
        connection.close()

    async def _connect_transport(self, connection: socket.socket, peername: object) -> None:
        tls: dict[str, Any] = {}
        is_established = False

        def establish() -> bool:
            nonlocal is_established
            is_established = True
            self._admission.end_handshake()
            return True

        if self._certificates is None:  # takes no time: a shutdown does not cancel it
            self._tasks.discard(cast(asyncio.Task[None], asyncio.current_task()))
        else:
            tls = {
                "ssl": self._certificates.context,
                "ssl_handshake_timeout": HANDSHAKE_TIMEOUT,
                "ssl_shutdown_timeout": LINGER_TIMEOUT,
            }
        make_protocol = partial(self._make_protocol, establish, peername)
        try:
            await self._loop.connect_accepted_socket(make_protocol, connection, **tls)
        except ConnectionAbortedError:  # ssl_handshake_timeout
            self._admission.fail_handshake(format_address(peername), TimeoutError())
        except (OSError, RuntimeError) as error:
            self._admission.fail_handshake(format_address(peername), error)
        except asyncio.CancelledError:
            if not is_established:  # else the shutdown drains it with the others
                self._admission.fail_handshake(format_address(peername), SHUTTING_DOWN)
                connection.close()
