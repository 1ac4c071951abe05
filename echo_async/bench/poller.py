"""Waits for sockets. On Linux it uses epoll itself, because ``selectors`` translates every event."""

import select
import selectors
from collections.abc import Callable, Sequence
from selectors import EVENT_READ, EVENT_WRITE

MAX_EVENTS = 256  # of one call

Callback = Callable[[], object]


class SelectorPoller:
    """A poller for every system. ``callbacks`` has the function to call for each descriptor that is ready."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callback] = {}
        self._selector = selectors.DefaultSelector()

    def register(self, descriptor: int, events: int, callback: Callback) -> None:
        """Wait for ``events``, which are EVENT_READ or EVENT_WRITE or both, and for errors."""
        self._selector.register(descriptor, events)
        self.callbacks[descriptor] = callback

    def modify(self, descriptor: int, events: int, callback: Callback) -> None:
        self._selector.modify(descriptor, events)
        self.callbacks[descriptor] = callback

    def unregister(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)
        del self.callbacks[descriptor]

    def poll(self, timeout: float) -> Sequence[tuple[int, int]]:
        """Wait at most ``timeout`` seconds; return the descriptors that are ready, each with its events."""
        return [(key.fd, events) for key, events in self._selector.select(timeout)]

    def fileno(self) -> int:
        """Return a descriptor that is readable while any other is ready; -1 if there is none."""
        return int(getattr(self._selector, "fileno", lambda: -1)())  # select.select and poll have none

    def close(self) -> None:
        self._selector.close()


class EpollPoller:
    """A poller for Linux, with the same methods."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callback] = {}
        self._epoll = select.epoll()

    def register(self, descriptor: int, events: int, callback: Callback) -> None:
        self._epoll.register(descriptor, _epoll_events(events))
        self.callbacks[descriptor] = callback

    def modify(self, descriptor: int, events: int, callback: Callback) -> None:
        self._epoll.modify(descriptor, _epoll_events(events))
        self.callbacks[descriptor] = callback

    def unregister(self, descriptor: int) -> None:
        self._epoll.unregister(descriptor)
        del self.callbacks[descriptor]

    def poll(self, timeout: float) -> Sequence[tuple[int, int]]:
        return self._epoll.poll(timeout, MAX_EVENTS)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()


def _epoll_events(events: int) -> int:
    return (select.EPOLLIN if events & EVENT_READ else 0) | (select.EPOLLOUT if events & EVENT_WRITE else 0)


Poller = EpollPoller | SelectorPoller


def make_poller() -> Poller:
    return EpollPoller() if hasattr(select, "epoll") else SelectorPoller()
