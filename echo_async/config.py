"""Every option and its default, once. The commands, ``serve`` and the engines all take them from here.

A :class:`ServerConfig` that exists is valid: making one with a value that makes no sense raises
:exc:`~echo_async.ConfigError`, which names the option, the value and what it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

from .errors import ConfigError

__all__ = [
    "CONNECT_TIMEOUT",
    "HOST",
    "PORT",
    "REPLY_TIMEOUT",
    "EngineName",
    "Mode",
    "ProxyProtocol",
    "ServerConfig",
    "ServerOptions",
]

HOST = "127.0.0.1"
PORT = 5500

# The client's: seconds for a connection to be there, and for each reply.
CONNECT_TIMEOUT = 10.0
REPLY_TIMEOUT = 10.0

Mode = Literal["message", "stream", "raw"]
EngineName = Literal["streams", "protocol", "threads"]
ProxyProtocol = Literal["off", "v1", "v2", "auto"]

LOOPBACK = "127.0.0.1,::1"


class ServerOptions(TypedDict, total=False):
    """The keyword arguments of ``serve``: the fields of :class:`ServerConfig`, each of them optional."""

    host: str
    port: int
    uds: str | None
    fd: int | None
    mode: Mode
    chunk_size: int
    engine: EngineName
    backlog: int
    limit_connections: int | None
    limit_message_size: int
    timeout_idle: float
    timeout_message: float
    timeout_write: float
    timeout_graceful_shutdown: float
    ssl_certfile: str | None
    ssl_keyfile: str | None
    ssl_keyfile_password: str | None
    ssl_ca_certs: str | None
    proxy_protocol: ProxyProtocol
    proxy_allow_from: str
    no_access_log: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """How a server serves. Sizes are in bytes, times in seconds."""

    host: str = HOST
    port: int = PORT
    """0: any free port."""
    uds: str | None = None
    """The path of a Unix socket, instead of ``host`` and ``port``."""
    fd: int | None = None
    """The descriptor of a listening socket that was handed over, instead of any address. The server closes it."""
    mode: Mode = "message"
    chunk_size: int = 20
    """Bytes asked for at each read. 20 is what the project started with."""
    engine: EngineName = "streams"
    backlog: int = 512
    """Connections the kernel keeps waiting; it cuts the number to ``net.core.somaxconn``."""
    limit_connections: int | None = None
    """Connections at a time. None: what the descriptor limit of the process leaves room for."""
    limit_message_size: int = 1_048_576
    """Bytes of a message, newline included."""
    timeout_idle: float = 600.0
    """Nothing received, and nothing begun."""
    timeout_message: float = 60.0
    """A message begun but not finished."""
    timeout_write: float = 30.0
    """A client that does not read what it is sent."""
    timeout_graceful_shutdown: float = 10.0
    """What clients get to finish at a stop."""
    ssl_certfile: str | None = None
    """The path of a certificate and its chain, in PEM: then clients have to use TLS, 1.2 or newer."""
    ssl_keyfile: str | None = None
    """The path of its key; None if the key is in the file of the certificate."""
    ssl_keyfile_password: str | None = field(default=None, repr=False)
    ssl_ca_certs: str | None = None
    """The path of CA certificates: then a client has to show a certificate that one of them signed."""
    proxy_protocol: ProxyProtocol = "off"
    """The PROXY header that every connection has to begin with, in clear before TLS; ``auto``: ``v1`` or ``v2``."""
    proxy_allow_from: str = LOOPBACK
    """Who may connect then: addresses and networks with commas between them, ``*`` for all. Unix sockets always may."""
    no_access_log: bool = False
    """No log line for each message."""

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, get_args(Mode))
        _one_of("engine", self.engine, get_args(EngineName))
        _whole("port", self.port, 0, 65535)
        _whole("chunk_size", self.chunk_size, 1, 2**30)
        _whole("backlog", self.backlog, 1, 2**31 - 1)
        _whole("limit_message_size", self.limit_message_size, 1, 2**40)
        if self.limit_connections is not None:
            _whole("limit_connections", self.limit_connections, 1, 2**31 - 1)
        for name in ("timeout_idle", "timeout_message", "timeout_write", "timeout_graceful_shutdown"):
            check_seconds(name, getattr(self, name))
        _one_of("proxy_protocol", self.proxy_protocol, get_args(ProxyProtocol))
        if self.proxy_allow_from != LOOPBACK:
            _check_senders(self.proxy_allow_from)
            if self.proxy_protocol == "off":
                raise ConfigError("proxy_allow_from makes no sense without proxy_protocol: give the version too")
        if self.fd is not None:
            _whole("fd", self.fd, 0, 2**31 - 1)
            if self.uds is not None:
                raise ConfigError("fd and uds are two places to listen: give one of them")
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} makes no sense without ssl_certfile: give the server's certificate too")
        if not self.host:
            raise ConfigError("host is empty: give a name or an address (0.0.0.0 or :: for all of the machine's)")
        if self.uds is not None and (not self.uds or "\0" in self.uds[1:]):
            raise ConfigError(f"uds {self.uds!r} is no path: give the path of a Unix socket")


def check_seconds(name: str, value: float) -> None:
    """:exc:`~echo_async.ConfigError` unless ``value`` is a time that can pass: over 0 and finite."""
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} {value!r} makes no sense: give seconds, more than 0")


def _check_senders(text: str) -> None:
    from .proxy import TrustedProxies  # most servers have no need of it

    try:
        TrustedProxies(text)
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"proxy_allow_from {text!r} makes no sense: give addresses and networks with commas between them, or *"
        ) from error


def _one_of(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} {value!r} does not exist: give one of {', '.join(choices)}")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} {value!r} is out of range: give a whole number from {low} to {high}")
