"""Which new connections are established: the connection limit, trusted proxies, handshakes in progress.

A connection that has to send a PROXY header or complete a TLS handshake first is pending until then.
"""

from __future__ import annotations

import errno
import socket
import threading
from typing import TYPE_CHECKING

from ..compat import descriptor_limit, set_reset_on_close
from ..config import ServerConfig
from ..errors import describe_error
from ..logs import RateLimitedLog, log
from ..net import format_address
from ..wire.proxy import ProxyHeader, ProxyHeaderError, TrustedProxies
from .proxy_reader import ClosedBeforeInput
from .registry import Registry

if TYPE_CHECKING:
    from ..wire.faults import FaultPlan, FaultSchedule

HANDSHAKE_TIMEOUT = 10.0  # seconds for a TLS handshake
ACCEPT_RETRY_DELAY = 0.1  # seconds after accept() failed for lack of descriptors or memory
ACCEPT_ABORTED = {errno.ECONNABORTED, errno.EPROTO, errno.EINTR}  # of accept(2): the next connection can be accepted
SHUTTING_DOWN = ConnectionError("server is shutting down")
RESERVED_DESCRIPTORS = 32  # for listeners, logs, the event loop, and what the host program has open


class Admission:
    """Safe to use from several threads. Refusals and failures are counted, and logged with a rate limit."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.config = config = registry.context.config
        self.limit = config.limit_connections or max_connections()
        self.expects_header = config.proxy_protocol != "off"
        self._trusted_proxies = TrustedProxies(config.proxy_allow_from) if self.expects_header else None
        self._counters = registry.context.counters
        self._lock = threading.Lock()
        self._pending = 0
        self._log_accept_error = RateLimitedLog(log.warning, f"accept failed: %s; retrying in {ACCEPT_RETRY_DELAY:g} s")
        self._log_handshake_failure = RateLimitedLog(log.warning, "%s TLS handshake failed: %s")
        self._log_header_failure = RateLimitedLog(log.warning, "%s %s")
        self._schedule = _fault_schedule(config)
        self._log_refused = RateLimitedLog(log.warning, "connection limit reached (%d), connection refused")

    @property
    def is_idle(self) -> bool:
        """Whether there is no connection, established or pending."""
        return not self.registry.connections and not self._pending

    def admit(self, peername: object = None) -> bool:
        """Whether a new connection may be established. ``peername`` is needed where a PROXY header is expected."""
        connections = len(self.registry.connections) + self._pending
        if connections >= self.limit:
            self._counters.increment("refused")
            self._log_refused(connections)
            return False
        if self._trusted_proxies is not None and not self._trusted_proxies.is_trusted(peername):
            self._counters.increment("proxy_failures")
            self._log_header_failure(format_address(peername), "connection refused: not in proxy_allow_from")
            return False
        return True

    def next_plan(self) -> FaultPlan | None:
        """Return the plan of the connection that was just admitted, None if its replies are plain echoes."""
        plan = None if self._schedule is None else self._schedule.next_plan()
        if plan is None and self.config.mode == "identify":
            from ..wire.faults import FaultPlan

            return FaultPlan()
        return plan

    def datagram_schedule(self) -> FaultSchedule | None:
        """Return a schedule with the same faults for datagrams, which are numbered apart; None if there are none."""
        if self._schedule is None:
            return None
        return _make_schedule(self.config, self._schedule.seed, is_raw=True)

    def reset(self, connected: socket.socket, peername: object, plan: FaultPlan) -> None:
        """Reset an admitted connection, as its plan demands."""
        self.registry.context.report_fault(format_address(peername), plan.refuse())
        set_reset_on_close(connected)
        connected.close()

    def on_accept_error(self, error: Exception) -> bool:
        """Log an error of ``accept``; return whether to pause, since it will occur again at once."""
        if isinstance(error, OSError) and error.errno in ACCEPT_ABORTED:
            return False
        self._log_accept_error(describe_error(error))
        return True

    def new_header(self) -> ProxyHeader:
        """Return the parser for the PROXY header of a new connection."""
        return ProxyHeader(self.config.proxy_protocol)

    def begin_handshake(self) -> None:
        """Count an accepted connection as pending."""
        with self._lock:
            self._pending += 1

    def end_handshake(self) -> None:
        """Count a pending connection no more: it is established, or closed."""
        with self._lock:
            self._pending -= 1

    def fail_handshake(self, peer: str, error: Exception) -> None:
        """End a pending connection whose TLS handshake failed."""
        self.end_handshake()
        if isinstance(error, TimeoutError):
            self._counters.increment("timeouts_handshake")
            details = f"timed out after {HANDSHAKE_TIMEOUT:g} s"
        elif isinstance(error, ClosedBeforeInput):
            return self._log_lost("%s connection lost before the TLS handshake: %s", peer, error)
        else:
            self._counters.increment("tls_failures")
            details = describe_error(error)
        self._log_handshake_failure(peer, details)

    def fail_header(self, peer: str, error: Exception) -> None:
        """End a pending connection that sent no valid PROXY header, or cannot be served. A shutdown is no failure."""
        self.end_handshake()
        if isinstance(error, TimeoutError):
            self._counters.increment("timeouts_message")
            self._log_header_failure(peer, f"PROXY header timeout ({self.config.timeout_message:g} s)")
        elif isinstance(error, ProxyHeaderError):
            self._counters.increment("proxy_failures")
            self._log_header_failure(peer, f"invalid PROXY header: {error}")
        elif isinstance(error, OSError):
            self._log_lost("%s connection lost before the PROXY header: %s", peer, error)
        else:
            self.registry.context.fail(peer, error)

    def _log_lost(self, template: str, peer: str, error: OSError) -> None:
        if isinstance(error, ClosedBeforeInput):  # counted as it is where no handshake is expected
            self._counters.increment("accepted")
        log.debug(template, peer, describe_error(error))


def _fault_schedule(config: ServerConfig) -> FaultSchedule | None:
    if not config.has_faults:
        return None
    schedule = _make_schedule(config, config.fault_seed, is_raw=config.mode == "raw")
    log.info("faults configured: %s, seed %d", config.fault or config.fault_sequence, schedule.seed)
    return schedule


def _make_schedule(config: ServerConfig, seed: int | None, *, is_raw: bool) -> FaultSchedule:
    from ..wire.faults import FaultSchedule

    return FaultSchedule(config.fault, config.fault_sequence, seed, is_raw=is_raw)


def max_connections() -> int:
    """Return the number of connections that the descriptor limit of this process has room for."""
    limit = descriptor_limit()
    return 2**31 if limit is None else max(1, limit - RESERVED_DESCRIPTORS)
