"""Connections of the ``threads`` engine with a fault: the connection's thread runs the actions, and waits."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..compat import set_reset_on_close
from ..server.origin import Origin
from ..server.registry import Registry
from ..wire.faults import Action, End, FaultPlan, ReportFault, Send, Wait
from .faulty_connection import FaultyConnection
from .threads import ThreadConnection
from .tls_socket import TlsSocket


class FaultyThreadConnection(FaultyConnection, ThreadConnection):
    """One connection with a fault."""

    def __init__(
        self, plan: FaultPlan, registry: Registry, connected: socket.socket | TlsSocket, origin: Origin
    ) -> None:
        super().__init__(registry, connected, origin)
        self._plan = plan
        self._ending = threading.Event()  # ends the waits
        self._is_stalled = self.has_pending_reply = False

    def _echo(self) -> None:
        with self._io_lock:
            self._run_actions(self._plan.start())
        if self.conversation.finished:
            self._handle_stop_request()
        super()._echo()

    def _send(self, reply: bytes) -> None:
        self._run_actions(self.actions(reply))

    def _run_actions(self, actions: Iterator[Action]) -> None:
        self.has_pending_reply = True
        due = self.context.now()
        for action in actions:
            match action:
                case Send():
                    self._send_all(action.data)
                case Wait():
                    due = self._wait(due, action.seconds)
                case ReportFault():
                    self.report(action)
                case End():
                    self._apply_end(action)
        self.has_pending_reply = False

    def _wait(self, due: float, seconds: float) -> float:
        """Wait for ``seconds`` from ``due`` on, or until the server stops; return when it should have ended."""
        due = self.next_due(due, seconds)
        seconds = max(0.0, due - self.context.now())
        if not seconds or self._is_ending:
            time.sleep(seconds)
        else:
            self._ending.wait(seconds)
        return due

    def _apply_end(self, end: End) -> None:
        match end:
            case End.CLOSE:
                self.conversation.finish()
            case End.RESET:
                set_reset_on_close(self.raw_socket())
                raise ConnectionResetError("reset by a fault")
            case End.HALF_CLOSE:
                self._is_write_closed = True
                self._socket.shutdown(socket.SHUT_WR)
            case End.STALL:
                self.begin_stall()
                self._ending.wait()
                self._is_stalled = False
                self.conversation.finish()

    def _handle_stop_request(self) -> None:
        if self._stop_requested or not self.is_held_open:
            super()._handle_stop_request()

    @property
    def _is_ending(self) -> bool:  # type: ignore[override]  # read only here
        return self._ending.is_set()

    def finish(self) -> None:
        self._ending.set()
        if self._is_half_closed:  # there is no half left to close
            return self.abort()
        super().finish()

    def stop(self) -> None:
        self._ending.set()
        if self._is_half_closed:
            return self.abort()
        super().stop()

    def abort(self) -> None:
        self._ending.set()
        super().abort()

    @property
    def _is_half_closed(self) -> bool:
        return self._is_write_closed and not self.conversation.finished

    def get_extra_info(self, name: str) -> Any:
        match name:
            case "sockname":
                return self.raw_socket().getsockname()
            case "peername":
                return self.raw_socket().getpeername()
        return self._socket.session if isinstance(self._socket, TlsSocket) else None

    def raw_socket(self) -> socket.socket:
        return self._socket.plain if isinstance(self._socket, TlsSocket) else self._socket
