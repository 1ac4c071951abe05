"""The server: ``serve`` and ``EchoServer`` for programs, ``python -m echo_async.server`` for people."""

from .server import EchoServer, serve

__all__ = ["EchoServer", "serve"]
