"""Everything that goes wrong in a way this package knows, as one tree::

    EchoError
    ├── ConfigError           an option has a value that makes no sense (also a ValueError)
    ├── StartError            the server cannot start: address in use, no such host, no uvloop
    ├── ConnectError          the client cannot connect (also a ConnectionError)
    │   └── ConnectTimeout    ... within its time (also a TimeoutError)
    ├── MessageError          a message that cannot be sent as one message (also a ValueError)
    └── ReplyError            a connection was there, but the reply is not the echo
        ├── ReplyLost         the server closed before the whole reply was there
        ├── ReplyLate         the reply was not there in time (also a TimeoutError)
        └── ReplyDifferent    the server answered something else

Each says what was done, to whom, and what to do about it.
"""

from __future__ import annotations

import os
import socket
import ssl

__all__ = [
    "ConfigError",
    "ConnectError",
    "ConnectTimeout",
    "EchoError",
    "MessageError",
    "ReplyDifferent",
    "ReplyError",
    "ReplyLate",
    "ReplyLost",
    "StartError",
]


class EchoError(Exception):
    """The base of all errors that this package raises on purpose."""


class ConfigError(EchoError, ValueError):
    """An option has a value that makes no sense."""


class StartError(EchoError):
    """The server cannot start."""


class ConnectError(EchoError, ConnectionError):
    """The client cannot connect."""


class ConnectTimeout(ConnectError, TimeoutError):
    """The client could not connect within its time."""


class MessageError(EchoError, ValueError):
    """A message that cannot be sent as one message."""


class ReplyError(EchoError):
    """The reply is not the echo of what was sent."""


class ReplyLost(ReplyError, ConnectionError):
    """The server closed, or the connection broke, before the whole reply was there."""


class ReplyLate(ReplyError, TimeoutError):
    """The whole reply was not there in time."""


class ReplyDifferent(ReplyError):
    """The server answered something else. ``offset`` is the first byte of the reply that differs."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message, offset)
        self.offset = offset

    def __str__(self) -> str:
        return str(self.args[0])


def describe_error(error: Exception) -> str:
    """``connection refused``, ``name or service not known``, ``certificate verify failed: ...``"""
    if isinstance(error, ssl.SSLError):
        words = (error.reason or str(error)).lower().replace("_", " ")
        detail = getattr(error, "verify_message", "")
        return f"{words}: {detail}" if detail else words
    if isinstance(error, UnicodeError):
        return "not a host name"
    if isinstance(error, socket.gaierror):  # its numbers are not those of the system
        return str(error.strerror or error).lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error).lower() or type(error).__name__
