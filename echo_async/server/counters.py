"""The totals behind :class:`~echo_async.Stats`."""

import threading
from collections.abc import Collection
from copy import copy

from ..engines.connection import Connection
from ..stats import COUNTERS, Stats
from ..wire.conversation import Conversation
from ..wire.datagrams import DatagramCounters


class Exchanged:
    """What was exchanged on connections. Attributes and one call, since this is done for each connection."""

    __slots__ = ("accepted", "bytes_in", "bytes_out", "messages")

    def __init__(self) -> None:
        self.accepted = self.messages = self.bytes_in = self.bytes_out = 0

    def add(self, connection: Connection) -> None:
        """Add what was exchanged on ``connection`` so far."""
        conversation, runner = connection.conversation, connection.runner
        self.accepted += 1
        self.messages += conversation.messages
        self.bytes_in += conversation.received
        if runner is None:  # conversation.answered, without the call of a property
            self.bytes_out += conversation.received - conversation.incomplete - conversation.discarded
        else:
            self.bytes_out += runner.sent


class Counters:
    """Totals of events and of closed connections. Safe to use from several threads.

    ``lock`` is held while they change. With it held, a connection is open, or added to ``closed``.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.closed = Exchanged()
        self._events = dict.fromkeys(COUNTERS, 0)
        self._faults: dict[str, int] = {}
        self._ended: dict[str, int] = {}  # without those that were just closed
        self.datagrams = DatagramCounters()

    def increment(self, name: str) -> None:
        """Count one event. ``name`` is a field of :class:`~echo_async.Stats`."""
        with self.lock:
            self._events[name] += 1

    def count_fault(self, kind: str) -> None:
        """Count a connection or datagram on which a fault took effect."""
        with self.lock:
            self._faults[kind] = self._faults.get(kind, 0) + 1

    def add_end(self, conversation: Conversation, reason: str | None) -> None:
        """Count why a connection was closed, and the message that it was closed with. ``lock`` is held."""
        if conversation.incomplete:
            kind = "too_long" if conversation.too_long else "lost"
            self._events[kind] += 1
            reason = reason or kind
        if reason is not None:
            self._ended[reason] = self._ended.get(reason, 0) + 1

    def snapshot(self, active: Collection[Connection]) -> Stats:
        """The totals, with what was exchanged on open connections added. ``lock`` is held."""
        exchanged, totals = copy(self.closed), dict(self._events)
        for connection in active:
            exchanged.add(connection)
            totals["too_long"] += connection.conversation.too_long
        datagrams = self.datagrams
        totals["active"] = len(active)
        totals["accepted"] += exchanged.accepted
        totals["messages"] = exchanged.messages
        totals["datagrams"] = datagrams.answered
        totals["bytes_in"] = exchanged.bytes_in + datagrams.received
        totals["bytes_out"] = exchanged.bytes_out + datagrams.sent
        refused, faults, ended = map(dict, (datagrams.refused, self._faults, self._ended))
        if closed := totals["accepted"] - len(active) - sum(ended.values()):
            ended["closed"] = closed
        return Stats(**totals, datagrams_refused=refused, faults=faults, ended=ended)
