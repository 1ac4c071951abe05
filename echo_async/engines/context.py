"""What a server provides to its connections: options, clock, log settings, and what it does for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..config import ServerConfig
from ..logs import access_log, log
from ..wire.conversation import MODES, Conversation
from ..wire.text import excerpt

if TYPE_CHECKING:
    from ..wire.script import Report, Script

LINGER_TIMEOUT = 5.0  # seconds that input is discarded after the last reply, until the client closes its side
LINGER_TIMEOUT_AT_STOP = 0.5  # the same during a shutdown

ConversationFactory = Callable[[], Conversation]


class ServerContext:
    """``log_messages`` and ``log_chunks`` are decided once, so that a disabled log line costs nothing.

    The arguments of type Any are a :class:`~echo_async.engines.connection.Connection`, whose module imports this one.
    """

    now = staticmethod(time.monotonic)

    def __init__(self, config: ServerConfig, make_conversation: ConversationFactory | None = None) -> None:
        self.config = config
        self.make_conversation = make_conversation or partial(MODES[config.mode], config.limit_message_size)
        self.listener: str | None = None  # the address of the server, as JSON log lines show it
        self.linger_timeout = LINGER_TIMEOUT
        self.log_messages = not config.no_access_log and access_log.isEnabledFor(logging.INFO)
        self.log_chunks = log.isEnabledFor(logging.DEBUG)

    def log_message(self, peer: str, message: bytes, kind: str = "") -> None:
        """Write the line of the access log for a message that is answered, or a datagram."""
        text = excerpt(message)
        facts = {"client": peer, "listener": self.listener, "bytes": len(message), "text": text}
        access_log.info(f"%s {kind}%d bytes: %s", peer, len(message), text, extra={"facts": facts})

    def add(self, connection: Any) -> None:
        """Count a connection as open, before it is served."""
        raise NotImplementedError

    def remove(self, connection: Any) -> None:
        """Keep the counters of a connection that is closed. Does nothing the second time."""
        raise NotImplementedError

    def report(self, peer: str, report: Report) -> None:
        """Count and log what a script does to a connection."""
        raise NotImplementedError

    def fail(self, peer: str, error: Exception) -> None:
        """Count and log an internal error, which ends one connection."""
        raise NotImplementedError

    def note_end(self, connection: Any, reason: str) -> None:
        """Note why an open connection ends; the first reason counts."""
        raise NotImplementedError


class Slot:
    """The place of a connection, and what is known of its client before the engine serves it."""

    __slots__ = ("header", "make_script", "peername")

    def __init__(self, peername: object = None, make_script: Callable[[Any], Script] | None = None) -> None:
        self.peername = peername  # the client: the peer, unless a PROXY header has another. None: its socket has it
        self.header: Any = None  # the PROXY header, if there was one, and the connection has a script
        self.make_script = make_script  # if the connection has one

    def set_header(self, header: Any) -> None:
        """Note the client that the PROXY header states, and the header if the connection's script can report it."""
        if self.make_script is not None:
            self.header = header
        self.peername = header.source or self.peername

    def claim(self) -> bool:
        """Whether the connection may be served. An engine calls this once it has the transport."""
        return True
