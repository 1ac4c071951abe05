"""The counters of a server, as one value that can be compared, added and logged."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of a server's counters since its start. ``a + b`` adds the counters of two servers.

    ``bytes_in`` and ``bytes_out`` count bytes, ``messages`` counts messages, all other fields count connections.
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
    """Complete messages answered (always 0 in mode ``raw``)."""
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

    def __add__(self, other: Stats) -> Stats:
        return Stats(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
