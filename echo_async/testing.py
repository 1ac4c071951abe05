"""An echo server for tests of plain Python, asyncio, trio or anyio programs.

It runs in threads of its own, so it does not depend on the event loop of a test. It starts within a few milliseconds,
and :meth:`HostedServer.close` does not wait for connected clients.
"""

import ssl
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Self, Unpack

from .config import Mode, ServerConfig, ServerOptions
from .errors import ConfigError, StartError
from .stats import Stats
from .sync import EchoServer
from .wire.conversation import MODES, Conversation

__all__ = ["HostedServer"]


class HostedServer:
    """A running echo server for tests, by default on a free port and in ``stream`` mode.

    It is a context manager that closes the server.

    Attributes:
        received: The complete messages of all clients, including their newlines, in the order of arrival. A message
            is appended before its reply is sent. In ``raw`` mode each item is the data of one read.
        client_context: A TLS context that trusts only the certificate of this server, or None without ``tls``.

    Args:
        tls: Whether to serve TLS, with a new certificate for ``host``, ``localhost``, 127.0.0.1 and ::1.
        **options: The options of :func:`echo_async.serve`. The engine is ``threads``.

    Raises:
        ConfigError: An option is invalid, or the engine is not ``threads``.
        StartError: The server cannot listen, or ``tls`` is true and trustme is not installed.
    """

    def __init__(self, *, tls: bool = False, **options: Unpack[ServerOptions]) -> None:
        given: ServerOptions = {"port": 0, "mode": "stream", "engine": "threads", **options}
        if given["engine"] != "threads":
            raise ConfigError(f"invalid engine: {given['engine']!r} (must be 'threads')")
        self.client_context: ssl.SSLContext | None = None
        with ExitStack() as files:
            if tls:
                given["ssl_certfile"], self.client_context = _certify(given.get("host", "localhost"), files)
            config = ServerConfig(**given)
            self.received: list[bytes] = []
            make_conversation = partial(_recording(config.mode, self.received), config.limit_message_size)
            self._server = EchoServer(config, make_conversation)

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

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return self._server.stats

    def close(self) -> None:
        """Abort all connections, stop listening, and return when the threads have ended. Idempotent."""
        self._server.abort()
        self._server.wait_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _recording(mode: Mode, received: list[bytes]) -> Callable[[int], Conversation]:
    """Derive a conversation of ``mode`` that appends each message to ``received`` before it returns the reply."""
    base = MODES[mode]

    def receive(self: Conversation, data: bytes) -> bytes:
        reply = base.receive(self, data)
        if mode != "raw":
            received.extend(message + b"\n" for message in reply.split(b"\n")[:-1])
        elif reply:
            received.append(reply)
        return reply

    return type(base.__name__, (base,), {"__slots__": (), "receive": receive})


def _certify(host: str | Sequence[str], files: ExitStack) -> tuple[str, ssl.SSLContext]:
    """Create a certificate file for ``host`` and this machine, and a client context that trusts only its CA."""
    try:
        import trustme
    except ImportError as error:
        raise StartError(
            "cannot create a certificate: trustme is not installed; install it with 'pip install trustme'"
        ) from error
    authority = trustme.CA()
    hosts = [host] if isinstance(host, str) else host
    certificate = authority.issue_cert(*{"localhost", "127.0.0.1", "::1", *hosts})
    path = files.enter_context(certificate.private_key_and_cert_chain_pem.tempfile())
    return path, ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
