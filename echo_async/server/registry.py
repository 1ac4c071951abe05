"""The set of open connections of one server: swept for timeouts, drained at a shutdown, aborted.

An engine adds a connection before it serves it, and removes it when its socket is closed. Independent of
event loops, and safe to use from several threads.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..config import ServerConfig
from ..engines.connection import Connection
from ..engines.context import LINGER_TIMEOUT_AT_STOP, ConversationFactory, ServerContext
from ..engines.timeouts import Timeouts
from ..logs import RateLimitedLog, log
from ..stats import Stats
from .counters import Counters

if TYPE_CHECKING:
    from ..wire.script import Report

DRAIN_INTERVAL = 0.05  # seconds between two sweeps during a shutdown


class Registry(ServerContext):
    """Every open connection of one server, and what they share.

    ``on_empty`` is called when the last one is removed, ``on_datagram`` with each datagram that is answered.
    """

    def __init__(self, config: ServerConfig, make_conversation: ConversationFactory | None = None) -> None:
        super().__init__(config, make_conversation)
        self.counters = Counters()
        self.connections: set[Connection] = set()
        self.pending: set[Any] = set()  # of connections that are accepted and not established yet
        self.on_empty: Callable[[], object] | None = None
        self.on_datagram: Callable[[bytes], object] | None = None
        self._limited_logs: list[RateLimitedLog] = []
        self._is_draining = False
        self._ends: dict[Connection, str] = {}  # why those end that are not closed yet
        shortest_timeout = min(config.timeout_idle, config.timeout_message, config.timeout_write)
        self.sweep_interval = min(1.0, shortest_timeout / 20)
        """Seconds between two sweeps: how late a timeout can be."""

    def limit_log(self, template: str) -> RateLimitedLog:
        """Return a log for warnings whose events are all accounted for by the sweeps, and at the end."""
        self._limited_logs.append(RateLimitedLog(log.warning, template))
        return self._limited_logs[-1]

    def write_pending_logs(self, *, at_once: bool = False) -> None:
        for each in self._limited_logs:
            each.write_pending(at_once=at_once)

    def add(self, connection: Connection) -> None:
        if self.log_chunks:
            log.debug("%s connection established", connection.peer)  # first: it can fail
        self.connections.add(connection)

    def remove(self, connection: Connection) -> None:
        connections, counters = self.connections, self.counters
        counters.lock.acquire()  # ``with`` would take twice the time
        try:
            if connection not in connections:
                return
            connections.remove(connection)
            conversation = connection.conversation
            counters.closed.add(connection)
            if self._ends or conversation.incomplete:
                counters.add_end(conversation, self._ends.pop(connection, None))
        finally:
            counters.lock.release()
        if conversation.incomplete or self.log_chunks:
            connection.log_closed()
        if self.on_empty is not None and not connections:
            self.on_empty()

    def withdraw(self, taken: Any) -> None:
        """Remove a connection, or a pending one, that could not be served after all: it counts as refused."""
        self.connections.discard(taken)
        self.pending.discard(taken)
        self.counters.increment("refused")

    def report(self, peer: str, report: "Report") -> None:
        self.counters.count_fault(report.kind)
        log.info("%s %s", peer, report.text)

    def fail(self, peer: str, error: Exception) -> None:
        self.counters.increment("failed")
        with contextlib.suppress(Exception):  # of a logging filter, for instance: the caller ends the connection
            log.error("%s internal error, connection aborted: %r", peer, error)

    def note_end(self, connection: Connection, reason: str) -> None:
        if connection in self.connections:
            self._ends.setdefault(connection, reason)

    @property
    def stats(self) -> Stats:
        """A snapshot: the totals and the open connections, added up."""
        with self.counters.lock:
            return self.counters.snapshot(list(self.connections))

    def sweep(self, some: Sequence[Connection] | None = None) -> None:
        """End every connection that has exceeded a timeout; during a shutdown, drain the others.

        Of ``some`` connections, those that are still open are checked; by default all.
        """
        now = self.now()
        for connection in list(self.connections) if some is None else some:
            try:
                if connection in self.connections:
                    self._check(connection, now)
            except Exception as error:  # the others have to be checked too
                connection.fail(error)
        self.write_pending_logs()

    def _check(self, connection: Connection, now: float) -> None:
        if (timeouts := connection.timeouts) is None:
            timeouts = connection.timeouts = Timeouts()
        kind = timeouts.expired(now, *connection.observe())
        if kind is None:
            if timeouts.must_report_incomplete(connection.conversation, now):
                connection.log_incomplete()
            if self._is_draining and not timeouts.is_new(connection.conversation, now):
                connection.drain()
            return
        if kind != "linger" and connection not in self._ends:
            self.note_end(connection, f"timeout_{kind}")
            self.counters.increment(f"timeouts_{kind}")
            connection.log_timeout(kind)
        if kind in ("idle", "message"):
            connection.linger()
        else:
            connection.abort()

    def drain(self) -> None:
        """Ask connections to end as soon as what was received is answered, in this sweep and all later ones."""
        self.linger_timeout = LINGER_TIMEOUT_AT_STOP
        self._is_draining = True
        self.sweep()

    def abort(self, *, reset: bool = False) -> None:
        """End every connection at once, with a reset if ``reset`` is true."""
        for connection in list(self.connections):
            connection.abort(reset=reset)
