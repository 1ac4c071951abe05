"""The exceptions of this package::

    EchoError
    ├── ConfigError           an option is invalid (also a ValueError)
    ├── StartError            the server cannot start
    ├── ConnectError          the client cannot connect (also a ConnectionError)
    │   └── ConnectTimeout    connecting timed out (also a TimeoutError)
    ├── MessageError          the message is invalid (also a ValueError)
    └── ReplyError            the reply is missing or different from the message
        ├── ReplyLost         the connection was lost before the reply was complete (also a ConnectionError)
        ├── ReplyLate         the reply timed out (also a TimeoutError)
        └── ReplyDifferent    the reply differs from the message

The text of each names the operation, the address or option, the reason, and what to do.
"""

import os
import socket
import ssl

_SOCKET_ERRORS: dict[int, str] = getattr(socket, "errorTab", {})  # of Windows, where os.strerror lacks them


class EchoError(Exception):
    """Base class of all exceptions of this package."""


class ConfigError(EchoError, ValueError):
    """An option has an invalid value, or conflicts with another option."""


class StartError(EchoError):
    """The server cannot start: address in use, unknown host, invalid certificate, uvloop not installed."""


class ConnectError(EchoError, ConnectionError):
    """The client cannot connect: connection refused, unknown host, failed TLS handshake."""


class ConnectTimeout(ConnectError, TimeoutError):
    """The connection was not established within ``connect_timeout`` seconds."""


class MessageError(EchoError, ValueError):
    """The message is invalid, for example because it contains a newline before its end."""


class ReplyError(EchoError):
    """The reply is missing, or is not the echo of the message."""


class ReplyLost(ReplyError, ConnectionError):
    """The connection was closed or reset before the reply was complete."""


class ReplyLate(ReplyError, TimeoutError):
    """The reply was not complete within ``timeout`` seconds."""


class ReplyDifferent(ReplyError):
    """The reply differs from the message.

    Attributes:
        offset: Index of the first byte of the reply that differs, from 0.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message, offset)
        self.offset = offset

    def __str__(self) -> str:
        return str(self.args[0])


def failure_kind(error: BaseException | None) -> str:
    """Return the kind of a client's failure, as ``--json`` prints it; without an error, the peer closed.

    A lost connection, and a failure to connect, are of the kind of the error that caused them.
    """
    match error:
        case ReplyDifferent():
            return "mismatch"
        case ReplyLate():
            return "late"
        case ReplyLost() | ConnectError():
            return failure_kind(error.__cause__)
        case ssl.SSLError():
            return "tls"
        case socket.gaierror() | UnicodeError():
            return "dns"
        case TimeoutError():
            return "timeout"
        case ConnectionRefusedError() | FileNotFoundError():
            return "refused"
        case ConnectionError():
            return "reset"
        case None:
            return "closed"
        case _:
            return "unreachable"


def describe_error(error: Exception) -> str:
    """Return the reason of an error in lower case, as error messages and log lines show it.

    Examples: ``connection refused``, ``name or service not known``, ``certificate verify failed: ...``.
    """
    if isinstance(error, ssl.SSLError):
        reason = (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")
        detail = getattr(error, "verify_message", "")
        return f"{reason}: {detail}" if detail else reason
    if isinstance(error, UnicodeError):
        return "not a host name"
    if isinstance(error, socket.gaierror):  # its errno is not one of os.strerror
        return str(error.strerror or error).lower()
    if isinstance(error, OSError) and error.errno:
        return _SOCKET_ERRORS.get(error.errno, os.strerror(error.errno)).rstrip(".").lower()
    return str(error).lower() or type(error).__name__
