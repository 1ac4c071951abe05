"""Accepts connections for the ``threads`` engine, in a thread that also sweeps and ends them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from ..background import complete, start_thread
from ..compat import accepted_socket
from ..engines.threads import ThreadConnection
from ..engines.tls_socket import TlsSocket
from ..errors import StartError, describe_error
from ..net import shut_down
from .admission import ACCEPT_RETRY_DELAY, HANDSHAKE_TIMEOUT, SHUTTING_DOWN, PendingSlot
from .base_server import Acceptor
from .proxy_reader import receive_header
from .registry import DRAIN_INTERVAL
from .udp import start_receiver

ACCEPT_BATCH = 16  # connections that are accepted between two checks of the clock
CALL_CHECK_INTERVAL = 0.1  # seconds of waiting for the accept thread between two checks that it still runs
JOIN_TIMEOUT = 5.0  # seconds for threads whose sockets were shut down to end


class ThreadAcceptor(Acceptor):
    """Serves connections with one thread each; ``on_closed`` is called in the accept thread.

    Its threads do not keep the program running: it is aborted when the interpreter exits.
    """

    async def start(self) -> None:
        """Accept connections from now on. It does not block, and needs no event loop.

        :exc:`~echo_async.StartError` for lack of descriptors or threads; then the listeners are closed.
        """
        self._refusals = 0
        # Weak, since on Python 3.13 and newer a thread that is referred to keeps its stack after its end.
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._calls: deque[Callable[[], None]] = deque()  # for the accept thread
        resources = self._resources = contextlib.ExitStack()
        resources.callback(self.sockets.close)
        resources.callback(self._stop_udp)
        try:  # to open each descriptor that serving needs besides those of connections: a lack of them shows here
            self._waker, self._wakened = map(resources.enter_context, socket.socketpair())
            self._waker.setblocking(False)
            self._selector = resources.enter_context(selectors.DefaultSelector())
            self._selector.register(self._wakened, selectors.EVENT_READ)
            self._watch_listeners()
            self._receiver = start_receiver(self._admission, self.sockets.datagram_sockets)
            self._thread = start_thread(self._run, "echo-async accept", stop=self.abort)
        except BaseException as error:
            resources.close()
            if not isinstance(error, OSError | RuntimeError):
                raise
            reason = describe_error(error)
            raise StartError(f"cannot serve on threads: {reason}; raise the thread or descriptor limit") from error

    def _watch_listeners(self) -> None:
        self._accepting = self.sockets.sockets if self.config.accepts else ()
        for listener in self._accepting:
            self._selector.register(listener, selectors.EVENT_READ, listener)

    def close(self) -> None:
        """Begin the graceful shutdown. Returns at once; safe to call twice, from any thread or signal handler."""
        self._is_stopping = True
        if self.is_running():
            self._wake()

    def abort(self) -> None:
        self._is_aborting = True
        self.close()

    def is_running(self) -> bool:
        """Whether the accept thread runs: not in a child process that was forked, whose parent has the server."""
        return self._thread.is_alive()

    async def disconnect(self, *, reset: bool) -> None:
        def end_connections() -> None:
            self._abort_pending()
            self.registry.abort(reset=reset)

        self.call(end_connections)

    def call(self, function: Callable[[], object]) -> None:
        """Run ``function`` in the accept thread, once it has accepted all connections that wait; none at a stop."""
        done: Future[object] = Future()
        self._calls.append(partial(complete, done, function))
        self._wake()
        while not done.done():
            if self._is_stopping or not self.is_running():
                return
            with contextlib.suppress(TimeoutError):
                done.exception(CALL_CHECK_INTERVAL)
        done.result()

    def join(self) -> None:
        """Wait for the end of the accept thread, which is the last."""
        self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # it is awake, or closed
            self._waker.send(b"\0")

    # The accept thread.

    def _wait(self, seconds: float) -> None:
        """Wait until it is woken, at most ``seconds``."""
        self._wakened.settimeout(seconds)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            self._wakened.recv(4096)

    def _run(self) -> None:
        try:
            self._accept_until_stopped()
            self._stop_udp()
            self.sockets.close()
            self._abort_pending()
            self.registry.drain()
            self._wait_for_connections(self.config.timeout_graceful_shutdown)
        finally:
            self._stop_udp()
            self.sockets.close()
            self._abort_pending()
            self.registry.abort()
            self._wait_for_connections(JOIN_TIMEOUT, is_aborted=True)
            self.registry.write_pending_logs(at_once=True)
            self._resources.close()
            self._on_closed()

    def _accept_until_stopped(self) -> None:
        now, interval = self.registry.now, self.registry.sweep_interval
        next_sweep = now() + interval
        while not self._is_stopping:
            for key, _ in self._selector.select(max(0.0, next_sweep - now())):
                if key.data is None:
                    self._wait(0)
                else:
                    self._accept(key.data)
            if self._calls:
                self._drain_backlog()
            while self._calls:
                self._calls.popleft()()
            if now() >= next_sweep:
                self.registry.sweep()
                next_sweep = now() + interval
        self._drain_backlog()

    def _drain_backlog(self) -> None:
        """Accept what waits in the backlogs: closing a listener resets it."""
        for listener in self._accepting:
            for _ in range(self.config.backlog // ACCEPT_BATCH + 1):  # connections that arrive now do not extend this
                if not self._accept(listener):
                    break

    def stop_listening(self) -> None:
        """Refuse connections until :meth:`resume_listening` is called as often. The addresses stay reserved."""
        self._refusals += 1
        if self._refusals == 1:
            for listener in self._accepting:
                self._selector.unregister(listener)
            self._accepting = ()
            self.sockets.refuse()

    def resume_listening(self) -> None:
        """Accept connections again, on the same addresses."""
        self._refusals -= 1
        if not self._refusals:
            self.sockets.listen()
            self._watch_listeners()

    def _accept(self, listener: socket.socket) -> bool:
        """Accept what waits, up to ``ACCEPT_BATCH`` connections; return whether there may be more."""
        for _ in range(ACCEPT_BATCH):
            try:
                connection, peername = listener.accept()
            except BlockingIOError:
                return False
            except Exception as error:
                if self._admission.on_accept_error(error):
                    self._wait(ACCEPT_RETRY_DELAY)
                    return False
                continue
            self._admission.admit(connection, peername, self._serve)
        return True

    def _serve(self, slot: PendingSlot) -> None:
        """Serve a connection in a thread of its own; close it if there is none."""
        slot.connected = accepted_socket(slot.connected)
        taken: PendingSlot | ThreadConnection
        if self.certificates is None and not self._admission.expects_header:
            taken = connection = ThreadConnection(self.registry, slot, slot.connected)
            connection.establish()
            slot.claim()
            run = connection.run
        else:
            taken, run = slot, partial(self._establish, slot)
        try:
            self._threads.add(start_thread(run, "echo-async client"))
        except Exception as error:  # RuntimeError: "can't start new thread"
            self._admission.on_accept_error(error)
            self.registry.withdraw(taken)
            slot.connected.close()

    def _abort_pending(self) -> None:
        """End handshakes. A PROXY header that has arrived is still read; a TLS handshake is cut."""
        how = socket.SHUT_RD if self.certificates is None else socket.SHUT_RDWR
        for slot in list(self.registry.pending):
            slot.is_aborted = True
            with contextlib.suppress(OSError):  # it has ended
                slot.connected.shutdown(how)

    def _wait_for_connections(self, seconds: float, *, is_aborted: bool = False) -> None:
        """Wait until their threads have ended. Those that are not aborted are drained meanwhile."""
        now, swept_at = self.registry.now, self.registry.now()
        deadline = swept_at + seconds
        running = list(self._threads)
        while running and now() < deadline and (is_aborted or not self._is_aborting):
            running[-1].join(DRAIN_INTERVAL)
            while running and not running[-1].is_alive():
                running.pop()
            if not is_aborted and now() - swept_at >= DRAIN_INTERVAL:  # not for each thread: that would be quadratic
                self.registry.sweep()
                swept_at = now()

    # A connection's thread.

    def _establish(self, slot: PendingSlot) -> None:
        """Read the PROXY header, do the TLS handshake, whichever is configured; then serve the connection."""
        admission = self._admission
        fail: Callable[[PendingSlot, Exception], None] = admission.fail_header
        secured: socket.socket | TlsSocket = slot.connected
        try:
            if admission.expects_header:
                # This function runs as long as the connection, and its variables would keep the header.
                slot.set_header(receive_header(slot.connected, admission.new_header(), self.config.timeout_message))
            if self.certificates is not None:
                secured = TlsSocket(slot.connected, self.certificates.context, partial(admission.fail_tls, slot))
                fail = partial(admission.fail_handshake, secured.tls)
                secured.handshake(HANDSHAKE_TIMEOUT)
                fail = admission.fail_header
            connection = ThreadConnection(self.registry, slot, secured)
            connection.establish()
        except Exception as error:
            fail(slot, SHUTTING_DOWN if slot.is_aborted else error)
            error.with_traceback(None)  # which refers to the connection, which has the error
            shut_down(slot.connected)
            return slot.connected.close()
        slot.claim()
        connection.run()
