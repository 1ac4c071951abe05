"""The asyncio client: ``connect``, ``echo`` and ``EchoClient``."""

from .client import EchoClient, connect, echo

__all__ = ["EchoClient", "connect", "echo"]
