"""The server object on threads: one accepts clients and keeps the time, and each client has its own.

The blocking twin of :mod:`echo_async.server.server`: same names, no event loop. Its threads are no
daemons (those are killed in the middle of a reply when the interpreter exits), so it has to be closed.
"""

from __future__ import annotations

import contextlib
import enum
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Self, Unpack

from .. import net
from ..config import ServerConfig, ServerOptions
from ..engines.proxy_reader import receive_header
from ..engines.registry import ACCEPT_ABORTED, ACCEPT_RETRY_DELAY, HANDSHAKE_TIMEOUT
from ..engines.threads import ThreadConnection
from ..engines.tls_socket import TlsSocket
from ..errors import ConfigError, StartError, describe_error
from ..net import format_address
from ..server.base import BaseServer

__all__ = ["EchoServer", "serve"]

STACK_SIZE = 256 * 1024  # bytes of address space for a client's thread
ACCEPT_BATCH = 16  # clients that are accepted before the time is looked at
DRAIN_INTERVAL = 0.05  # seconds between two sweeps while the server stops
JOIN_TIMEOUT = 5.0  # seconds for threads whose sockets were shut down to notice


class Accepted(enum.Enum):
    """What came of an attempt to let in the clients that wait."""

    ALL = enum.auto()
    PERHAPS_NOT_ALL = enum.auto()
    NOT_JUST_NOW = enum.auto()  # the system cannot


_starting = threading.Lock()  # threading.stack_size is one for the whole process


def serve(**options: Unpack[ServerOptions]) -> EchoServer:
    """Start an echo server on threads: ``with sync.serve(port=0) as server:``. Returns once it can be reached.

    ``options`` are the fields of :class:`~echo_async.ServerConfig`; the engine is ``threads``. Raises
    :exc:`~echo_async.ConfigError` for an option that makes no sense, :exc:`~echo_async.StartError` if the
    address cannot be bound.
    """
    options.setdefault("engine", "threads")
    if options["engine"] != "threads":
        raise ConfigError(
            f"engine {options['engine']!r} needs an event loop: use echo_async.serve, or engine 'threads'"
        )
    return EchoServer.start(ServerConfig(**options))


class EchoServer(BaseServer):
    """A running echo server on threads; :func:`serve` makes one."""

    def __init__(self, config: ServerConfig, sockets: Sequence[socket.socket], path: str | None = None) -> None:
        super().__init__(config, sockets, path)
        self.on_closed: Callable[[], object] = bool
        self._threads: set[threading.Thread] = set()
        self._pending: set[socket.socket] = set()  # clients that are not let in yet
        self._finished: deque[threading.Thread] = deque()  # those that have ended, or are about to
        self._aborting = False
        self._closed = threading.Event()
        self._acceptor = threading.Thread(target=self._run, name="echo-async accept")
        try:
            self._resources = self._open_resources()
        except OSError as error:
            self._close_sockets()
            raise _cannot_start(error) from error

    def _open_resources(self) -> contextlib.ExitStack:
        """All descriptors that it takes to serve, beside those of clients: so want of them is seen at the start."""
        with contextlib.ExitStack() as means:
            self._waker, self._wakened = map(means.enter_context, socket.socketpair())
            self._waker.setblocking(False)
            self._clients_or_waker = means.enter_context(selectors.DefaultSelector())
            self._waker_alone = means.enter_context(selectors.DefaultSelector())
            for selector in (self._clients_or_waker, self._waker_alone):
                selector.register(self._wakened, selectors.EVENT_READ)
            for listener in self._sockets:
                self._clients_or_waker.register(listener, selectors.EVENT_READ, listener)
            return means.pop_all()

    @classmethod
    def start(cls, config: ServerConfig) -> Self:
        """Serve on the sockets that ``config`` names."""
        self = cls(config, net.bind(config, net.resolve(config)), config.uds)
        self.start_accepting()
        return self

    def start_accepting(self) -> None:
        """Let clients in: once, after the server is made. :exc:`~echo_async.StartError` if no thread can be had."""
        try:
            self._acceptor.start()
        except RuntimeError as error:
            self._close_sockets()
            self._resources.close()
            raise _cannot_start(error) from error

    def close(self) -> None:
        """Stop: accept no more, answer what was received, end the connections. Returns at once.

        Can be called twice, from any thread, and from a signal handler. What is not done within
        ``timeout_graceful_shutdown`` seconds is aborted.
        """
        self._stopping = True
        self._wake()

    def abort(self) -> None:
        """Stop without waiting for any client."""
        self._aborting = True
        self.close()

    def wait_closed(self) -> None:
        """Wait until it is closed: no socket, connection or thread of its own is left. Always ends after ``close``."""
        self._closed.wait()  # and not the join alone, which Ctrl-C would leave with the thread taken for ended
        self._acceptor.join()

    def serve_forever(self) -> None:
        """Wait until it is closed; close it if this is interrupted."""
        try:
            self.wait_closed()
        finally:
            self.close()
            self.wait_closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self.wait_closed()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake already, or closed
            self._waker.send(b"\0")

    # From here on: the accepting thread.

    def _run(self) -> None:
        try:
            self._accept_until_stopped()
            self._close_sockets()
            self._abort_pending()
            self._registry.stop()
            self._wait_for_clients(self.config.timeout_graceful_shutdown, or_abort=True)
        finally:
            self._close_sockets()
            self._abort_pending()
            self._registry.abort()
            self._wait_for_clients(JOIN_TIMEOUT)
            self._resources.close()
            self._closed.set()
            self.on_closed()

    def _accept_until_stopped(self) -> None:
        registry, interval = self._registry, self._registry.sweep_interval
        next_sweep = registry.now() + interval
        while not self._stopping:
            for key, _ in self._clients_or_waker.select(max(0.0, next_sweep - registry.now())):
                if key.data is not None and self._accept(key.data) is Accepted.NOT_JUST_NOW:
                    self._waker_alone.select(ACCEPT_RETRY_DELAY)
            self._forget_ended()
            if registry.now() >= next_sweep:
                registry.sweep()
                next_sweep = registry.now() + interval
        for listener in self._sockets:  # closing would reset the clients that the kernel has connected
            while self._accept(listener) is Accepted.PERHAPS_NOT_ALL:
                pass

    def _accept(self, listener: socket.socket) -> Accepted:
        """Let in the clients that wait, up to ``ACCEPT_BATCH`` of them."""
        registry = self._registry
        for _ in range(ACCEPT_BATCH):
            try:
                client, peername = listener.accept()
            except BlockingIOError:
                return Accepted.ALL
            except OSError as error:
                if error.errno in ACCEPT_ABORTED:
                    continue
                registry.log_accept_error(describe_error(error))
                return Accepted.NOT_JUST_NOW
            if registry.refuse() or not registry.is_allowed(peername):
                client.close()
            else:
                client.setblocking(True)  # whatever socket.setdefaulttimeout says
                self._start_thread(client, peername)
        return Accepted.PERHAPS_NOT_ALL

    def _start_thread(self, client: socket.socket, peername: object) -> None:
        serve: Callable[[], None]
        withdraw: Callable[[], None]
        if self._certificates is None and not self._registry.expects_header:
            connection = ThreadConnection(self._registry, client, peername)
            self._registry.add(connection)
            serve, withdraw = connection.run, partial(self._registry.withdraw, connection)
        else:
            self._registry.begin_handshake()
            self._pending.add(client)
            serve = partial(self._establish, client, peername)
            withdraw = partial(self._withdraw, client)
        thread = threading.Thread(target=self._serve_client, args=(serve,), name="echo-async client")
        self._threads.add(thread)
        try:
            with _starting:
                usual = threading.stack_size(STACK_SIZE)
                try:
                    thread.start()
                finally:
                    threading.stack_size(usual)
        except (RuntimeError, MemoryError) as error:  # "can't start new thread": this client only
            self._registry.log_accept_error(describe_error(error))
            self._threads.discard(thread)
            withdraw()
            client.close()

    def _serve_client(self, serve: Callable[[], object]) -> None:
        try:
            serve()
        finally:
            self._finished.append(threading.current_thread())
            if self._stopping:
                self._wake()

    def _establish(self, client: socket.socket, peername: object) -> None:
        """Serve a client when its PROXY header has come and its TLS handshake is done, whichever is asked for."""
        registry = self._registry
        fail: Callable[[str, Exception], None] = registry.fail_header
        secured: socket.socket | TlsSocket = client
        try:
            if registry.expects_header:
                header = registry.new_header()
                receive_header(client, header, self.config.timeout_message)
                peername = header.source or peername
            if self._certificates is not None:
                fail = registry.fail_handshake
                secured = TlsSocket(client, self._certificates.context)
                secured.handshake(HANDSHAKE_TIMEOUT)
        except Exception as error:
            was_cut = client not in self._pending
            self._pending.discard(client)
            fail(format_address(peername), ConnectionError("the server stops") if was_cut else error)
            return client.close()
        connection = ThreadConnection(registry, secured, peername)
        registry.add(connection)
        registry.end_handshake()
        self._pending.discard(client)
        connection.run()

    def _withdraw(self, client: socket.socket) -> None:
        """There is no thread for a client that is not let in yet."""
        self._pending.discard(client)
        self._registry.end_handshake()
        self._registry.count("refused")

    def _abort_pending(self) -> None:
        """What they have sent is all that they get to say. In the middle of a TLS handshake, that is nothing."""
        how = socket.SHUT_RD if self._certificates is None else socket.SHUT_RDWR
        for client in list(self._pending):
            self._pending.discard(client)
            with contextlib.suppress(OSError):  # it is over just now
                client.shutdown(how)

    def _forget_ended(self) -> None:
        """Let go of threads that have ended; one that is about to would make the next client wait."""
        while self._finished and not self._finished[0].is_alive():
            self._threads.discard(self._finished.popleft())

    def _wait_for_clients(self, seconds: float, *, or_abort: bool = False) -> None:
        registry = self._registry
        deadline = registry.now() + seconds
        while self._threads and registry.now() < deadline and not (or_abort and self._aborting):
            if self._finished:
                self._finished[0].join()
            elif self._waker_alone.select(DRAIN_INTERVAL):
                self._wakened.recv(4096)
            self._forget_ended()
            registry.sweep()


def _cannot_start(error: Exception) -> StartError:
    return StartError(
        f"cannot serve on threads: {describe_error(error)}; give the process more, or stop what takes so much"
    )
