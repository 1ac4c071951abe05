"""What one load does: the options of ``load``, checked, in a form that goes to another process."""

from __future__ import annotations

import ssl
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from ..errors import ConfigError
from ..tls import client_context

__all__ = ["LoadMode", "LoadPlan"]

LoadMode = Literal["stream", "message"]


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Sizes are in bytes, times in seconds. ``connections`` and ``rate`` are those of all processes together."""

    family: int = 0
    address: tuple[Any, ...] | str = ""
    """What ``socket.connect`` takes: one that needs no resolver, or the path of a Unix socket. See :meth:`at`."""
    connections: int = 10
    size: int = 1024
    pipeline: int = 1
    mode: LoadMode = "stream"
    duration: float = 10.0
    warmup: float = 1.0
    rate: float | None = None
    """Messages a second, sent by the clock: an open loop. None: a closed loop."""
    processes: int = 1
    timeout: float = 10.0
    """For a connection; and after the end, for the replies that are still to come."""
    tls: dict[str, Any] | None = None
    """``ca_certs``, ``verify`` and ``server_hostname``; None: no TLS."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(LoadMode):
            raise ConfigError(f"mode {self.mode!r} does not exist: give one of {', '.join(get_args(LoadMode))}")
        if self.mode == "message" and self.pipeline != 1:
            raise ConfigError(
                f"pipeline {self.pipeline} is for --mode stream: in message mode a connection has one message"
            )
        if self.processes > self.connections:
            raise ConfigError(f"processes {self.processes} have no more than {self.connections} connections to share")

    def split(self) -> list[Self]:
        """The plan of each process: its part of the connections, and of the rate."""
        each, more = divmod(self.connections, self.processes)
        counts = [each + (number < more) for number in range(self.processes)]
        return [
            replace(self, connections=count, processes=1, rate=self.rate and self.rate * count / self.connections)
            for count in counts
        ]

    def tls_context(self) -> ssl.SSLContext | None:
        if self.tls is None:
            return None
        return client_context(ca_certs=self.tls["ca_certs"], verify=self.tls["verify"])

    def at(self, family: int, address: Any) -> Self:
        """The same load, for the server there."""
        return replace(self, family=family, address=address)

    def with_size(self, size: int) -> Self:
        """The same load, with messages of another size."""
        return replace(self, size=size)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        if isinstance(values["address"], list):
            values["address"] = tuple(values["address"])
        return cls(**values)
