"""Where a client connects and how: options, addresses, the retry schedule and errors; without an event loop."""

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from ssl import SSLCertVerificationError, SSLError, SSLObject, SSLSocket, create_default_context
from time import monotonic, perf_counter
from typing import Any, TypeVar, Unpack

from ..compat import set_reset_on_close
from ..config import HOST, PORT, ClientConfig, ClientOptions, StrPath
from ..errors import ConfigError, ConnectError, ConnectTimeout, describe_error
from ..net import AddressInfo, format_address
from ..wire.text import escape

CONNECTION_ATTEMPT_DELAY = 0.25  # seconds until the next address is tried as well (RFC 8305)
MIN_RETRY_DELAY, MAX_RETRY_DELAY = 0.02, 0.5  # seconds between attempts, doubled each time
UNIX_RETRY_DELAY = 0.005  # seconds until a Unix socket with a full backlog is tried again

SocketT = TypeVar("SocketT", bound=socket.socket)
T = TypeVar("T")

log = logging.getLogger("echo_async.client")


class Endpoint:
    """A server and the options of a client. ``name`` is the address of the server in error messages."""

    def __init__(self, host: str = HOST, port: int = PORT, **options: Unpack[ClientOptions]) -> None:
        given: dict[str, Any] = {**options}
        self.config = config = ClientConfig(host=host, port=port, **given)
        self.ssl = create_default_context() if config.ssl is True else config.ssl or None
        self.server_hostname = tls_hostname(config.server_hostname, host, config.uds) if self.ssl else None
        self.name = format_address((escape(host), port) if config.uds is None else config.uds)
        self.numeric: Sequence[AddressInfo] = ()  # the address, if it needs no resolver
        with suppress(OSError, UnicodeError):
            self.numeric = self.resolve(socket.AI_NUMERICHOST)

    def resolve(self, flags: int = 0) -> Sequence[AddressInfo]:
        """Return each address of the host once, the families in turn (RFC 8305 section 4), or that of the Unix socket.

        Blocks while the resolver is asked, if the host is a name.
        """
        if self.config.uds is not None:
            return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", os.fspath(self.config.uds))]
        # A server that listens on :: is on this machine, which may have no IPv6 address.
        hosts = ("::", "127.0.0.1") if self.config.host == "::" else (self.config.host,)
        families: dict[int, dict[AddressInfo, None]] = {}
        for host in hosts:
            for info in socket.getaddrinfo(host, self.config.port, type=socket.SOCK_STREAM, flags=flags):
                families.setdefault(info[0], {})[info] = None
        return [info for turn in zip_longest(*families.values()) for info in turn if info is not None]

    async def connect(self, attempt: Callable[[float], Awaitable[T]], sleep: Callable[[float], Awaitable[object]]) -> T:
        """Return the result of ``attempt(seconds)``, which connects; repeat it for the seconds of the option ``retry``.

        Raises:
            ConnectError: The error of the last attempt, translated.
        """
        seconds, delay, deadline = self.config.connect_timeout, MIN_RETRY_DELAY, monotonic() + self.config.retry
        while True:
            log.debug("connecting to %s", self.name)
            try:
                return await attempt(seconds)
            except (OSError, UnicodeError) as error:
                failure, left = self.connect_error(error, seconds), deadline - monotonic()
                if left <= 0 or isinstance(error, SSLCertVerificationError):
                    raise failure from error
            pause = min(delay, left)
            delay = min(2 * delay, MAX_RETRY_DELAY)
            seconds = min(self.config.connect_timeout, max(left - pause, MIN_RETRY_DELAY))
            log.debug("%s; retrying in %.3f s", failure, pause)
            await sleep(pause)

    def start(self, connected: socket.socket, started: float) -> None:
        """Log a new connection and send the PROXY header, if one is configured."""
        duration = 1e3 * (perf_counter() - started)
        with closed_on_error(connected):
            if log.isEnabledFor(logging.DEBUG):
                source = format_address(connected.getsockname())  # the peer in the log of the server
                log.debug("connected to %s from %s in %.3f ms", self.name, source, duration)
            if self.config.send_proxy is not None:
                self._send_proxy_header(connected, self.config.send_proxy)

    def _send_proxy_header(self, connected: socket.socket, version: str) -> None:
        from ..wire.proxy import build_header, parse_address

        source = self.config.proxy_source
        addresses = [connected.getsockname(), connected.getpeername()]
        client, server = (each[:2] if isinstance(each, tuple) else None for each in addresses)
        client = client if source is None else parse_address(source)
        header = build_header(version, client, server or (client[0], 0) if client else ("", 0))
        connected.send(header)  # the buffer of a new connection has room for it

    def connect_error(self, error: OSError | UnicodeError, seconds: float) -> ConnectError:
        """Translate the ``error`` of an attempt to connect that had ``seconds``."""
        kind, reason, hint = ConnectError, describe_error(error), _HINTS.get(getattr(error, "errno", None) or 0, "")
        if isinstance(error, socket.gaierror | UnicodeError):
            hint = "; check the host name"
        elif isinstance(error, TimeoutError):
            kind, hint = ConnectTimeout, "; check the address"
            reason = reason if error.errno else f"timed out after {seconds:g} s"
        elif isinstance(error, SSLError):
            reason, hint = f"TLS: {reason}", ""
        return kind(f"cannot connect to {self.name}: {reason}{hint}")


_HINTS = {
    errno.ECONNREFUSED: "; is the server running?",
    errno.ENOENT: "; is the server running?",
    errno.ECONNRESET: "; does the server use TLS?",
}


def tls_hostname(server_hostname: str | None, host: str, uds: StrPath | None) -> str:
    """Return the name for SNI and for the verification of the certificate: without a zone, and without a final dot.

    The dot of a fully qualified name is for the resolver only (RFC 6066 section 3).
    """
    if server_hostname is not None:
        try:
            server_hostname.encode("idna")  # as the ssl module does, in the middle of the handshake
        except UnicodeError as error:
            raise ConfigError(f"invalid server_hostname: {server_hostname!r} (must be a host name)") from error
    name = server_hostname or ("localhost" if uds is not None else host.partition("%")[0])
    return name.removesuffix(".")


@contextmanager
def closed_on_error(connecting: SocketT) -> Iterator[SocketT]:
    try:
        yield connecting
    except BaseException:
        connecting.close()
        raise


def new_socket(info: AddressInfo) -> socket.socket:
    family, kind, protocol, _, address = info
    created = socket.socket(family, kind, protocol)
    created.setblocking(False)
    if isinstance(address, tuple):
        created.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return created


def refuse_self_connection(connected: socket.socket, peer: Any = None) -> None:
    """Raise ConnectionRefusedError if ``connected`` is connected to itself; closing it then frees its port at once.

    The system can select the port that a client connects to as the port of the client. If no server listens, a SYN
    then meets itself (RFC 9293 section 3.5, simultaneous open), and a datagram arrives where it was sent. ``peer`` is
    the numeric address of a socket that may still be connecting.
    """
    try:
        is_own_peer = connected.getsockname() == (peer or connected.getpeername())
    except OSError:  # it was reset meanwhile
        return
    if is_own_peer:
        if connected.type == socket.SOCK_STREAM:
            set_reset_on_close(connected)  # in TIME_WAIT, the port would be in use
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def log_tls(connection: SSLObject | SSLSocket, started: float) -> None:
    """Log a TLS handshake that began at ``started``, in seconds of ``perf_counter``."""
    if log.isEnabledFor(logging.DEBUG):
        cipher = connection.cipher()
        duration = 1e3 * (perf_counter() - started)
        log.debug("TLS handshake completed in %.3f ms: %s, %s", duration, connection.version(), cipher and cipher[0])
