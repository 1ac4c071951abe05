"""What the checks have in common: options, what earlier checks found, the connections of the current check."""

import errno
import socket
from base64 import b64decode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic, perf_counter, sleep
from typing import Literal

from ..client.connector import connect_first, start_tls
from ..client.endpoint import Endpoint
from ..errors import ConfigError, describe_error
from ..net import AddressInfo
from ..wire.identity import Identity
from .connection import Connection, wait
from .explanation import describe, explain
from .result import Failure

MIN_MESSAGE_SIZE = 16  # bytes
CONNECT_THREADS = 4  # connections that are opened at once: they fit into the smallest backlog
MAX_TIMEOUTS = 12  # for a reply of which bytes are still sent or received
ACCEPT_TIME = 0.01  # seconds for a server to accept a connection that does not show it

ModeName = Literal["auto", "message", "stream", "raw", "identify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options of the checks. Sizes are in bytes, times in seconds."""

    mode: ModeName = "auto"
    connections: int = 50
    size: int = 1_048_576
    idle: float = 2.0
    udp: bool = False


def _decode_identities(lines: bytes) -> bytes:
    """Return the messages in replies of ``identify`` mode. A line that is none is left as it is."""
    messages = []
    for line in lines.splitlines(keepends=True):
        try:
            found = Identity.parse(line)
            content = found.message.encode() if found.message is not None else b64decode(found.message_base64 or "")
            messages.append(content + b"\n")
        except ValueError:
            messages.append(line)
    return b"".join(messages)


@dataclass(frozen=True, slots=True)
class Mode:
    """What a server does with messages: ``decode`` returns those in its replies."""

    name: str
    keeps_open: bool = True
    decode: Callable[[bytes], bytes] = bytes


MESSAGE, STREAM, RAW = Mode("message", keeps_open=False), Mode("stream"), Mode("raw")
IDENTIFY = Mode("identify", decode=_decode_identities)


class Context:
    """The state of a run.

    Attributes:
        endpoint: Where and how to connect.
        settings: The options.
        address: The one that accepted the first connection.
        first: The first connection, which ``connect``, ``tls`` and ``mode`` use one after the other.
        mode: The mode of the server.
        largest: Bytes of the largest message that came back.
        silent: A connection on which nothing is sent, and since when. ``idle`` uses it after other checks have run.
    """

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint, self.settings = endpoint, settings
        self.address: AddressInfo | None = None
        self.first: socket.socket | None = None
        self.mode = STREAM
        self.largest = MIN_MESSAGE_SIZE
        self.silent: tuple[Connection, float] | None = None
        self._connections: list[Connection] = []
        self._reusable: Connection | None = None

    def close_connections(self) -> None:
        for each in self._connections:
            each.close()
        self._connections.clear()
        self._reusable = None

    def close(self) -> None:
        self.close_connections()
        if self.first is not None:
            self.first.close()
        if self.silent is not None:
            self.silent[0].close()

    def adopt(self, connection: Connection) -> Connection:
        """Let the current check use an open connection, and close it."""
        self._connections.append(connection)
        return connection

    def release(self, connection: Connection) -> Connection:
        """Let a later check use a connection."""
        self._connections.remove(connection)
        return connection

    def open(self, *, is_small: bool = False) -> Connection:
        """Open a connection; ``is_small`` makes it one that is full soon."""
        return self.adopt(Connection(self._connect(is_small)))

    def open_many(self, messages: Sequence[bytes]) -> tuple[Sequence[tuple[Connection, bytes]], Failure | None]:
        """Open a connection for each of ``messages``, a few at a time: a small backlog has room for these.

        If the mode permits it, the message is sent, so that the connection is known to be accepted. Return the
        connections with their messages, and the first failure to connect. After one without a reply, none is opened.
        """
        is_stuck = False

        def open_one(message: bytes) -> tuple[Connection, bytes] | Failure | None:
            nonlocal is_stuck
            if is_stuck:
                return None
            try:
                connection = self.open()
            except Failure as failure:
                return failure
            if self.mode.keeps_open:
                connection.send(message)
                is_stuck |= not self.wait_for_reply(connection, 1)
            else:
                sleep(ACCEPT_TIME)
            return connection, message

        with ThreadPoolExecutor(CONNECT_THREADS) as pool:
            results = list(pool.map(open_one, messages))
        failures = [each for each in results if isinstance(each, Failure)]
        return [each for each in results if isinstance(each, tuple)], failures[0] if failures else None

    def _connect(self, is_small: bool) -> socket.socket:
        assert self.address is not None
        deadline = monotonic() + self.endpoint.config.connect_timeout
        try:
            _, connected = connect_first(self.endpoint, [self.address], deadline, is_small=is_small)
            return start_tls(self.endpoint, connected, deadline) if self.endpoint.ssl else connected
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                advice = "raise the descriptor limit, or use fewer connections"
                raise ConfigError(f"cannot open a connection: {describe_error(error)}; {advice}") from error
            raise self.connect_failure(
                error, "a limit of connections, a full backlog, or the server has ended"
            ) from error

    def connect_failure(self, error: OSError | UnicodeError, reason: str) -> Failure:
        """Return the failure for an ``error`` of connecting; without a ``reason``, the usual one of this error."""
        text = str(self.endpoint.connect_error(error, self.endpoint.config.connect_timeout))
        seen, _, hint = text.partition("; ")
        return Failure(seen, reason or hint or "check the address")

    def connection(self) -> Connection:
        """Return a connection for the next message: an open one of this check, or a new one.

        The one before is closed first: a server that serves one client at a time fails no check but ``concurrent``.
        """
        if self._reusable is None or self._reusable.ending or not self.mode.keeps_open:
            if self._reusable is not None:
                self.release(self._reusable).close()
            self._reusable = self.open()
        return self._reusable

    def wait(self, is_done: Callable[[], object], seconds: float | None = None) -> bool:
        """Send and receive on all connections until ``is_done()``, for at most ``seconds`` (default: the timeout)."""
        return wait(self._connections, is_done, self.endpoint.config.timeout if seconds is None else seconds)

    def exchange(self, connection: Connection, data: bytes, truncated: str) -> None:
        """Send messages on a connection; receive and compare the replies."""
        connection.send(data)
        self.finish(connection, data, truncated)

    def finish(self, connection: Connection, sent: bytes, truncated: str) -> None:
        """Receive and compare the replies to messages that were ``sent`` on a connection."""
        self.wait_for_reply(connection, sent.count(b"\n"))
        self.compare(connection, sent, truncated)

    def wait_for_reply(self, connection: Connection, lines: int, min_timeout: float = 0.0) -> bool:
        """Wait for ``lines``, longer than the timeout if bytes are sent or received; return whether it is over."""
        timeout = max(self.endpoint.config.timeout, min_timeout)
        for _ in range(MAX_TIMEOUTS):
            before = connection.progress
            if wait([connection], lambda: connection.ending or connection.lines >= lines, timeout):
                return True
            if connection.progress == before:
                return False
        seen = f"{len(connection.received):,} bytes of replies in {MAX_TIMEOUTS * timeout:g} s, and not the last one"
        raise Failure(seen, "the path or the server is slow: give a longer --timeout")

    def compare(self, connection: Connection, sent: bytes, truncated: str) -> None:
        """Compare what was received with what was ``sent``.

        ``truncated`` is what usually explains a reply that is too short.
        """
        received = self.mode.decode(connection.take())
        if received != sent:
            ending = connection.ending or f"nothing within {self.endpoint.config.timeout:g} s"
            raise Failure(describe(sent, received, ending), explain(sent, received, ending, truncated))

    def measure(self, reason: str, disturb: Callable[[], object] = lambda: None, interval: float = 1.0) -> float:
        """Return the seconds of one exchange, during which ``disturb`` is called every ``interval`` seconds."""
        started, deadline = perf_counter(), monotonic() + self.endpoint.config.timeout
        connection = self.connection()
        connection.send(b"probe\n")
        while not self.wait(lambda: connection.ending or connection.lines, interval) and monotonic() < deadline:
            disturb()
        self.compare(connection, b"probe\n", reason)
        return perf_counter() - started
