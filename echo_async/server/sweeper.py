"""The periodic timer of the asyncio engines: one for all connections of a server."""

import asyncio

from ..engines.connection import Connection
from .registry import Registry

SLICE = 250  # connections that are checked in one turn of the event loop: at most some 0.5 ms


class Sweeper:
    """Between ``start`` and ``stop``, every connection is checked every ``registry.sweep_interval`` seconds.

    The connections are checked in slices, spread over the interval, so that many of them delay no other event.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._connections: list[Connection] = []  # of this round
        self._checked = 0

    def start(self) -> None:
        slices = max(1, -(-len(self._connections) // SLICE))
        self._timer = self._loop.call_later(self._registry.sweep_interval / slices, self._sweep)

    def stop(self, *_: object) -> None:
        self._connections = []
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self) -> None:
        if self._checked >= len(self._connections):
            self._connections, self._checked = list(self._registry.connections), 0
        now, seconds = self._registry.now(), self._registry.config.timeout_idle
        self._registry.sweep(
            [
                each
                for each in self._connections[self._checked : self._checked + SLICE]
                if each.timeouts is None or not each.timeouts.is_still_idle(each.conversation, now, seconds)
            ]
        )
        self._checked += SLICE
        self.start()
