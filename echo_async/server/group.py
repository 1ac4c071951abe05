"""Several listeners in one process: one server each, and one object that starts, counts and ends all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Generic, NamedTuple, Self, TypeVar

from ..config import ServerConfig
from ..net import Address, format_address
from ..stats import Stats
from .admission import max_connections
from .listeners import Listeners
from .server import BaseServer, EchoServer, bind

S = TypeVar("S", bound=BaseServer)

LISTENER_DESCRIPTORS = 8  # of a listener besides its connections: sockets, and selectors of the threads engine

UDP_DESCRIPTORS = 4  # of a listener that answers datagrams as well


class ListenerConfig(NamedTuple):
    """The configuration of one listener, and the inherited sockets that it serves instead of its own address."""

    config: ServerConfig
    descriptors: Sequence[int] = ()


class BaseGroup(Generic[S]):
    """One server per listener, with the methods of a server; in this process or, as a supervisor has it, in others."""

    def __init__(self, servers: Sequence[S]) -> None:
        self.servers = servers
        self.listener_names = [format_address(each.addresses[0]) for each in servers]
        """The first address of each listener, formatted."""

    @property
    def addresses(self) -> list[Address]:
        """Host and port, or Unix socket path, of every listening socket."""
        return [address for each in self.servers for address in each.addresses]

    @property
    def has_certificates(self) -> bool:
        """Whether a listener uses TLS."""
        return any(each.config.ssl_certfile is not None for each in self.servers)

    @property
    def listener_stats(self) -> list[Stats]:
        """A snapshot of the counters of each listener."""
        raise NotImplementedError

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters, summed over the listeners."""
        return sum(self.listener_stats, Stats())

    async def fetch_stats(self) -> list[Stats]:
        """Return the current counters of each listener, over all processes that serve it."""
        return self.listener_stats

    async def is_healthy(self) -> bool:
        """Whether connections are accepted and a process serves them."""
        return self.is_serving()

    def is_serving(self) -> bool:
        """Whether every listener accepts connections."""
        return all(each.is_serving() for each in self.servers)

    def reload_certificates(self) -> None:
        """Read the certificate files again, for new connections. :exc:`~echo_async.StartError` if one is invalid."""
        for each in self.servers:
            each.reload_certificates()

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once."""
        for each in self.servers:
            each.close()

    def abort(self) -> None:
        """Shut down without waiting for any client."""
        for each in self.servers:
            each.abort()

    async def wait_closed(self) -> None:
        """Wait until no socket, connection, thread, task or process is left."""
        raise NotImplementedError


class ServerGroup(BaseGroup[EchoServer]):
    """The servers of all listeners, in the running event loop."""

    @classmethod
    async def start(cls, listeners: Sequence[ListenerConfig]) -> Self:
        """Serve all of ``listeners``, or none: :exc:`~echo_async.StartError` if one cannot be served."""
        async with listen(listeners) as bound, contextlib.AsyncExitStack() as on_failure:
            group = cls([EchoServer(*each) for each in zip(divide_limit(listeners), bound, strict=True)])
            for server in group.servers:
                await server.start()
                on_failure.push_async_callback(server.wait_closed)
                on_failure.callback(server.abort)
            on_failure.pop_all()
        return group

    @property
    def listener_stats(self) -> list[Stats]:
        return [each.stats for each in self.servers]

    async def wait_closed(self) -> None:
        await asyncio.gather(*(each.wait_closed() for each in self.servers))


@contextlib.asynccontextmanager
async def listen(listeners: Sequence[ListenerConfig]) -> AsyncIterator[list[Listeners]]:
    """Bind the addresses of all ``listeners``, or of none. They are closed if the block fails."""
    with contextlib.ExitStack() as on_failure:
        bound = []
        for config, descriptors in listeners:
            bound.append(Listeners.adopt(descriptors, has_udp=config.udp) if descriptors else await bind(config))
            on_failure.callback(bound[-1].close)
        yield bound
        on_failure.pop_all()


def divide_limit(listeners: Sequence[ListenerConfig]) -> Iterator[ServerConfig]:
    """Divide the connections that the descriptor limit has room for among the listeners without a limit."""
    configs = [each.config for each in listeners]
    limits = [each.limit_connections for each in configs]
    reserved = sum(
        LISTENER_DESCRIPTORS + UDP_DESCRIPTORS * each.udp + (each.limit_connections or 0) for each in configs
    )
    for config, limit in zip(configs, limits, strict=True):
        is_shared = limit is None and len(limits) > 1
        share = max(1, (max_connections() - reserved) // limits.count(None)) if is_shared else limit
        yield replace(config, limit_connections=share)
