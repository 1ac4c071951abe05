"""The asyncio client.

``client``      the public API: connect, echo, EchoClient
``session``     which connection a message is sent on
``stream``      many messages in a bounded window
``connection``  one connection
``connector``   opening a connection
"""

from .client import EchoClient, connect, echo

__all__ = ["EchoClient", "connect", "echo"]
