"""How the asyncio engines accept clients: as the event loop does it, and one by one where they are not let in at once.

An event loop's own server tells nobody of a handshake that fails or does not end, so :class:`HandshakeAcceptor`
accepts by itself: it counts a client from then on, and lets it in when its PROXY header has come and its TLS
handshake is done, whichever of them is asked for. Half a TLS connection cannot be closed, so one that is
finished is closed as a whole: the transport sends what is left, and its close_notify, first.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from ..errors import describe_error
from ..net import format_address
from ..proxy import ProxyHeaderError, Source
from .proxy_reader import read_header
from .registry import ACCEPT_ABORTED, ACCEPT_RETRY_DELAY, HANDSHAKE_TIMEOUT, LINGER_TIMEOUT, Registry

__all__ = ["ACCEPT_BATCH", "HandshakeAcceptor", "Listener", "OnEstablished", "Tls", "start_accepting"]

OnEstablished = Callable[[], None]
"""Says that a client's connection is made: from now on it is one of those that are in."""

# asyncio accepts this many clients before it looks at any of them (it takes its ``backlog`` for both). A few turns'
# worth has to fit into the descriptors that are kept in reserve, or clients that are refused use up the rest.
ACCEPT_BATCH = 5


class Listener(Protocol):
    """What accepts clients: an :class:`asyncio.Server`, or a :class:`HandshakeAcceptor`."""

    def close(self) -> None: ...


class Tls(Protocol):
    """What has the ``context`` for a handshake that begins now."""

    @property
    def context(self) -> ssl.SSLContext: ...


class HandshakeAcceptor:
    """Accepts clients on ``listener`` until it is closed; ``make_protocol`` makes what serves one.

    It is told where the client comes from, if a PROXY header says so, and what to call once it has the connection.
    """

    def __init__(
        self,
        registry: Registry,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        tls: Tls | None,
        make_protocol: Callable[[Source, OnEstablished], asyncio.Protocol],
    ) -> None:
        self._registry = registry
        self._loop = loop
        self._make_protocol = make_protocol
        self._tls = tls
        self._tasks = {loop.create_task(self._accept(listener))}

    def close(self) -> None:
        """Accept no more. A client that is in the middle of its header or handshake is cut off."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, address = await self._loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in ACCEPT_ABORTED:
                    self._registry.log_accept_error(describe_error(error))
                await asyncio.sleep(0 if error.errno in ACCEPT_ABORTED else ACCEPT_RETRY_DELAY)
                continue
            if self._registry.refuse() or not self._registry.is_allowed(address):
                client.close()
                continue
            self._registry.begin_handshake()
            task = self._loop.create_task(self._establish(client, format_address(address)))
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, client))

    def _ended(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # before it had begun: it never knew
            self._registry.end_handshake()
            client.close()

    async def _establish(self, client: socket.socket, peer: str) -> None:
        source: Source = None
        if self._registry.expects_header:
            header = self._registry.new_header()
            try:
                await read_header(self._loop, client, header, self._registry.config.timeout_message)
            except (ProxyHeaderError, OSError, asyncio.CancelledError) as error:
                self._registry.fail_header(peer, error)
                return client.close()
            source = header.source
        await self._connect_transport(client, source, peer if source is None else format_address(source))

    async def _connect_transport(self, client: socket.socket, source: Source, peer: str) -> None:
        tls: dict[str, Any] = {}
        is_established = False

        def on_established() -> None:
            nonlocal is_established
            is_established = True
            self._registry.end_handshake()

        if self._tls is None:  # it takes no time: a stop does not cut it off
            self._tasks.discard(cast(asyncio.Task[None], asyncio.current_task()))
        else:
            tls = {
                "ssl": self._tls.context,
                "ssl_handshake_timeout": HANDSHAKE_TIMEOUT,
                "ssl_shutdown_timeout": LINGER_TIMEOUT,
            }
        try:
            await self._loop.connect_accepted_socket(
                partial(self._make_protocol, source, on_established), client, **tls
            )
        except ConnectionAbortedError:  # how an event loop says that the time was up
            self._registry.fail_handshake(peer, TimeoutError())
        except (OSError, RuntimeError) as error:
            self._registry.fail_handshake(peer, error)
        except asyncio.CancelledError:
            if not is_established:  # else it is the server's to end, as all that are in
                self._registry.fail_handshake(peer, ConnectionError("the server stops"))
                client.close()


async def start_accepting(server: asyncio.Server, listener: socket.socket, registry: Registry) -> asyncio.Server:
    """Let ``server`` accept the clients of ``listener``; if that is cancelled, it is closed."""
    try:
        await server.start_serving()
    except BaseException:
        server.close()
        raise
    listener.listen(registry.config.backlog)  # as many as were asked for: a loop's server makes that ``ACCEPT_BATCH``
    return server
