"""Runs the actions of a script in the thread of a connection, which waits itself."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

from ..background import start_thread
from ..wire.script import Action, End, Report, Script, Send, Timer, Wait
from .connection import Connection
from .runner import Runner


class ThreadRunner(Runner):
    """Runs actions with what its connection provides: ``send_all``, and ``close_write`` for the sending side.

    ``half_close`` closes that side from another thread.
    """

    def __init__(
        self,
        connection: Connection,
        script: Script,
        send_all: Callable[[bytes], None],
        close_write: Callable[[], None],
        half_close: Callable[[], None],
    ) -> None:
        super().__init__(connection, script)
        self._send_all = send_all
        self._close_write = close_write
        self._half_close_now = half_close
        self._wake = threading.Event()  # ends the current wait
        self._ended = threading.Event()  # ends the timer
        self._timer: threading.Thread | None = None

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
            if self.is_cut:
                break
            self.perform(action)
        self.wait_stalled()
        self.is_busy = False

    def perform(self, action: Action) -> None:
        """Do one action, in the thread of the connection."""
        match action:
            case Send():
                self.sent += len(action.data)
                self._send_all(action.data)
            case Wait():
                self._wait(action.seconds)
            case Report():
                self._report(action)
            case Timer():
                self._timer = start_thread(partial(self._expire_at, action), "echo-async timer")
            case End():
                self._apply_end(action)

    def _wait(self, seconds: float) -> None:
        """Wait, at most until the server stops."""
        left = self._next_wait(seconds)
        while self._wait_on(left) and left > 0:
            left = self._due - self._context.now()

    def _wait_on(self, seconds: float | None = None) -> bool:
        """Sleep, at most until :meth:`wake` is called; return whether to wait on."""
        is_woken = self._wake.wait(seconds)
        self._wake.clear()
        return not (self.is_cut or (is_woken and self.is_ending))

    def wait_stalled(self) -> None:
        """Wait while the script has stalled the connection."""
        while self.is_stalled:
            self._wait_on()

    def _expire_at(self, timer: Timer) -> None:
        if not self._ended.wait(timer.seconds):
            self._expire(timer)

    def _apply_end(self, end: End) -> None:
        for wait in self._wait_until_sent(end):
            self._wait(wait.seconds)
            if self.is_cut:
                return
        match end:
            case End.CLOSE:
                self._connection.conversation.end_input()
            case End.RESET:
                self._connection.abort(reset=True)
                raise ConnectionResetError("reset by the script")
            case End.HALF_CLOSE:
                self._close_write()
            case End.STALL:
                self._begin_stall()

    def _half_close(self) -> None:
        self.wake()  # the thread of the connection holds its lock during an action
        self._half_close_now()

    def wake(self) -> None:
        self._wake.set()

    def end(self) -> None:
        self.is_ending = True
        self.is_stalled = False
        self._ended.set()
        self.wake()

    def close(self) -> None:
        """The connection is closed: leave no thread."""
        self.end()
        if self._timer is not None:
            self._timer.join()
