"""A server for tests of plain Python, asyncio, trio or anyio programs: an echo, and what else a test needs of a peer.

It runs in threads of its own, so it does not depend on the event loop of a test. It starts within a few milliseconds,
and :meth:`HostedServer.close` does not wait for connected clients.
"""

from .hosted_server import HostedServer, HostedServerOptions
from .peer import Peer
from .recorder import RecordedConnection

__all__ = ["HostedServer", "HostedServerOptions", "Peer", "RecordedConnection"]
