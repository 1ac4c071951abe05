"""The totals behind :class:`~echo_async.Stats`."""

import threading
from collections.abc import Collection

from ..conversation import Conversation
from ..stats import Stats


class Counters:
    """Totals of events and of closed connections. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(Stats.__slots__, 0)

    def increment(self, name: str) -> None:
        """Count one event. ``name`` is a field of :class:`~echo_async.Stats`."""
        with self._lock:
            self._totals[name] += 1

    def add_closed(self, conversation: Conversation) -> None:
        """Add the conversation of a connection that is closed."""
        with self._lock:
            _add(self._totals, conversation)
            if conversation.incomplete:
                self._totals["too_long" if conversation.too_long else "lost"] += 1

    def snapshot(self, active: Collection[Conversation]) -> Stats:
        """The totals, with the conversations of open connections added."""
        with self._lock:
            totals = dict(self._totals)
        totals["active"] = len(active)
        for conversation in active:
            _add(totals, conversation)
            totals["too_long"] += conversation.too_long
        return Stats(**totals)


def _add(totals: dict[str, int], conversation: Conversation) -> None:
    totals["accepted"] += 1
    totals["messages"] += conversation.messages
    totals["bytes_in"] += conversation.received
    totals["bytes_out"] += conversation.answered
