"""A TCP echo service on asyncio: bytes come back as they were sent, and every limit is known.

Layout, in reading order:

``conversation``  the wire rules, without IO: what the bytes mean
``engines``       how they are carried: streams, protocol, threads
``server``        who looks after it: the server object, its sockets, the command
``client``        the other side: connect, echo, the command
``sync``          the same names for threads, without an event loop
``config``        every option and its default
``errors``        everything that goes wrong, as one tree
``stats`` ``logs`` ``loops`` ``opening``   counters, log lines, event loops, ``await`` and ``async with``

The library installs no signal handler, sets no event loop policy, configures no logging (logger
``echo_async``), and prints nothing.
"""

from .client import EchoClient, connect, echo
from .config import ServerConfig
from .engines.streams import handle_echo
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
from .server import EchoServer, serve
from .stats import Stats

__all__ = [
    "ConfigError",
    "ConnectError",
    "ConnectTimeout",
    "EchoClient",
    "EchoError",
    "EchoServer",
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
]
