"""Waits for sockets: epoll, or poll where the system has none. ``selectors`` would translate every event."""

import select
from collections.abc import Callable, Sequence

READ, WRITE = select.POLLIN, select.POLLOUT  # for epoll as well

Callback = Callable[[], object]


class Poller:
    """Waits for many sockets.

    Attributes:
        callbacks: The function to call for each descriptor that is ready.
        poll: Waits at most a number of seconds; returns the descriptors that are ready, each with its events.
    """

    def __init__(self) -> None:
        self.callbacks: dict[int, Callback] = {}
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poller = self._epoll or select.poll()
        self.poll: Callable[[float], Sequence[tuple[int, int]]] = self._poller.poll if self._epoll else self._poll

    def _poll(self, timeout: float) -> Sequence[tuple[int, int]]:
        return self._poller.poll(1e3 * timeout)

    def register(self, descriptor: int, events: int, callback: Callback) -> None:
        """Wait for ``events``, which are READ or WRITE or both, and for errors."""
        self._poller.register(descriptor, events)
        self.callbacks[descriptor] = callback

    def modify(self, descriptor: int, events: int, callback: Callback) -> None:
        self._poller.modify(descriptor, events)
        self.callbacks[descriptor] = callback

    def unregister(self, descriptor: int) -> None:
        self._poller.unregister(descriptor)
        del self.callbacks[descriptor]

    def fileno(self) -> int:
        """Return a descriptor that is readable while any other is ready; -1 if there is none."""
        return self._epoll.fileno() if self._epoll else -1

    def close(self) -> None:
        if self._epoll:
            self._epoll.close()
