"""Answers datagrams (RFC 862), for every engine: in the event loop, or in a thread.

It reads the sockets itself instead of through a :class:`asyncio.DatagramProtocol`, which has no ancillary data, no
limit per turn of the loop, and no way to answer what has arrived before it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence
from selectors import EVENT_READ

from ..compat import PollSelector, receive_message
from ..datagrams import MAX_SIZE, REFUSALS, REPLY_MARKS, Refusals, SocketAddress
from ..errors import describe_error
from ..logs import RateLimitedLog, access_log, excerpt, log
from ..net import format_address
from .admission import Admission

BATCH = 32  # datagrams of one socket before other events get their turn
DRAIN_BATCHES = 256  # of each socket at a stop: more than a receive buffer holds
ANCILLARY_SIZE = socket.CMSG_SPACE(4) * 2 if hasattr(socket, "CMSG_SPACE") else 0  # bytes: two integers


class DatagramResponder:
    """Answers the datagrams of one server. Used by one thread at a time."""

    def __init__(self, admission: Admission, sockets: Sequence[socket.socket]) -> None:
        config = admission.config
        self.sockets = sockets
        self._context = admission.registry.context
        self._counters = self._context.counters.datagrams
        self._refusals = Refusals(config.udp_allow_from, [each.getsockname()[1] for each in sockets])
        self._has_log = self._context.log_messages
        self._expected = 1  # datagrams that one call answers
        self._log_refused = RateLimitedLog(log.warning, "%s datagram refused: %s")

    def receive(self, receiver: socket.socket) -> bool:
        """Answer what has arrived, at most ``BATCH`` datagrams; return whether there may be more.

        It expects as many as the last time: to find that there are no more takes as long as half of a reply.
        """
        counters, refusals, count = self._counters, self._refusals, 0
        while count < self._expected:
            try:
                data, ancillary, _, source = receive_message(receiver, MAX_SIZE, ANCILLARY_SIZE)
            except BlockingIOError:
                self._expected = max(1, count)
                return False
            except OSError as error:  # Windows: an earlier reply was refused by its receiver
                self._refuse(None, "send", error)
                return False
            count += 1
            try:
                reason = "loop" if ancillary and ancillary[0][2] in REPLY_MARKS else refusals[source]
                if reason is not None:
                    self._refuse(source, reason)
                    continue
                counters.answered += 1
                counters.received += len(data)
                if self._has_log:
                    self._log(data, source)
                self._send(receiver, data, source)
            except Exception as error:  # the others have to be answered too
                self._context.fail(format_address(source), error)
        self._expected = min(2 * count, BATCH)
        return True

    def _send(self, receiver: socket.socket, reply: bytes, source: SocketAddress) -> None:
        self._counters.sent += len(reply)  # before it arrives: its receiver finds it counted
        try:
            receiver.sendto(reply, source)
        except OSError as error:  # also if the send buffer is full: UDP does not wait
            self._counters.sent -= len(reply)
            self._refuse(source, "send", error)

    def _refuse(self, source: SocketAddress | None, reason: str, error: OSError | None = None) -> None:
        self._counters.refuse(reason)
        text = REFUSALS[reason] if error is None else f"{REFUSALS[reason]}: {describe_error(error)}"
        self._log_refused(format_address(source), text)

    def _log(self, data: bytes, source: SocketAddress) -> None:
        peer, text = format_address(source), excerpt(data)
        facts = {"client": peer, "listener": self._context.listener, "bytes": len(data), "text": text}
        access_log.info("%s datagram: %d bytes: %s", peer, len(data), text, extra={"facts": facts})

    def close(self) -> None:
        """Answer what has arrived, then close the sockets. What arrives meanwhile does not extend this."""
        for each in self.sockets:
            for _ in range(DRAIN_BATCHES):
                if not self.receive(each):
                    break
            each.close()


class LoopReceiver:
    """Calls a responder in the running event loop. :exc:`NotImplementedError` if the loop does not watch sockets."""

    def __init__(self, responder: DatagramResponder) -> None:
        self._loop = asyncio.get_running_loop()
        self._responder: DatagramResponder | None = responder
        for each in responder.sockets:
            self._loop.add_reader(each, responder.receive, each)

    def stop(self) -> None:
        """Answer what has arrived, and close. Does nothing the second time."""
        responder, self._responder = self._responder, None
        if responder is not None:
            for each in responder.sockets:
                self._loop.remove_reader(each)
            responder.close()

    def join(self) -> None:
        """Do nothing: :meth:`stop` does not return earlier."""


class ThreadReceiver:
    """Calls a responder in a thread. :exc:`OSError` or :exc:`RuntimeError` for lack of descriptors or threads."""

    def __init__(self, responder: DatagramResponder) -> None:
        self._responder = responder
        self._is_stopping = False
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="echo-async UDP")
        try:
            self._thread.start()
        except BaseException:
            self._close_waker()
            raise

    def _run(self) -> None:
        with PollSelector() as selector:
            for each in (self._wakened, *self._responder.sockets):
                selector.register(each, EVENT_READ)
            while not self._is_stopping:
                for key, _ in selector.select():
                    if key.fileobj is not self._wakened:
                        self._responder.receive(key.fileobj)  # type: ignore[arg-type]
        self._responder.close()

    def stop(self) -> None:
        """Begin to stop. Returns at once; safe to call twice, from any thread or signal handler."""
        self._is_stopping = True
        with contextlib.suppress(OSError):  # it is closed
            self._waker.send(b"\0")

    def join(self) -> None:
        """Wait until what has arrived is answered, and the sockets are closed."""
        self._thread.join()
        self._close_waker()

    def _close_waker(self) -> None:
        self._waker.close()
        self._wakened.close()


Receiver = LoopReceiver | ThreadReceiver


def start_receiver(admission: Admission, sockets: Sequence[socket.socket]) -> Receiver | None:
    """Answer the datagrams of ``sockets`` in the event loop, or in a thread of the engine ``threads``."""
    if not sockets:
        return None
    responder = DatagramResponder(admission, sockets)
    if admission.config.engine != "threads":
        with contextlib.suppress(NotImplementedError):  # asyncio.ProactorEventLoop
            return LoopReceiver(responder)
    return ThreadReceiver(responder)
