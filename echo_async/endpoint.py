"""Where a client connects and how: options, addresses, the retry schedule and errors; without an event loop."""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from ssl import SSLCertVerificationError, SSLContext, SSLError, SSLObject, SSLSocket, create_default_context
from time import monotonic, perf_counter
from typing import TypedDict

from .config import CONNECT_TIMEOUT, HOST, PORT, REPLY_TIMEOUT, check_seconds
from .errors import ConfigError, ConnectError, ConnectTimeout, describe_error
from .net import AddressInfo, format_address

CONNECTION_ATTEMPT_DELAY = 0.25  # seconds until the next address is tried as well (RFC 8305)
MIN_RETRY_DELAY, MAX_RETRY_DELAY = 0.02, 0.5  # seconds between attempts, doubled each time
UNIX_RETRY_DELAY = 0.005  # seconds until a Unix socket with a full backlog is tried again

log = logging.getLogger("echo_async.client")


class ClientOptions(TypedDict, total=False):
    """The keyword arguments of ``connect`` and ``echo``."""

    uds: str | os.PathLike[str] | None
    timeout: float
    connect_timeout: float
    retry: float
    ssl: SSLContext | bool | None
    server_hostname: str | None


class Endpoint:
    """The validated arguments of ``connect``. ``name`` is the address of the server in error messages."""

    def __init__(
        self,
        host: str = HOST,
        port: int = PORT,
        *,
        uds: str | os.PathLike[str] | None = None,
        timeout: float = REPLY_TIMEOUT,
        connect_timeout: float = CONNECT_TIMEOUT,
        retry: float = 0.0,
        ssl: SSLContext | bool | None = None,
        server_hostname: str | None = None,
    ) -> None:
        check_seconds("timeout", timeout)
        check_seconds("connect_timeout", connect_timeout)
        if not isinstance(retry, int | float) or not 0 <= retry < math.inf:
            raise ConfigError(f"invalid retry: {retry!r} (must be a number of seconds, 0 or greater)")
        if server_hostname is not None and not ssl:
            raise ConfigError("server_hostname requires ssl")
        self.uds = None if uds is None else os.fspath(uds)
        if self.uds is None:
            _check_address(host, port)
        elif not self.uds or "\0" in self.uds[1:]:
            raise ConfigError(f"invalid uds: {self.uds!r} (must be the path of a Unix socket)")
        self.host, self.port = host, port
        self.timeout, self.connect_timeout, self.retry = timeout, connect_timeout, retry
        self.ssl = create_default_context() if ssl is True else ssl or None
        self.server_hostname = server_hostname or ("localhost" if uds is not None else host.partition("%")[0])
        self.name = format_address((host, port) if self.uds is None else self.uds)
        self.numeric: Sequence[AddressInfo] = ()  # the address, if the host is one and needs no resolver
        with suppress(OSError, UnicodeError):
            self.numeric = self.resolve(socket.AI_NUMERICHOST)

    def resolve(self, flags: int = 0) -> Sequence[AddressInfo]:
        """Return each address of the host once. Blocks while the resolver is asked, if the host is a name."""
        infos = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=flags)
        return list(dict.fromkeys(infos))

    def connect_error(self, error: OSError | UnicodeError, seconds: float) -> ConnectError:
        """Translate the ``error`` of an attempt to connect that had ``seconds``."""
        kind, reason, advice = ConnectError, describe_error(error), _advice(error)
        if isinstance(error, TimeoutError):
            kind, advice = ConnectTimeout, "; check the address"
            reason = reason if error.errno else f"timed out after {seconds:g} s"
        elif isinstance(error, SSLError):
            reason, advice = f"TLS: {reason}", ""
        return kind(f"cannot connect to {self.name}: {reason}{advice}")


def _check_address(host: str, port: int) -> None:
    if not isinstance(host, str) or not host or "\0" in host:
        raise ConfigError(f"invalid host: {host!r} (must be a host name or an address)")
    if not isinstance(port, int) or not 1 <= port <= 65535:
        raise ConfigError(f"invalid port: {port!r} (must be an integer from 1 to 65535)")


_ADVICE = {
    errno.ECONNREFUSED: "; is the server running?",
    errno.ENOENT: "; is the server running?",
    errno.ECONNRESET: "; does the server use TLS?",
}


def _advice(error: OSError | UnicodeError) -> str:
    if isinstance(error, socket.gaierror | UnicodeError):
        return "; check the host name"
    return _ADVICE.get(error.errno or 0, "")


class RetrySchedule:
    """When to try to connect again, and ``timeout``, the seconds for the next attempt."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.timeout = self._connect_timeout = endpoint.connect_timeout
        self._deadline = monotonic() + endpoint.retry
        self._delay = MIN_RETRY_DELAY

    def next_delay(self, error: ConnectError) -> float | None:
        """Return the seconds until the next attempt; None if ``error`` is final."""
        left = self._deadline - monotonic()
        if left <= 0 or isinstance(error.__cause__, SSLCertVerificationError):
            return None
        delay = min(self._delay, left)
        self._delay = min(2 * self._delay, MAX_RETRY_DELAY)
        self.timeout = min(self._connect_timeout, max(left - delay, MIN_RETRY_DELAY))
        log.debug("%s; retrying in %.3f s", error, delay)
        return delay


def new_socket(info: AddressInfo) -> socket.socket:
    """Create a nonblocking TCP socket for an address."""
    family, kind, protocol, _, _ = info
    created = socket.socket(family, kind, protocol)
    created.setblocking(False)
    created.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return created


def log_tls(connection: SSLObject | SSLSocket, started: float) -> None:
    """Log a TLS handshake that began at ``started``, in seconds of ``perf_counter``."""
    if log.isEnabledFor(logging.DEBUG):
        cipher = connection.cipher()
        duration = 1e3 * (perf_counter() - started)
        log.debug("TLS handshake completed in %.3f ms: %s, %s", duration, connection.version(), cipher and cipher[0])
