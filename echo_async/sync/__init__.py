"""The blocking twins, for programs without an event loop: ``serve`` on threads, ``connect`` and ``echo``."""

from .server import EchoServer, serve

__all__ = ["EchoServer", "serve"]
