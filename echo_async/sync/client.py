"""The client without an event loop: it sends and reads at once, in the thread that calls it.

The blocking twin of :mod:`echo_async.client.client`: same names, same rules, same errors, and the
same rule for connecting again. A blocking client that sends all before it reads stands still as soon as
both sides' buffers are full; so no call here waits for only one of the two. Every wait has a deadline.

A client is for one thread at a time. A name is looked up without a deadline: the resolver has its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Generator, Iterable
from ssl import SSLContext
from time import monotonic, perf_counter, sleep
from types import TracebackType
from typing import Self, TypeVar, Unpack, cast

from ..client.client import ClientOptions, ServerBehavior
from ..client.connector import (
    CONNECTION_ATTEMPT_DELAY,
    MAX_RETRY_DELAY,
    MIN_RETRY_DELAY,
    UNIX_RETRY_DELAY,
    AddressInfo,
    Connector,
    advice,
)
from ..client.stream import BATCH_BYTES, WINDOW, MessageBatch, Messages, Window
from ..config import CONNECT_TIMEOUT, HOST, PORT, REPLY_TIMEOUT, check_seconds
from ..errors import (
    ConfigError,
    ConnectError,
    ConnectTimeout,
    EchoError,
    ReplyLost,
    describe_error,
)
from ..messages import encode
from ..verifier import Exchange, ReplyVerifier

__all__ = ["EchoClient", "connect", "echo"]

M = TypeVar("M", str, bytes)

READ_SIZE = 65_536  # bytes asked for at each read
MAX_WAIT = 3600.0  # seconds; the kernel counts a wait in milliseconds, in 32 bits
IMMEDIATE = 0.005  # seconds in which messages are taken that come without waiting

log = logging.getLogger("echo_async.client")


def connect(
    host: str = HOST,
    port: int = PORT,
    *,
    uds: str | os.PathLike[str] | None = None,
    timeout: float = REPLY_TIMEOUT,
    connect_timeout: float = CONNECT_TIMEOUT,
    retry: float = 0.0,
    ssl: SSLContext | bool | None = None,
    server_hostname: str | None = None,
) -> EchoClient:
    """Connect to an echo server: ``with sync.connect(...) as client``, or ``client = sync.connect(...)``.

    ``uds`` is the path of a Unix socket, instead of ``host`` and ``port``. ``timeout`` is for each
    reply, ``connect_timeout`` for each connection, all in seconds; ``retry`` keeps trying to connect
    that long, for a server that is still starting. ``ssl`` is True, for TLS with the certificates that
    the system trusts, or a context. :exc:`ConnectError` if there is no connection in the end.
    """
    check_seconds("timeout", timeout)
    target = Connector(
        host,
        port,
        uds=uds,
        connect_timeout=connect_timeout,
        retry=retry,
        ssl=ssl,
        server_hostname=server_hostname,
    )
    client = EchoClient(target, timeout)
    client._connected()
    return client


def echo(message: M, host: str = HOST, port: int = PORT, **options: Unpack[ClientOptions]) -> M:
    """One connection, one message: send it, return the reply. ``options`` are those of :func:`connect`."""
    with connect(host, port, **options) as client:
        return client.echo(message)


class EchoClient:
    """A client of one server; :func:`connect` makes one. ``name`` is the server's address as errors show it.

    It is not safe to use one from several threads at once: give each its own.
    """

    def __init__(self, target: Connector, timeout: float) -> None:
        self.name = target.name
        self._target = target
        self._timeout = timeout
        self._server = ServerBehavior.UNKNOWN
        self._connection: Connection | None = None
        self._closed = False

    def echo(self, message: M) -> M:
        """Send ``message``, and return the reply once it is all there: str for str, bytes for bytes.

        A newline is added on the way if ``message`` has none at its end; the reply has it only if
        ``message`` had. One inside is a :exc:`MessageError`. :exc:`ReplyLost`, :exc:`ReplyLate` and
        :exc:`ReplyDifferent` say what became of a reply; the next message gets a new connection then.
        """
        self._exchange(encode(message))
        return message  # every byte of the reply was compared with it

    def stream(self, messages: Iterable[M], *, window: int = WINDOW) -> Generator[M, None, None]:
        """Send ``messages`` and yield the replies, in order: ``for reply in client.stream(messages)``.

        At most ``window`` messages are on their way at a time (and 256 KiB, unless one message is
        larger): a slow server, and a slow reader of the replies, hold up the taking of more messages,
        and nothing piles up. With a server that closes after each reply, one is on its way at a time.

        Messages are taken as long as there is room for them, so a source that waits for its next message
        holds up the replies to those before. With ``window=1`` each reply comes before the next is taken.

        The first reply that is lost, late or different raises its error, after the replies before it;
        so does an error of ``messages`` itself. The time that the reader of the replies takes is not
        counted as the server's.
        """
        if isinstance(messages, str | bytes):
            raise TypeError("stream takes an iterable of messages, not one message; echo sends one")
        if window < 1:
            raise ConfigError(f"window {window} makes no sense: give messages, 1 or more")
        return self._stream(Messages(messages), window)

    def ping(self) -> float:
        """Send a small message; return the seconds until it is back, without those for connecting."""
        return self._exchange(b"ping\n")

    def close(self) -> None:
        """Close the connection; messages on their way are lost. To call it twice does no harm."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, data: bytes) -> float:
        """Send one message, as ``encode`` makes it; return the seconds until it is back."""
        connection = self._connected()
        if self._server is ServerBehavior.KEEPS_OPEN:
            return connection.exchange(data)
        try:
            seconds = connection.exchange(data)
        except ReplyLost:
            if connection.replies != 1 or connection.partial or self._closed:
                raise
            self._server = ServerBehavior.CLOSES_AFTER_REPLY
            connection = self._connected()
            seconds = connection.exchange(data)
        if self._server is ServerBehavior.CLOSES_AFTER_REPLY:
            connection.close()
        elif connection.replies > 1:
            self._server = ServerBehavior.KEEPS_OPEN
        return seconds

    def _stream(self, source: Messages, window: int) -> Generator[M, None, None]:
        out = Window(window)
        at_once = 1  # messages of a batch: twice as many each time, while they come without waiting
        while True:
            began = monotonic()
            for batch, start, end, _, error in out.results():
                for reply in cast(MessageBatch, batch).replies(start, end):
                    yield cast(M, reply)
                if error is not None:
                    raise error
            while (room := self._room(out)) and not source.ended:
                asked = monotonic()
                taken = source.take(min(room, at_once), BATCH_BYTES)
                at_once = min(2 * at_once, window) if monotonic() - asked < IMMEDIATE else 1
                if taken is None:
                    break
                if self._server is ServerBehavior.KEEPS_OPEN:
                    connection = self._connection if out.batches else self._connected()
                    assert connection is not None
                    out.add(taken)
                    connection.send(taken)
                else:
                    at_once = 1
                    self._exchange(taken.data)
                    for reply in cast(MessageBatch, taken).replies(0, len(taken.data)):
                        yield cast(M, reply)
            if out.batches:
                assert self._connection is not None
                if monotonic() - began > IMMEDIATE:  # nobody looked at the socket: that is not the server's fault
                    self._connection.restart_clock()
                self._connection.work()
            elif source.ended:
                break
        if source.failure is not None:
            raise source.failure

    def _room(self, out: Window) -> int:
        """Messages that may be sent now. None while replies of a lost connection are to be told of first."""
        if not out.batches:
            return out.room()
        return out.room() if self._connection is not None and self._connection.open else 0

    def _connected(self) -> Connection:
        connection = self._connection
        if connection is not None:
            connection.catch_up()
            if connection.unexpected is not None:
                error, connection.unexpected = connection.unexpected, None
                raise error
        if connection is None or not connection.open:
            if self._closed:
                raise EchoError(f"this client of {self.name} is closed; connect again")
            connection = self._connection = Connection(self.name, open_socket(self._target), self._timeout)
        return connection


# One connection


class _Echo(Exchange):
    """One message; whoever sent it looks for its reply."""

    __slots__ = ()

    def progress(self) -> None:
        pass


class Connection(ReplyVerifier):
    """One connection: a socket that never blocks, and what is still to be sent on it."""

    def __init__(self, name: str, connected: socket.socket, timeout: float) -> None:
        super().__init__(name)
        self.open = True
        self._socket = connected
        self._timeout = timeout
        self._unsent: deque[memoryview] = deque()
        self._broken: str | None = None  # why nothing can be sent any more
        self._poll = select.poll()
        self._poll.register(connected, select.POLLIN)
        self._waits_to_send = False

    def exchange(self, data: bytes) -> float:
        """Send one message; return the seconds until it is back. Those that were sent before come first."""
        started = perf_counter()
        exchange = _Echo(data)
        self.send(exchange)
        while exchange.error is None and exchange.returned < len(data):
            self.work()
        if exchange.error is not None:
            raise exchange.error
        return perf_counter() - started

    def send(self, exchange: Exchange) -> None:
        """Begin to send; :meth:`work` does the rest."""
        log.debug("sending %d bytes", len(exchange.data))
        if not self._in_flight:
            self._since = monotonic()
        self._in_flight.append(exchange)
        self._unsent.append(memoryview(exchange.data))
        self._flush()

    def work(self) -> None:
        """Wait until something comes, or can be sent; the first reply that is out is late if nothing comes in time.

        Returns at once if no reply is out: whoever takes replies from a stream may use the client in between.
        """
        if not self.open or not self._in_flight:
            return
        self._wait_to_send(bool(self._unsent))
        left = self._since + self._timeout - monotonic()
        happened = self._poll.poll(1e3 * max(0.0, min(left, MAX_WAIT)))  # looks once, however late it is
        if not happened:
            if monotonic() >= self._since + self._timeout:
                self._in_flight[0].error = self._late(self._timeout)
                self._drop("a reply before it was late")
            return
        if happened[0][1] != select.POLLOUT:
            self._receive()
        if self._unsent:
            self._flush()

    def catch_up(self) -> None:
        """Look at what came since somebody last looked; the replies that are out get their time anew."""
        while self.open and self._receive():
            pass
        self.restart_clock()

    def restart_clock(self) -> None:
        """The first reply that is out gets its time anew."""
        self._since = monotonic()

    def close(self) -> None:
        """Close; what is still out is lost. To call it twice does no harm."""
        if self.open and isinstance(self._socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):  # say goodbye, and do not wait for the answer
                self._socket.unwrap()
        self._lose(f"the connection to {self._name} was closed by this client")

    def _close_socket(self) -> None:
        self._unsent.clear()
        self._socket.close()

    def _flush(self) -> None:
        """Send what the kernel takes now. If it takes no more at all, replies can still be there to be read."""
        unsent = self._unsent
        try:
            while unsent:
                sent = self._socket.send(unsent[0])
                if sent == len(unsent[0]):
                    unsent.popleft()
                else:
                    unsent[0] = unsent[0][sent:]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            self._broken = self._broken or describe_error(error)
            unsent.clear()

    def _receive(self) -> bool:
        """Read once, and compare; False if nothing was there."""
        try:
            data = self._socket.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            self._lose(f"the connection to {self._name} broke ({self._broken or describe_error(error)})")
            return True
        if data:
            self._compare(data)
        elif self._broken:
            self._lose(f"the connection to {self._name} broke ({self._broken})")
        else:
            self._lose(f"{self._name} closed the connection")
        return True

    def _wait_to_send(self, wanted: bool) -> None:
        if wanted is not self._waits_to_send:
            self._waits_to_send = wanted
            self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if wanted else 0))


# Connecting


def open_socket(target: Connector) -> socket.socket:
    """Connect to ``target``, again and again for its ``retry`` seconds if need be. What it gives does not block."""
    give_up = monotonic() + target.retry
    pause = MIN_RETRY_DELAY
    seconds = target.connect_timeout
    while True:
        try:
            return _attempt(target, seconds)
        except ConnectError as error:
            left = give_up - monotonic()
            if left <= 0 or isinstance(error.__cause__, ssl.SSLCertVerificationError):
                raise
            log.debug("%s; trying again", error)
        sleep(min(pause, left))
        pause = min(2 * pause, MAX_RETRY_DELAY)
        seconds = min(target.connect_timeout, max(give_up - monotonic(), MIN_RETRY_DELAY))


def _attempt(target: Connector, seconds: float) -> socket.socket:
    started = monotonic()
    log.debug("connecting to %s", target.name)
    try:
        connected = _connect(target, started + seconds)
        log.debug("connected to %s in %.3f ms", target.name, 1e3 * (monotonic() - started))
        return _secure(target, connected, started + seconds) if target.tls else connected
    except TimeoutError as error:
        within = f": {describe_error(error)}" if error.errno else f" within {seconds:g} s"
        raise ConnectTimeout(f"cannot connect to {target.name}{within}; is it the right address?") from error
    except ssl.SSLError as error:
        raise ConnectError(f"cannot connect to {target.name}: TLS: {describe_error(error)}") from error
    except (OSError, UnicodeError) as error:
        raise ConnectError(f"cannot connect to {target.name}: {describe_error(error)}{advice(error)}") from error


def _connect(target: Connector, deadline: float) -> socket.socket:
    if target.uds is not None:
        return _connect_unix(target.uds, deadline)
    infos = target.numeric or dict.fromkeys(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
    return _race(list(infos), deadline)


def _connect_unix(path: str, deadline: float) -> socket.socket:
    with contextlib.ExitStack() as unless_connected:
        connecting = unless_connected.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connecting.setblocking(False)
        while (code := connecting.connect_ex(path)) == errno.EAGAIN:  # its queue is full
            if monotonic() >= deadline:
                raise TimeoutError
            sleep(UNIX_RETRY_DELAY)
        if code:
            raise OSError(code, os.strerror(code))
        unless_connected.pop_all()
        return connecting


def _race(waiting: list[AddressInfo], deadline: float) -> socket.socket:
    """The first address that answers: each gets a head start, or goes as soon as the one before has failed."""
    failure: OSError | None = None
    running: dict[int, socket.socket] = {}
    poll = select.poll()
    try:
        while running or waiting:
            if waiting:
                try:
                    connecting, code = _begin_to_connect(waiting.pop(0))
                except OSError as error:  # an address family that this machine does not have
                    failure = failure or error
                    continue
                running[connecting.fileno()] = connecting
                if code:
                    failure = failure or OSError(code, os.strerror(code))
                    running.pop(connecting.fileno()).close()
                    continue
                poll.register(connecting, select.POLLOUT)
            for descriptor in _first_done(poll, deadline, CONNECTION_ATTEMPT_DELAY if waiting else MAX_WAIT):
                poll.unregister(descriptor)
                code = running[descriptor].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                connecting = running.pop(descriptor)
                if not code:
                    return connecting
                connecting.close()
                failure = failure or OSError(code, os.strerror(code))
    finally:
        for loser in running.values():
            loser.close()
    assert failure is not None
    raise failure


def _begin_to_connect(info: AddressInfo) -> tuple[socket.socket, int]:
    """A socket that is about to be connected, and the error code if it is clear that it will not be."""
    family, kind, number, _, address = info
    connecting = socket.socket(family, kind, number)
    try:
        connecting.setblocking(False)
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = connecting.connect_ex(address)
    except BaseException:
        connecting.close()
        raise
    return connecting, 0 if code == errno.EINPROGRESS else code


def _first_done(poll: select.poll, deadline: float, seconds: float) -> list[int]:
    """The descriptors with which something happened; none after ``seconds``. TimeoutError after ``deadline``."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError
    return [descriptor for descriptor, _ in poll.poll(1e3 * min(left, seconds))]


def _secure(target: Connector, connected: socket.socket, deadline: float) -> socket.socket:
    """The socket with TLS on it, once the server has shown its certificate."""
    context, name = target.tls["ssl"], target.tls["server_hostname"]
    started = monotonic()
    poll = select.poll()
    with contextlib.ExitStack() as unless_secured:
        unless_secured.enter_context(connected)
        secured: ssl.SSLSocket = context.wrap_socket(connected, server_hostname=name, do_handshake_on_connect=False)
        unless_secured.enter_context(secured)
        while (wanted := _shake_hands(secured)) is not None:
            poll.register(secured, wanted)
            _first_done(poll, deadline, MAX_WAIT)
        unless_secured.pop_all()
    log.debug("%s in %.3f ms (%s)", secured.version(), 1e3 * (monotonic() - started), (secured.cipher() or "?")[0])
    return secured


def _shake_hands(secured: ssl.SSLSocket) -> int | None:
    """Go on with the handshake; what to wait for, or None when it is done."""
    try:
        secured.do_handshake()
    except ssl.SSLWantReadError:
        return select.POLLIN
    except ssl.SSLWantWriteError:
        return select.POLLOUT
    return None
