"""Receives datagrams: in the event loop, or in a thread."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from selectors import EVENT_READ
from typing import TYPE_CHECKING

from ..background import start_thread
from ..compat import PollSelector
from .admission import Admission
from .datagram_responder import DatagramResponder

if TYPE_CHECKING:
    import asyncio


class LoopReceiver:
    """Calls a responder in the running event loop. :exc:`NotImplementedError` if the loop does not watch sockets."""

    def __init__(self, responder: DatagramResponder) -> None:
        from asyncio import get_running_loop  # a server on threads imports no asyncio

        self._loop = get_running_loop()
        self._responder = responder
        self._timer: asyncio.TimerHandle | None = None
        for each in responder.sockets:
            self._loop.add_reader(each, self._receive, each)

    def _receive(self, receiver: socket.socket) -> None:
        self._responder.receive(receiver)
        self._send_due()

    def _send_due(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if (seconds := self._responder.send_due()) is not None:
            self._timer = self._loop.call_later(seconds, self._send_due)

    def stop(self) -> None:
        """Answer what has arrived."""
        if self._timer is not None:
            self._timer.cancel()
        for each in self._responder.sockets:
            self._loop.remove_reader(each)
        self._responder.drain()


class ThreadReceiver:
    """Calls a responder in a thread. :exc:`OSError` or :exc:`RuntimeError` for lack of descriptors or threads."""

    def __init__(self, responder: DatagramResponder) -> None:
        self._responder = responder
        self._is_stopping = False
        self._waker, self._wakened = socket.socketpair()
        try:
            self._thread = start_thread(self._run, "echo-async UDP", stop=self._begin_stop)
        except BaseException:
            self._close_waker()
            raise

    def _run(self) -> None:
        with PollSelector() as selector:
            for each in (self._wakened, *self._responder.sockets):
                selector.register(each, EVENT_READ)
            while not self._is_stopping:
                for key, _ in selector.select(self._responder.send_due()):
                    if key.fileobj is not self._wakened:
                        self._responder.receive(key.fileobj)  # type: ignore[arg-type]
        self._responder.drain()

    def stop(self) -> None:
        """Answer what has arrived."""
        self._begin_stop()
        self._thread.join()
        self._close_waker()

    def _begin_stop(self) -> None:
        self._is_stopping = True
        with contextlib.suppress(OSError):  # it is closed
            self._waker.send(b"\0")

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
