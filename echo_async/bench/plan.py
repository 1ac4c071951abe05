"""The validated options of one load, in a form that can be sent to another process."""

import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

from ..errors import ConfigError
from ..tls import client_context

LoadMode = Literal["stream", "message"]


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Sizes are in bytes, times in seconds. ``connections`` and ``rate`` are totals of all processes."""

    family: int = 0
    address: tuple[Any, ...] | str = ""
    """The argument of ``socket.connect``: a numeric address, or the path of a Unix socket."""
    connections: int = 10
    size: int = 1024
    pipeline: int = 1
    mode: LoadMode = "stream"
    duration: float = 10.0
    warmup: float = 1.0
    rate: float | None = None
    """Messages per second in an open loop; None: a closed loop."""
    pause: float = 0.0
    """Between a reply and the next message in a closed loop."""
    processes: int = 1
    timeout: float = 10.0
    """For connecting, and for outstanding replies after the end of the measurement."""
    tls: dict[str, Any] | None = None
    """The arguments of ``client_context``, and ``server_hostname``."""
    udp: bool = False
    """Datagrams; ``connections`` are sockets then, and ``mode`` means nothing."""

    def __post_init__(self) -> None:
        if self.mode == "message" and self.pipeline != 1:
            raise ConfigError(f"--pipeline {self.pipeline} requires --mode stream")
        if self.processes > self.connections:
            raise ConfigError(
                f"invalid --processes: {self.processes} (must be at most the number of connections, {self.connections})"
            )

    @property
    def max_in_flight(self) -> int:
        """Of an open loop, on each connection. Datagrams are sent when they are due, whatever is in flight."""
        return sys.maxsize if self.udp else self.pipeline

    def split(self) -> list[Self]:
        """Return the plan of each process, with its share of the connections and of the rate."""
        each, more = divmod(self.connections, self.processes)
        counts = [each + (number < more) for number in range(self.processes)]
        return [
            replace(self, connections=count, processes=1, rate=self.rate and self.rate * count / self.connections)
            for count in counts
        ]

    def tls_wrapper(self) -> Callable[..., ssl.SSLSocket] | None:
        """Return the function that wraps a connected socket in TLS; None without TLS."""
        if self.tls is None:
            return None
        arguments = {**self.tls}
        name = arguments.pop("server_hostname")
        return partial(client_context(**arguments).wrap_socket, server_hostname=name)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        if isinstance(values["address"], list):
            values["address"] = tuple(values["address"])
        return cls(**values)
