"""The counters of a server, as one value that can be compared, added and logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import add
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of a server's counters since its start. ``a + b`` adds the counters of two servers.

    ``bytes_in`` and ``bytes_out`` count bytes, ``messages`` counts messages, the last three fields count datagrams as
    well, all others connections. A fault that drops or cuts a reply changes ``bytes_out``, and not ``messages``.
    """

    accepted: int = 0
    """Connections established, after the PROXY header and TLS handshake if there are any, or closed by the peer
    before it sent a byte of these."""
    active: int = 0
    """Connections open now."""
    refused: int = 0
    """Connections refused because ``limit_connections`` was reached."""
    tls_failures: int = 0
    """Connections closed because the TLS handshake failed, or because of invalid TLS records after it."""
    timeouts_handshake: int = 0
    """Connections closed because the TLS handshake timed out."""
    proxy_failures: int = 0
    """Connections closed because the PROXY header was invalid or missing, or its sender untrusted."""
    messages: int = 0
    """Complete messages answered (always 0 in ``raw`` mode)."""
    bytes_in: int = 0
    """Bytes received, without those of datagrams that were refused."""
    bytes_out: int = 0
    """Bytes of replies, sent or in the write buffer."""
    lost: int = 0
    """Connections closed with an incomplete message."""
    too_long: int = 0
    """Connections closed because a message was longer than ``limit_message_size``."""
    timeouts_idle: int = 0
    """Connections closed after ``timeout_idle`` seconds without input."""
    timeouts_message: int = 0
    """Connections closed because a message or PROXY header was incomplete for ``timeout_message`` seconds."""
    timeouts_write: int = 0
    """Connections aborted because the peer read nothing for ``timeout_write`` seconds."""
    failed: int = 0
    """Connections aborted because of an internal error."""

    datagrams: int = 0
    """Datagrams answered (with ``udp``)."""
    datagrams_refused: Mapping[str, int] = field(default_factory=dict)
    """Datagrams that were not answered, by reason; only reasons that occurred."""
    faults: Mapping[str, int] = field(default_factory=dict)
    """Connections and datagrams on which a fault took effect, by kind; only kinds that occurred."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """Accepted connections that are not open anymore, by reason; only reasons that occurred. Each has exactly one:
    ``accepted`` is the sum of these and ``active``. ``closed`` is a conversation that ended without any other."""

    def __add__(self, other: Stats) -> Stats:
        return combine(self, other, add)

    def __str__(self) -> str:
        refused = [f"datagrams_refused_{reason}={count}" for reason, count in self.datagrams_refused.items()]
        faults = [f"fault_{kind.replace('-', '_')}={count}" for kind, count in self.faults.items()]
        ended = [f"ended_{reason}={count}" for reason, count in self.ended.items()]
        return " ".join([f"{name}={getattr(self, name)}" for name in COUNTERS] + refused + faults + ended)


def find_missing(stats: Stats, expected: Mapping[str, int | Mapping[str, int]]) -> list[str]:
    """Return a text per counter that is less than ``expected``; ``active`` is missing if it is any other number."""
    texts = []
    for name, counts in expected.items():
        by_kind = counts if isinstance(counts, Mapping) else {"": counts}
        for kind, number in by_kind.items():
            value = getattr(stats, name)
            seen = value.get(kind, 0) if kind else value
            if seen < number or (name == "active" and seen != number):
                texts.append(f"{name}{f'[{kind}]' if kind else ''} is {seen}, not {number}")
    return texts


def combine(one: Stats, other: Stats, function: Callable[[int, int], int]) -> Stats:
    """Return what ``function`` makes of each pair of counters."""
    values: dict[str, Any] = {name: function(getattr(one, name), getattr(other, name)) for name in COUNTERS}
    for name in COUNTERS_BY_KIND:
        first, second = getattr(one, name), getattr(other, name)
        values[name] = {kind: function(first.get(kind, 0), second.get(kind, 0)) for kind in {**first, **second}}
    return Stats(**values)


TIMEOUT_ENDS = ("timeout_idle", "timeout_message", "timeout_write")
ENDS = ("closed", "reset", "lost", "too_long", *TIMEOUT_ENDS, "tls_failed", "failed")
"""The reasons in ``ended``."""
COUNTERS_BY_KIND = ("datagrams_refused", "faults", "ended")
"""The names of the fields that have a number per kind."""
COUNTERS = tuple(field.name for field in fields(Stats) if field.name not in COUNTERS_BY_KIND)
"""The names of the fields that are a single number."""
