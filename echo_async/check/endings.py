"""Checks of how a connection ends: by the client, by the server, by a reset, by a timeout on the path."""

from time import monotonic

from .connection import END, Connection
from .context import Context
from .explanation import describe, explain
from .messages import make_text
from .result import Failure, Skip

HALF_CLOSE_SIZE = 65_536  # bytes
UNREAD_SIZE = 131_072  # bytes after the message, more than a server reads at once
IDLE_MESSAGE = b"idle\n"
RESET_SIZE = 16_384  # bytes
RESET_WAIT = 0.05  # seconds in which the server notices resets


def _wait_for_end(context: Context, connection: Connection, reason: str) -> None:
    if not context.wait(lambda: connection.ending):
        received = len(connection.received)
        raise Failure(f"{received:,} bytes, then no end within {context.endpoint.config.timeout:g} s", reason)


def check_half_close(context: Context) -> str:
    if context.endpoint.ssl is not None:
        raise Skip("TLS has no half-close: its end of one direction ends both")
    size = min(HALF_CLOSE_SIZE, context.largest)
    for message in (make_text(16), make_text(size)):
        connection = context.open()
        connection.send(message, ends_input=True)
        _wait_for_end(context, connection, "the end of input does not reach the server, or the server does not close")
        ending = connection.ending
        context.compare(connection, message, "something on the path closes both directions at once")
        if ending != END:
            raise Failure(f"all replies, then {ending}", "something on the path ends a connection by a reset")
    return f"replies of 16 and {size:,} bytes, each then the end"


def check_close(context: Context) -> str:
    if context.mode.keeps_open:
        raise Skip(f"in mode {context.mode.name} the client ends the connection")
    message = make_text(16)
    for rest in (b"", make_text(UNREAD_SIZE)):
        connection = context.open()
        connection.send(message + rest)
        _wait_for_end(context, connection, "the server does not close the connection after the reply")
        ending = connection.ending
        unread = "closing a socket with unread input sends a reset: shut down the sending side, then read to the end"
        context.compare(connection, message, unread)
        if ending != END:
            raise Failure(f"the reply, then {ending}, with {len(rest):,} more bytes sent", unread)
        context.release(connection).close()  # a server may wait for that before it accepts another
    return f"the reply, then the end, also with {UNREAD_SIZE:,} more bytes sent"


def check_incomplete(context: Context) -> str:
    message = b"incomplete"
    connection = context.open()
    connection.send(message, ends_input=True)
    _wait_for_end(context, connection, "the server waits for a newline: at the end of input, recv returns no bytes")
    ending, received = connection.ending, connection.take()
    if received not in (b"", message):
        raise Failure(describe(message, received, ending), explain(message, received, ending, ""))
    return f"{len(received)} of {len(message)} bytes, then {ending}"


def begin_silence(context: Context) -> None:
    """Open the connection that is silent until :func:`check_idle`, and use it before, if the mode permits that."""
    connection = context.open()
    if context.mode.keeps_open:
        context.exchange(connection, IDLE_MESSAGE, "a connection beside others is not served")
    context.silent = (context.release(connection), monotonic())


def check_idle(context: Context) -> str:
    if context.silent is None:
        begin_silence(context)
    assert context.silent is not None
    connection, since = context.silent
    context.adopt(connection)
    context.wait(lambda: connection.ending or connection.received, since + context.settings.idle - monotonic())
    silence = monotonic() - since
    if connection.ending or connection.received:
        seen = f"{len(connection.received)} bytes, then {connection.ending or 'nothing'}, within {silence:.1f} s"
        raise Failure(seen, "an idle timeout on the path or in the server")
    context.exchange(connection, IDLE_MESSAGE, "an idle timeout on the path or in the server, without an end")
    return f"a reply after {silence:.1f} s of silence"


def check_reset(context: Context) -> str:
    """Reset connections: a new one, one within a message, one whose reply has begun. Use one before, and after."""
    message, reason = b"reset\n", "a reset ends more than its connection: the server, a task, or a shared connection"
    other = context.open()
    if context.mode.keeps_open:
        context.exchange(other, message, reason)
    for data in (b"", b"incomplete", make_text(min(RESET_SIZE, context.largest))):
        connection = context.open()
        connection.send(data)
        if data.endswith(b"\n"):
            context.wait(lambda: connection.ending or connection.received)  # noqa: B023
        connection.reset()
    context.wait(lambda: False, RESET_WAIT)
    context.exchange(other, message, reason)
    for _ in range(3):
        context.exchange(context.open(), message, reason)
    return "3 connections reset, all others answered"
