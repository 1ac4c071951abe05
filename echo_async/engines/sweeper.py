"""The periodic timer of the asyncio engines: one for all connections of a server."""

import asyncio

from .registry import Registry


class Sweeper:
    """Between ``start`` and ``stop``, ``registry.sweep()`` runs every ``registry.sweep_interval`` seconds."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = self._loop.call_later(self._registry.sweep_interval, self._sweep)

    def stop(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self) -> None:
        self._registry.sweep()
        self.start()
