"""The blocking API, for programs without an event loop: ``serve`` on threads, ``connect`` and ``echo``."""

from .client import EchoClient, connect, echo
from .server import EchoServer, serve

__all__ = ["EchoClient", "EchoServer", "connect", "echo", "serve"]
