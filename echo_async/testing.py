"""An echo server for tests, whatever they run on: it starts in a millisecond or two, and stops at once.

It is the server of :mod:`echo_async.sync`, on threads of its own. So plain, asyncio, trio and anyio tests can
all use it, and nothing that a test does to its event loop reaches it. When it is closed it waits for nobody,
whoever is still connected and whatever they have begun.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self, Unpack

from .config import Mode, ServerConfig, ServerOptions
from .conversation import MODES, Conversation
from .errors import ConfigError, StartError
from .net import Address
from .stats import Stats
from .sync import EchoServer

__all__ = ["HostedServer"]


class HostedServer:
    """A running echo server, on any free port and in ``stream`` mode unless ``options`` say something else.

    ``options`` are those of :func:`echo_async.serve`; the engine is ``threads``. ``received`` has every complete
    message, newline included, in the order of arrival: it is there before its reply is. (In ``raw`` mode there
    are no messages; an item is what one read brought.) With ``tls`` the server shows a certificate of a CA made
    for it alone, and ``client_context`` trusts that CA; without, ``client_context`` is None.
    """

    def __init__(self, *, tls: bool = False, **options: Unpack[ServerOptions]) -> None:
        given: ServerOptions = {"port": 0, "mode": "stream", "engine": "threads", **options}
        if given["engine"] != "threads":
            raise ConfigError(
                f"engine {given['engine']!r} needs an event loop, which this server does without: leave it out"
            )
        self.client_context: ssl.SSLContext | None = None
        with ExitStack() as files:
            if tls:
                given["ssl_certfile"], self.client_context = _certify(given.get("host", "localhost"), files)
            config = ServerConfig(**given)
            self.received: list[bytes] = []
            make_conversation = partial(_recording(config.mode, self.received), config.limit_message_size)
            self._server = EchoServer.start(config, make_conversation)

    @property
    def address(self) -> Address:
        """Where clients reach it: ``(host, port)``, or the path of a Unix socket. Stays when it is closed."""
        return self._server.address

    @property
    def port(self) -> int | None:
        """The port that it listens on; None for a Unix socket."""
        return self._server.port

    @property
    def stats(self) -> Stats:
        """What it has seen so far."""
        return self._server.stats

    def close(self) -> None:
        """Stop at once: who is connected is cut off, who connects is refused. To call it twice does no harm."""
        self._server.abort()
        self._server.wait_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _recording(mode: Mode, received: list[bytes]) -> Callable[[int], Conversation]:
    """The conversation of ``mode``; each message is put by in ``received`` before the engine has its reply to send."""
    usual = MODES[mode]

    def receive(self: Conversation, data: bytes) -> bytes:
        reply = usual.receive(self, data)
        if mode != "raw":
            received.extend(message + b"\n" for message in reply.split(b"\n")[:-1])
        elif reply:
            received.append(reply)
        return reply

    return type(usual.__name__, (usual,), {"__slots__": (), "receive": receive})


def _certify(host: str, files: ExitStack) -> tuple[str, ssl.SSLContext]:
    """A file with a certificate for ``host`` and this machine, and a context that trusts nothing but its CA."""
    try:
        import trustme
    except ImportError as error:
        raise StartError("tls=True takes trustme, which is not installed: pip install trustme") from error
    authority = trustme.CA()
    certificate = authority.issue_cert(*{"localhost", "127.0.0.1", "::1", host})
    path = files.enter_context(certificate.private_key_and_cert_chain_pem.tempfile())
    return path, ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
