"""The counters of a server, as one value that can be compared, added up and logged."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a server has seen so far. Sizes are in bytes. ``a + b`` adds two servers up."""

    accepted: int = 0
    """Connections that were let in."""
    active: int = 0
    """Those of them that are open now."""
    refused: int = 0
    """Connections closed at once, because ``limit_connections`` were open."""
    tls_failures: int = 0
    """Connections that failed in the TLS handshake."""
    timeouts_handshake: int = 0
    """Connections closed because the TLS handshake took too long."""
    proxy_failures: int = 0
    """Connections closed for a PROXY header that was bad or missing, or whose sender was not allowed to send one."""
    messages: int = 0
    """Complete messages that were answered (none in ``raw`` mode)."""
    bytes_in: int = 0
    bytes_out: int = 0
    """Bytes of replies, delivered or on their way."""
    lost: int = 0
    """Connections that ended in mid-message."""
    too_long: int = 0
    """Connections closed for a message over ``limit_message_size``."""
    timeouts_idle: int = 0
    timeouts_message: int = 0
    timeouts_write: int = 0
    failed: int = 0
    """Connections closed for an error of the server's own."""

    def __add__(self, other: Stats) -> Stats:
        return Stats(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
