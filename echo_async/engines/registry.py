"""The connections of one server: who is in, what they did, whose time is up.

Engines add a connection before it runs and remove it when its socket is closed; the server counts,
sweeps, stops and aborts through here. Loop-free and safe to use from several threads.
"""

from __future__ import annotations

import errno
import logging
import resource
import threading
import time
from collections.abc import Callable
from functools import partial

from ..config import ServerConfig
from ..conversation import MODES, Conversation
from ..errors import describe_error
from ..logs import RateLimitedLog, access_log, excerpt, log
from ..net import format_address
from ..proxy import ProxyHeader, ProxyHeaderError, TrustedProxies
from ..stats import Stats
from .connection import Connection

__all__ = [
    "ACCEPT_ABORTED",
    "ACCEPT_RETRY_DELAY",
    "HANDSHAKE_TIMEOUT",
    "LINGER_TIMEOUT",
    "RESERVED_DESCRIPTORS",
    "Registry",
]

HANDSHAKE_TIMEOUT = 10.0  # seconds for a client's TLS handshake
ACCEPT_RETRY_DELAY = (
    0.1  # seconds without accepting, when the system cannot: it has no descriptor or memory, or does not let us
)
ACCEPT_ABORTED = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR}  # accept(2) fails with these, and can go on at once

LINGER_TIMEOUT = 5.0  # seconds that input is discarded after the last reply, while the client has not ended its side
LINGER_TIMEOUT_AT_STOP = 0.5  # the same once the server stops
RESERVED_DESCRIPTORS = 32  # for listeners, logs, the event loop, and what the host program has open


class Registry:
    """Every connection of one server, and the counters of those that are gone."""

    now = staticmethod(time.monotonic)

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.conversation: Callable[[], Conversation] = partial(MODES[config.mode], config.limit_message_size)
        self.limit = config.limit_connections or _descriptors()
        self.linger = LINGER_TIMEOUT
        self._stopping = False
        self.log_messages = not config.no_access_log and access_log.isEnabledFor(logging.INFO)
        self.log_chunks = log.isEnabledFor(logging.DEBUG)
        self.connections: set[Connection] = set()
        self.on_empty: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._closed_totals = dict.fromkeys(Stats.__slots__, 0)
        self._handshakes = 0  # clients that are not let in yet
        self._trusted_proxies = TrustedProxies(config.proxy_allow_from) if config.proxy_protocol != "off" else None
        self.log_accept_error = RateLimitedLog(log.warning, "cannot accept clients just now: %s")
        self._log_handshake_failure = RateLimitedLog(log.warning, "%s closed: its TLS handshake failed: %s")
        self._log_header_failure = RateLimitedLog(log.warning, "%s closed: %s")
        self._log_refused = RateLimitedLog(log.warning, "refused a client: %d are connected, the limit")

    def add(self, connection: Connection) -> None:
        self.connections.add(connection)
        if self.log_chunks:
            connection.log_established()

    def remove(self, connection: Connection) -> None:
        """A connection has ended: keep its counters. Does nothing the second time."""
        with self._lock:
            if connection not in self.connections:
                return
            self.connections.remove(connection)
            said, gone = connection.conversation, self._closed_totals
            gone["accepted"] += 1
            gone["messages"] += said.messages
            gone["bytes_in"] += said.received
            gone["bytes_out"] += said.answered
            if said.incomplete:
                gone["too_long" if said.too_long else "lost"] += 1
        if said.incomplete or self.log_chunks:
            connection.log_closed()
        if self.on_empty is not None and not self.connections:
            self.on_empty()

    def withdraw(self, connection: Connection) -> None:
        """A connection that was added could not be served after all: it counts as refused."""
        self.connections.discard(connection)
        self.count("refused")

    def count(self, what: str) -> None:
        with self._lock:
            self._closed_totals[what] += 1

    def refuse(self) -> bool:
        """Whether a new client has to be closed at once; counts it then, and says so at most once a second."""
        if len(self.connections) + self._handshakes < self.limit:
            return False
        self.count("refused")
        self._log_refused(len(self.connections) + self._handshakes)
        return True

    def is_allowed(self, peername: object) -> bool:
        """Whether ``peername`` may: only allowed senders, where a PROXY header is asked for. Else counts it."""
        if self._trusted_proxies is None or self._trusted_proxies.allow(peername):
            return True
        self.count("proxy_failures")
        self._log_header_failure(format_address(peername), "it may not send a PROXY header (proxy_allow_from)")
        return False

    @property
    def is_occupied(self) -> bool:
        """Whether there are clients, let in or not yet."""
        return bool(self.connections) or self._handshakes > 0

    @property
    def expects_header(self) -> bool:
        """Whether a connection has to begin with a PROXY header."""
        return self._trusted_proxies is not None

    def new_header(self) -> ProxyHeader:
        """What takes the PROXY header of a new client."""
        return ProxyHeader(self.config.proxy_protocol)

    def begin_handshake(self) -> None:
        """A client was accepted and has to prove itself first: it counts for the limit until then."""
        with self._lock:
            self._handshakes += 1

    def end_handshake(self) -> None:
        """The handshake is over."""
        with self._lock:
            self._handshakes -= 1

    def fail_handshake(self, peer: str, error: Exception) -> None:
        """The handshake is over, and the client is not let in."""
        self.end_handshake()
        if isinstance(error, TimeoutError):
            self.count("timeouts_handshake")
            why = f"not done in {HANDSHAKE_TIMEOUT:g} s"
        else:
            self.count("tls_failures")
            why = describe_error(error)
        self._log_handshake_failure(peer, why)

    def fail_header(self, peer: str, error: BaseException) -> None:
        """The client is not let in, for want of a PROXY header. To leave without a word is no failure, nor a stop."""
        self.end_handshake()
        if isinstance(error, TimeoutError):
            self.count("timeouts_message")
            self._log_header_failure(peer, f"it sent no whole PROXY header in {self.config.timeout_message:g} s")
        elif isinstance(error, ProxyHeaderError):
            self.count("proxy_failures")
            self._log_header_failure(peer, error)
        else:
            log.debug("%s closed before its PROXY header: %r", peer, error)

    @property
    def stats(self) -> Stats:
        """A snapshot: the connections that are gone and those that are open, added up."""
        with self._lock:
            open_now = list(self.connections)
            total = dict(self._closed_totals)
        total["active"] = len(open_now)
        total["accepted"] += len(open_now)
        for connection in open_now:
            said = connection.conversation
            total["messages"] += said.messages
            total["bytes_in"] += said.received
            total["bytes_out"] += said.answered
            total["too_long"] += said.too_long
        return Stats(**total)

    @property
    def sweep_interval(self) -> float:
        """Seconds between two sweeps: a twentieth of the shortest time limit, one second at most."""
        config = self.config
        return min(1.0, min(config.timeout_idle, config.timeout_message, config.timeout_write) / 20)

    def sweep(self) -> None:
        """End every connection that has overrun a time limit."""
        now = self.now()
        for connection in list(self.connections):
            try:
                self._look_at(connection, now)
            except Exception as error:  # the others have to be looked at too
                connection.fail(error)

    def _look_at(self, connection: Connection, now: float) -> None:
        expired_timeout = connection.expired_timeout(now)
        if expired_timeout is None:
            if self._stopping and not connection.is_new(now):
                connection.stop()
            return
        if expired_timeout != "linger":
            self.count(f"timeouts_{expired_timeout}")
            log.info("%s closed: %s", connection.peer, self._reason(expired_timeout))
        if expired_timeout in ("idle", "message"):
            connection.finish()
        else:
            connection.abort()

    def _reason(self, expired_timeout: str) -> str:
        seconds = getattr(self.config, f"timeout_{expired_timeout}")
        return {
            "idle": f"nothing received for {seconds:g} s",
            "message": f"a message was begun and not finished in {seconds:g} s",
            "write": f"it read nothing of what it was sent for {seconds:g} s",
        }[expired_timeout]

    def stop(self) -> None:
        """From this sweep on, ask connections to end as soon as what was received is answered."""
        self.linger = LINGER_TIMEOUT_AT_STOP
        self._stopping = True
        self.sweep()

    def abort(self) -> None:
        """End every connection at once."""
        for connection in list(self.connections):
            connection.abort()

    def access_info(self, peer: str, message: bytes) -> None:
        text = excerpt(message)
        facts = {"client": peer, "bytes": len(message), "text": text}
        access_log.info("%s %d bytes: %s", peer, len(message), text, extra={"facts": facts})


def _descriptors() -> int:
    """How many connections the descriptor limit of this process leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else max(1, soft - RESERVED_DESCRIPTORS)
