"""Which new connections are established: the connection limit, trusted proxies, handshakes in progress.

A connection that has to send a PROXY header or complete a TLS handshake first is pending until then.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..compat import descriptor_limit, set_reset_on_close
from ..engines.context import Slot
from ..errors import describe_error
from ..logs import log
from ..net import format_address
from ..wire.networks import Networks
from ..wire.proxy import ProxyHeader, ProxyHeaderError
from ..wire.tls_layer import TlsLayer
from .proxy_reader import ClosedBeforeInput
from .registry import Registry

if TYPE_CHECKING:
    from .scripts import Scripts

HANDSHAKE_TIMEOUT = 10.0  # seconds for a TLS handshake
ACCEPT_RETRY_DELAY = 0.1  # seconds after accept() failed for lack of descriptors or memory
ACCEPT_ABORTED = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR}  # of accept(2): the next connection can be accepted
SHUTTING_DOWN = ConnectionError("server is shutting down")
RESERVED_DESCRIPTORS = 32  # for listeners, logs, the event loop, and what the host program has open


class Admission:
    """Safe to use from several threads. Refusals and failures are counted, and logged with a rate limit."""

    def __init__(self, registry: Registry, scripts: Scripts | None = None) -> None:
        self.registry = registry
        self.config = config = registry.config
        self.limit = config.limit_connections or max_connections()
        self.expects_header = config.proxy_protocol != "off"
        if scripts is None and config.has_scripts:
            from .scripts import Scripts  # only for a server with faults, or in identify mode

            scripts = Scripts(config)
        self.scripts = scripts
        self._trusted_proxies = Networks(config.proxy_allow_from) if self.expects_header else None
        self._counters = registry.counters
        self._log_accept_error = registry.limit_log(f"accept failed: %s; retrying in {ACCEPT_RETRY_DELAY:g} s")
        self._log_handshake_failure = registry.limit_log("%s TLS handshake failed: %s")
        self._log_tls_failure = registry.limit_log("%s TLS error, connection aborted: %s")
        self._log_header_failure = registry.limit_log("%s %s")
        self._log_refused = registry.limit_log("connection limit reached (%d), connection refused")

    @property
    def is_idle(self) -> bool:
        """Whether there is no connection, established or pending."""
        return not self.registry.connections and not self.registry.pending

    def has_place(self) -> bool:
        """Whether another connection may be established; count it as refused if not."""
        connections = len(self.registry.connections) + len(self.registry.pending)
        if connections < self.limit:
            return True
        self._counters.increment("refused")
        self._log_refused(connections)
        return False

    def admit(self, connected: socket.socket, peername: object, serve: Callable[[PendingSlot], None]) -> None:
        """Call ``serve`` with the slot of a connection that was accepted, or refuse and close it."""
        slot = None
        try:
            if self.has_place() and self._is_trusted(peername):
                slot = PendingSlot(self.registry, connected, peername)
                refusal = None if self.scripts is None else self.scripts.assign(slot)
                if refusal is None:
                    self.registry.pending.add(slot)
                    return serve(slot)
                self.registry.report(format_address(peername), refusal)
                set_reset_on_close(connected)
        except Exception as error:
            if slot is not None:
                slot.release()
            self.registry.fail(format_address(peername), error)
        connected.close()

    def _is_trusted(self, peername: object) -> bool:
        if self._trusted_proxies is None or peername in self._trusted_proxies:
            return True
        self._counters.increment("proxy_failures")
        self._log_header_failure(format_address(peername), "connection refused: not in proxy_allow_from")
        return False

    def on_accept_error(self, error: Exception) -> bool:
        """Log an error of ``accept``; return whether to pause, since it will occur again at once."""
        if isinstance(error, OSError) and error.errno in ACCEPT_ABORTED:
            return False
        self._log_accept_error(describe_error(error))
        return True

    def new_header(self) -> ProxyHeader:
        """Return the parser for the PROXY header of a new connection."""
        return ProxyHeader(self.config.proxy_protocol)

    def fail_handshake(self, tls: TlsLayer, slot: PendingSlot, error: Exception) -> None:
        """End a pending connection whose TLS handshake failed."""
        peer = format_address(slot.peername)
        slot.release()
        if isinstance(error, TimeoutError):
            self._counters.increment("timeouts_handshake")
            details = f"timed out after {HANDSHAKE_TIMEOUT:g} s"
        elif not tls.has_input and error is not SHUTTING_DOWN and isinstance(error, ConnectionError):
            self._counters.increment("accepted")  # as it is where no handshake is expected
            return log.debug("%s connection lost before the TLS handshake: %s", peer, describe_error(error))
        else:
            self._counters.increment("tls_failures")
            details = describe_error(error)
        self._log_handshake_failure(peer, details)

    def fail_tls(self, slot: Slot, error: Exception) -> None:
        """Count and log an error of TLS after the handshake, which ends the connection."""
        self._counters.increment("tls_failures")
        self._log_tls_failure(format_address(slot.peername), describe_error(error))

    def fail_header(self, slot: PendingSlot, error: Exception) -> None:
        """End a pending connection that sent no valid PROXY header, or cannot be served. A shutdown is no failure."""
        peer = format_address(slot.peername)
        slot.release()
        if isinstance(error, TimeoutError):
            self._counters.increment("timeouts_message")
            self._log_header_failure(peer, f"PROXY header timeout ({self.config.timeout_message:g} s)")
        elif isinstance(error, ProxyHeaderError):
            self._counters.increment("proxy_failures")
            self._log_header_failure(peer, f"invalid PROXY header: {error}")
        elif isinstance(error, OSError):
            if isinstance(error, ClosedBeforeInput):  # counted as it is where no header is expected
                self._counters.increment("accepted")
            log.debug("%s connection lost before the PROXY header: %s", peer, describe_error(error))
        else:
            self.registry.fail(peer, error)


class PendingSlot(Slot):
    """The place of an accepted connection that sends a PROXY header or completes a TLS handshake first.

    It is taken at accept and released once: by the connection that claims it, or by the acceptor if that fails.
    """

    __slots__ = ("_pending", "connected", "is_aborted")

    def __init__(self, registry: Registry, connected: socket.socket, peername: object) -> None:
        super().__init__(peername)
        self._pending = registry.pending
        self.connected = connected
        self.is_aborted = False  # by a shutdown

    def claim(self) -> bool:
        self.release()
        return True

    def release(self) -> None:
        self._pending.discard(self)


class NativeSlot(Slot):
    """The place of each connection that an event loop accepts itself: it is taken as soon as there is a transport."""

    __slots__ = ("claim",)

    claim: Callable[[], bool]

    def __init__(self, admission: Admission) -> None:
        super().__init__()
        self.claim = admission.has_place


def max_connections() -> int:
    """Return the number of connections that the descriptor limit of this process has room for."""
    limit = descriptor_limit()
    return 2**31 if limit is None else max(1, limit - RESERVED_DESCRIPTORS)
