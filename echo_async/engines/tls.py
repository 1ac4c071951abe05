"""Clients over TLS: accepted one by one, counted from then on, and let in when their handshake is done.

An event loop's own server tells nobody of a handshake that fails or does not end; this one counts both.
Half a TLS connection cannot be closed, so a connection that is finished is closed as a whole: the
transport sends what is left, and its close_notify, first.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from .connection import format_address
from .registry import BACK_OFF, EXHAUSTED, HANDSHAKE_TIMEOUT, LINGER, Registry

__all__ = ["Listener", "TlsListener"]


class Listener(Protocol):
    """What accepts clients: an :class:`asyncio.Server`, or a :class:`TlsListener`."""

    def close(self) -> None: ...


class TlsListener:
    """Accepts clients on ``listener`` until it is closed; ``make_protocol`` makes what serves one."""

    def __init__(
        self,
        registry: Registry,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        context: ssl.SSLContext,
        make_protocol: Callable[[], asyncio.Protocol],
    ) -> None:
        self._registry = registry
        self._loop = loop
        self._context = context
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
                if error.errno in EXHAUSTED:
                    self._registry.say_exhausted(error.strerror)
                    await asyncio.sleep(BACK_OFF)
                continue  # else: that client is gone already
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
                ssl=self._context,
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
