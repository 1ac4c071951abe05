"""Runs the actions of a script in the thread of a connection, which waits itself."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

from ..compat import set_reset_on_close
from ..wire.script import Action, End, Report, Script, Send, Wait
from .connection import Connection
from .runner import Runner


class ThreadRunner(Runner):
    """Runs actions with what its connection provides: ``send_all``, and ``close_write`` for the sending side."""

    def __init__(
        self,
        connection: Connection,
        script: Script,
        send_all: Callable[[bytes], None],
        close_write: Callable[[], None],
    ) -> None:
        super().__init__(connection, script)
        self._send_all = send_all
        self._close_write = close_write
        self._ending = threading.Event()  # ends the waits

    def start(self) -> None:
        """Do what happens before the first message."""
        self._run(self._script.start())

    def send(self, reply: bytes) -> None:
        """Do what takes the place of sending ``reply``."""
        self._run(self._actions(reply))

    def _run(self, actions: Iterator[Action]) -> None:
        self.is_busy = True
        self._due = self._context.now()
        for action in actions:
            match action:
                case Send():
                    self.sent += len(action.data)
                    self._send_all(action.data)
                case Wait():
                    self._wait(action.seconds)
                case Report():
                    self._report(action)
                case End():
                    self._apply_end(action)
        self.is_busy = False

    def _wait(self, seconds: float) -> None:
        """Wait, at most until the server stops."""
        seconds = self._next_wait(seconds)
        if not seconds or self.is_ending:
            time.sleep(seconds)
        else:
            self._ending.wait(seconds)

    def _apply_end(self, end: End) -> None:
        match end:
            case End.CLOSE:
                self._connection.conversation.end_input()
            case End.RESET:
                connected: socket.socket = self._connection.get_extra_info("socket")
                set_reset_on_close(connected)
                raise ConnectionResetError("reset by the script")
            case End.HALF_CLOSE:
                self._close_write()
            case End.STALL:
                self._begin_stall()
                self._ending.wait()
                self.is_stalled = False

    def end(self) -> None:
        self.is_ending = True
        self._ending.set()
