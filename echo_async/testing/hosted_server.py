"""The server of a test."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Self, Unpack, cast, get_args

from ..compat import is_closed_by_peer
from ..config import ServerConfig, ServerOptions
from ..errors import ConfigError
from ..server.base_server import CHECK_INTERVAL
from ..server.scripts import Scripts
from ..stats import Stats
from ..sync import EchoServer
from ..wire.faults import FaultSchedule, parse_sequence
from ..wire.script import Script
from .certificates import Certificates, TlsKind
from .recorder import RecordedConnection, Recorder
from .scripts import Handler, HandlerScript, Reply, ReplyOptions, ReplyScript, is_reply

if TYPE_CHECKING:
    from ..engines.connection import Connection
    from ..engines.threads import ThreadConnection

SETTLE_TIMEOUT = 1.0  # seconds for what serves a client that is gone
NO_TLS_REPLY = b"this server does not speak TLS\n"

_TLS_VALUES = (False, True, *get_args(TlsKind))
_CHECKS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # None is allowed as well
    "tls": (f"choose from {', '.join(map(str, _TLS_VALUES))}", lambda each: each in _TLS_VALUES),
    "greeting": ("must be bytes", is_reply),
    "reply": ("must be bytes, or a function that returns bytes or None", lambda each: callable(each) or is_reply(each)),
    "replies": (
        "must be a list of bytes and None",
        lambda each: isinstance(each, Sequence) and all(map(is_reply, each)),
    ),
    "handler": ("must be a function, and not async", lambda each: callable(each) and not iscoroutinefunction(each)),
}


class HostedServerOptions(ServerOptions, total=False):
    """The keyword arguments of :class:`HostedServer`, each of them optional."""

    tls: bool | TlsKind
    greeting: bytes
    reply: bytes | Reply | None
    replies: Sequence[bytes | None] | None
    handler: Handler | None


class HostedServer:
    """A running server for tests, by default an echo on a free port and in ``stream`` mode.

    It is a context manager that closes the server. All methods can be called from any thread.

    Attributes:
        client_context: A TLS context that trusts only the certificate of this server, or None without ``tls``.

    Args:
        tls: Whether to serve TLS, with a new certificate for ``host``, ``localhost``, 127.0.0.1 and ::1. Or what is
            wrong with it: "expired", "wrong-host" or "untrusted" certificates, a handshake that is "stalled", or a
            server that is "plain" and speaks no TLS.
        greeting: What is sent first on each connection.
        reply: What is sent instead of each echo, or a function of the message that returns that; None for no reply.
        replies: One for each message of a connection, None for no reply. The connection is closed after the last.
        handler: A function that serves each connection instead, in a thread of its own, and is called with a
            :class:`Peer`. It conflicts with faults, modes and replies.
        **options: The options of :func:`echo_async.serve`. The engine is ``threads``.

    Raises:
        ConfigError: An option is invalid, or the engine is not ``threads``.
        StartError: The server cannot listen, or ``tls`` needs a certificate and trustme is not installed.
    """

    def __init__(
        self,
        *,
        tls: bool | TlsKind = False,
        greeting: bytes = b"",
        reply: bytes | Reply | None = None,
        replies: Sequence[bytes | None] | None = None,
        handler: Handler | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        own = {"tls": tls, "greeting": greeting or None, "reply": reply, "replies": replies, "handler": handler}
        for name, (requirement, is_valid) in _CHECKS.items():
            if own[name] is not None and not is_valid(own[name]):
                raise ConfigError(f"invalid {name}: {own[name]!r} ({requirement})")
        _check_conflicts(handler, {**options, **own})
        if reply is not None and replies is not None:
            raise ConfigError("reply and replies are mutually exclusive")
        given: ServerOptions = {"port": 0, "mode": "stream", "engine": "threads", **options}
        if given["engine"] != "threads":
            raise ConfigError(f"invalid engine: {given['engine']!r} (must be 'threads')")
        if tls == "stalled":
            given["fault"] = "stall"
        elif tls == "plain" and handler is None and reply is None and replies is None:
            given["mode"], replies = "raw", [NO_TLS_REPLY]
        self._handler = handler
        self._has_functions = handler is not None or callable(reply)
        self.client_context: ssl.SSLContext | None = None
        with ExitStack() as files:
            has_certificate = tls and tls not in ("stalled", "plain")
            if tls:
                certificates = Certificates(given.get("host", "localhost"), files)
                self.client_context = certificates.client_context
            if has_certificate:
                given["ssl_certfile"] = certificates.issue(True)
            config = ServerConfig(**given)
            self._seed = config.fault_seed
            self._recorder = Recorder(config, has_handler=handler is not None)
            self._replies = ReplyOptions(greeting, reply, replies, config.mode == "raw", self._recorder.errors)
            self._scripts = Scripts(config, self._make_script)
            self._server = EchoServer(config, self._recorder, self._scripts)
            self._acceptor = self._server._acceptor
            if has_certificate and tls is not True:  # a start validates its certificate
                assert self._acceptor.certificates is not None
                self._acceptor.certificates.context.load_cert_chain(certificates.issue(tls))

    def _make_script(self, connection: Connection, inner: Script) -> Script:
        served = cast("ThreadConnection", connection)
        if self._handler is not None:
            return HandlerScript(self._handler, served, self._recorder.errors)
        return ReplyScript(served, inner, self._replies)

    @property
    def address(self) -> tuple[str, int]:
        """The address that clients connect to, also after ``close``.

        Returns:
            Host and port. For a Unix socket the value is its path.
        """
        return self._server.address

    @property
    def port(self) -> int | None:
        """The port, or None for a Unix socket."""
        return self._server.port

    # What the server saw.

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return self._server.stats

    @property
    def connections(self) -> list[RecordedConnection]:
        """All connections so far, in the order in which they were established."""
        return list(self._recorder.seen)

    @property
    def received(self) -> list[bytes]:
        """The complete messages of all connections, including their newlines, in the order of arrival.

        A message is in the list before its reply is sent. In ``raw`` mode each item is the data of one read.
        """
        return self._recorder.received

    @property
    def datagrams(self) -> list[bytes]:
        """The datagrams that were answered (with ``udp``), in the order of arrival."""
        return self._recorder.datagrams

    def wait_for(self, *, timeout: float = 5.0, **counters: int | Mapping[str, int]) -> None:
        """The same as :meth:`echo_async.EchoServer.wait_for`, but it blocks: in a coroutine, call it in a thread."""
        self._server.wait_for(timeout=timeout, **counters)

    # What a test changes.

    def disconnect(self, *, reset: bool = False) -> None:
        """The same as :meth:`echo_async.EchoServer.disconnect`, but it blocks."""
        self._server.disconnect(reset=reset)

    @contextmanager
    def fault(self, spec: str) -> Iterator[None]:
        """Give the connections that are accepted in the block a fault instead of that of the options.

        Of several blocks, also of several threads, the one that began last decides.

        Args:
            spec: Such as "reset=5", or "none". Not "no-accept".

        Raises:
            ConfigError: ``spec`` is invalid, or the server has a handler.
        """
        try:
            parse_sequence([spec])
        except ValueError as error:
            raise ConfigError(f"invalid fault: {spec!r} ({error})") from error
        _check_conflicts(self._handler, {"fault": spec})
        schedules, schedule = self._scripts.schedules, FaultSchedule(spec, None, self._seed)
        self._acceptor.call(partial(schedules.append, schedule))
        try:
            yield
        finally:
            self._acceptor.call(partial(schedules.remove, schedule))

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Refuse connections in the block. The port stays reserved, and connections that are open are served."""
        self._acceptor.call(self._acceptor.stop_listening)
        try:
            yield
        finally:
            self._acceptor.call(self._acceptor.resume_listening)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Receive messages in the block, and reply at its end: of several blocks, at that of the last."""
        holds, hold = self._replies.holds, object()
        holds.append(hold)
        try:
            yield
        finally:
            holds.remove(hold)

    def close(self) -> None:
        """Abort all connections, stop listening, and return when the threads have ended. Idempotent.

        Raises:
            BaseException: What the handler or the reply function raised, once: a group if there were several.
            TypeError: The reply function returned neither bytes nor None.
        """
        self._server.abort()
        self._server.wait_closed()
        self._raise_errors()

    def raise_errors(self) -> None:
        """Raise what functions of the test have raised so far, as ``close`` does.

        What serves a client that is gone has a second to end before.
        """
        if self._has_functions:
            self._acceptor.call(lambda: None)
            deadline = time.monotonic() + SETTLE_TIMEOUT
            while any(map(_is_abandoned, list(self._recorder.connections))) and time.monotonic() < deadline:
                time.sleep(CHECK_INTERVAL)
            self._raise_errors()

    def _raise_errors(self) -> None:
        errors = self._recorder.errors[:]
        self._recorder.errors.clear()
        if len(errors) > 1:
            raise BaseExceptionGroup(f"{len(errors)} connections failed", errors)
        if errors:
            raise errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_conflicts(handler: Handler | None, others: Mapping[str, object]) -> None:
    if handler is not None:
        for name in ("greeting", "reply", "replies", "mode", "fault", "fault_sequence"):
            if others.get(name) is not None:
                raise ConfigError(f"handler conflicts with {name}")


def _is_abandoned(connection: Connection) -> bool:
    """Whether the client of a connection is gone, which the server has not found out yet."""
    with suppress(OSError, ValueError):  # it is closed meanwhile
        return is_closed_by_peer(connection.get_extra_info("socket"))
    return False
