"""How the asyncio engines accept clients: as the event loop does it, and over TLS one by one.

An event loop's own server tells nobody of a handshake that fails or does not end, so :class:`TlsListener`
accepts by itself: it counts a client from then on, and lets it in when its handshake is done. Half a TLS
connection cannot be closed, so one that is finished is closed as a whole: the transport sends what is left,
and its close_notify, first.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from ..reasons import reason
from .connection import format_address
from .registry import BACK_OFF, CLIENT_GONE, HANDSHAKE_TIMEOUT, LINGER, Registry

__all__ = ["BATCH", "Listener", "Tls", "TlsListener", "restore_backlog"]

# asyncio accepts this many clients before it looks at any of them (it takes its ``backlog`` for both). A few turns'
# worth has to fit into the descriptors that are kept in reserve, or clients that are refused use up the rest.
BATCH = 5


class Listener(Protocol):
    """What accepts clients: an :class:`asyncio.Server`, or a :class:`TlsListener`."""

    def close(self) -> None: ...


class Tls(Protocol):
    """What has the ``context`` for a handshake that begins now."""

    @property
    def context(self) -> ssl.SSLContext: ...


class TlsListener:
    """Accepts clients on ``listener`` until it is closed; ``make_protocol`` makes what serves one."""

    def __init__(
        self,
        registry: Registry,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        tls: Tls,
        make_protocol: Callable[[], asyncio.Protocol],
    ) -> None:
        self._registry = registry
        self._loop = loop
        self._tls = tls
        self._make_protocol = make_protocol
        self._tasks = {loop.create_task(self._accept(listener))}

    def close(self) -> None:
        """Accept no more. A client that is in the middle of its handshake is cut off."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, address = await self._loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in CLIENT_GONE:
                    self._registry.say_cannot_accept(reason(error))
                await asyncio.sleep(0 if error.errno in CLIENT_GONE else BACK_OFF)
                continue
            if self._registry.refuse():
                client.close()
                continue
            self._registry.begin_handshake()
            task = self._loop.create_task(self._handshake(client, format_address(address)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handshake(self, client: socket.socket, peer: str) -> None:
        try:
            await self._loop.connect_accepted_socket(
                self._make_protocol,
                client,
                ssl=self._tls.context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
                ssl_shutdown_timeout=LINGER,
            )
        except ConnectionAbortedError:  # how an event loop says that the time was up
            self._registry.fail_handshake(peer, TimeoutError())
        except (OSError, RuntimeError) as error:
            self._registry.fail_handshake(peer, error)
        except asyncio.CancelledError:
            self._registry.fail_handshake(peer, ConnectionError("the server stops"))
            client.close()


def restore_backlog(listener: socket.socket, registry: Registry) -> None:
    """Let the kernel keep as many clients waiting as was asked for: a loop's server has just made that ``BATCH``."""
    listener.listen(registry.config.backlog)
