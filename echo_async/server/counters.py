"""The totals behind :class:`~echo_async.Stats`."""

import threading
from collections.abc import Collection

from ..engines.connection import Connection
from ..stats import COUNTERS, Stats
from ..wire.datagrams import DatagramCounters


class Counters:
    """Totals of events and of closed connections. Safe to use from several threads.

    ``lock`` is held while they change. With it held, a connection is open or in the totals.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._totals = dict.fromkeys(COUNTERS, 0)
        self._faults: dict[str, int] = {}
        self.datagrams = DatagramCounters()

    def increment(self, name: str) -> None:
        """Count one event. ``name`` is a field of :class:`~echo_async.Stats`."""
        with self.lock:
            self._totals[name] += 1

    def count_fault(self, kind: str) -> None:
        """Count a connection or datagram on which a fault took effect."""
        with self.lock:
            self._faults[kind] = self._faults.get(kind, 0) + 1

    def add_closed(self, connection: Connection) -> None:
        """Add what was exchanged on a connection that is closed. ``lock`` is held."""
        _add(self._totals, connection)
        conversation = connection.conversation
        if conversation.incomplete:
            self._totals["too_long" if conversation.too_long else "lost"] += 1

    def snapshot(self, active: Collection[Connection]) -> Stats:
        """The totals, with what was exchanged on open connections added. ``lock`` is held."""
        totals, faults = dict(self._totals), dict(self._faults)
        totals["active"] = len(active)
        for connection in active:
            _add(totals, connection)
            totals["too_long"] += connection.conversation.too_long
        datagrams = self.datagrams
        totals["datagrams"] = datagrams.answered
        totals["bytes_in"] += datagrams.received
        totals["bytes_out"] += datagrams.sent
        return Stats(**totals, datagrams_refused=dict(datagrams.refused), faults=faults)


def _add(totals: dict[str, int], connection: Connection) -> None:
    conversation = connection.conversation
    totals["accepted"] += 1
    totals["messages"] += conversation.messages
    totals["bytes_in"] += conversation.received
    totals["bytes_out"] += connection.answered
