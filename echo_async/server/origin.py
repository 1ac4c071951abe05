"""What an acceptor knows of a connection before its engine serves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..wire.faults import FaultPlan
    from ..wire.proxy import ProxyHeader


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a connection comes from, and which faults it has.

    ``peername`` is the address of the client: of the peer, unless the PROXY header has another. None: the transport
    knows it.
    """

    peername: object = None
    header: ProxyHeader | None = None
    plan: FaultPlan | None = None

    def proxied(self, header: ProxyHeader) -> Origin:
        """Return the origin that ``header`` states."""
        return replace(self, peername=header.source or self.peername, header=header)


UNKNOWN = Origin()
