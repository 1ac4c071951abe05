"""The public API of the blocking client.

Arguments, results and errors are those of the functions and methods of the same names in
:mod:`echo_async.client.client`; the docstrings here say what differs. ``connect`` returns a connected client, so it
is what raises :exc:`~echo_async.ConnectError`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Self, Unpack, cast

from ..awaitable import run
from ..client.batching import WINDOW_MESSAGES, M, Messages, check_stream, encode
from ..client.endpoint import Endpoint
from ..client.stream import send_batches
from ..config import HOST, PORT, ClientOptions
from .session import BlockingSession, iterate

if TYPE_CHECKING:
    from ..wire.identity import Identity


class EchoClient:
    """A client of one echo server, created by :func:`connect`.

    A client is not thread-safe: use one per thread. After a connection was lost, the next message opens a new one.
    """

    def __init__(self, session: BlockingSession) -> None:
        self._session = session

    @property
    def name(self) -> str:
        """The address of the server in error messages: ``host:port``, or the path of a Unix socket."""
        return self._session.name

    def echo(self, message: M) -> M:
        """Send a message and return its reply, as :meth:`echo_async.EchoClient.echo` does."""
        run(self._session.exchange(encode(message)))
        return message  # equal to the reply: every byte was compared

    def stream(self, messages: Iterable[M], *, window: int = WINDOW_MESSAGES) -> Generator[M, None, None]:
        """Send many messages and yield their replies in order, as :meth:`echo_async.EchoClient.stream` does.

        ``messages`` is an iterable. While it blocks, no replies are received; with ``window=1``, each reply is yielded
        before the next message is taken.
        """
        check_stream(messages, window)
        return self._stream(messages, window)

    def _stream(self, messages: Iterable[M], window: int) -> Generator[M, None, None]:
        with closing(iterate(send_batches(self._session, Messages(messages), window, self._session))) as results:
            for batch, start, end, _, error in results:
                yield from cast(Sequence[M], batch.replies(start, end))
                if error is not None:
                    raise error

    def ping(self) -> float:
        """Return the seconds of a round trip, as :meth:`echo_async.EchoClient.ping` does."""
        return run(self._session.exchange(b"ping\n"))

    def identify(self, message: str | bytes) -> Identity:
        """Return what a server in ``identify`` mode reports, as :meth:`echo_async.EchoClient.identify` does."""
        from ..wire.identity import check_reply, max_reply_size  # which imports json

        data = encode(message)
        return check_reply(run(self._session.receive_line(data, max_reply_size(data))), data, self.name)

    def close(self) -> None:
        """Close the connection. Replies in flight raise :exc:`ReplyLost`. Closing twice is harmless."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(host: str = HOST, port: int = PORT, **options: Unpack[ClientOptions]) -> EchoClient:
    """Connect to an echo server: ``with connect() as client``, or ``client = connect()``.

    ``connect_timeout`` does not limit the system resolver, which has a timeout of its own.
    """
    return EchoClient(BlockingSession(Endpoint(host, port, **options)))


def echo(message: M, host: str = HOST, port: int = PORT, **options: Unpack[ClientOptions]) -> M:
    """Send one message on a connection of its own and return its reply."""
    with connect(host, port, **options) as client:
        return client.echo(message)
