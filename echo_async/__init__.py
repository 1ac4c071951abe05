"""TCP echo server, client and library on asyncio: every byte comes back unchanged.

Layout, in reading order:

``wire``      what bytes mean, without IO: the conversation, faults, identity, PROXY headers, datagrams
``engines``   how bytes are carried: streams, protocol, threads
``server``    accepts, counts and drains connections
``service``   a process: workers, metrics, systemd, signals
``client``    the asyncio client, and what both clients share
``sync``      server and client without an event loop
``cli``       the command ``echo-async`` and its subcommands
``bench``     load generator for any echo server, and comparison of the engines
``testing`` ``pytest_plugin``   a server for tests, and its fixtures
``config`` ``errors`` ``stats``   every option and its default, every error, the counters

The library installs no signal handler, sets no event loop policy, configures no logging (logger
``echo_async``), and prints nothing. ``import echo_async`` imports no other module: each name imports its
module on first use (:pep:`562`).
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # noqa: UP036  before a syntax error or a missing module tells something else
    raise ImportError("echo-async requires Python 3.11 or newer; this is {}.{}".format(*sys.version_info))

if TYPE_CHECKING:
    from . import sync
    from .client.client import EchoClient, connect, echo
    from .config import ServerConfig
    from .errors import (
        ConfigError,
        ConnectError,
        ConnectTimeout,
        EchoError,
        MessageError,
        ReplyDifferent,
        ReplyError,
        ReplyLate,
        ReplyLost,
        StartError,
    )
    from .server.handler import handle_echo
    from .server.server import EchoServer, serve
    from .stats import Stats
    from .wire.identity import Identity

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ConnectError",
    "ConnectTimeout",
    "EchoClient",
    "EchoError",
    "EchoServer",
    "Identity",
    "MessageError",
    "ReplyDifferent",
    "ReplyError",
    "ReplyLate",
    "ReplyLost",
    "ServerConfig",
    "StartError",
    "Stats",
    "connect",
    "echo",
    "handle_echo",
    "serve",
    "sync",
]

_HOMES = {
    "EchoClient": ".client.client",
    "EchoServer": ".server.server",
    "Identity": ".wire.identity",
    "ServerConfig": ".config",
    "Stats": ".stats",
    "connect": ".client.client",
    "echo": ".client.client",
    "handle_echo": ".server.handler",
    "serve": ".server.server",
}


def __getattr__(name: str) -> object:
    if name == "sync":
        return import_module(".sync", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, ".errors"), __name__), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
