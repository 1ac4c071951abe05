"""The counters of a server, as one value that can be compared, added and logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

__all__ = ["Stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of a server's counters since its start. ``a + b`` adds the counters of two servers.

    ``bytes_in`` and ``bytes_out`` count bytes, ``messages`` counts messages, all other fields count connections.
    A fault that drops or cuts a reply changes ``bytes_out``, and not ``messages``.
    """

    accepted: int = 0
    """Connections established, after the PROXY header and TLS handshake if there are any, or closed by the peer
    before it sent a byte of these."""
    active: int = 0
    """Connections open now."""
    refused: int = 0
    """Connections refused because ``limit_connections`` was reached."""
    tls_failures: int = 0
    """Connections closed because the TLS handshake failed."""
    timeouts_handshake: int = 0
    """Connections closed because the TLS handshake timed out."""
    proxy_failures: int = 0
    """Connections closed because the PROXY header was invalid or missing, or its sender untrusted."""
    messages: int = 0
    """Complete messages answered (always 0 in ``raw`` mode)."""
    bytes_in: int = 0
    """Bytes received."""
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

    faults: Mapping[str, int] = field(default_factory=dict)
    """Connections on which a fault took effect, by kind; only kinds that occurred."""

    def __add__(self, other: Stats) -> Stats:
        faults = {
            kind: self.faults.get(kind, 0) + other.faults.get(kind, 0) for kind in {**self.faults, **other.faults}
        }
        return Stats(**{name: getattr(self, name) + getattr(other, name) for name in COUNTERS}, faults=faults)

    def __str__(self) -> str:
        faults = [f"fault_{kind.replace('-', '_')}={count}" for kind, count in self.faults.items()]
        return " ".join([f"{name}={getattr(self, name)}" for name in COUNTERS] + faults)


COUNTERS = tuple(field.name for field in fields(Stats) if field.name != "faults")
"""The names of the fields that are a single number."""
